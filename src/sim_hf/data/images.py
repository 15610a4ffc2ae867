"""Reading pictures: whatever a data set or a user holds becomes the upright 8-bit RGB picture that a person sees.

Decided once, here, for training, evaluation and prediction:

* EXIF orientation is applied (and its tag removed, so that reading twice turns nothing twice).
* Transparency is composited on white, as a browser shows it. Pillow's own conversion drops alpha and shows what lies under it.
* 16-bit gray is divided by 257, so 0..65535 becomes 0..255. Pillow's own conversion clips it to nearly white.
* 32-bit modes carry no range: float is taken as 0..1, 0..255 or 0..65535 and integers as 0..255 or 0..65535, the smallest
  range that holds every value of the picture.
* The number of pixels is checked on the header, before anything is decoded.
* Animations give their first frame.

`read_pixels` gives the same as a tensor. Most pictures are plain JPEG files; those go from the bytes to the tensor without
a picture of Pillow between them.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

DEFAULT_MAX_PIXELS = 89_000_000
ALLOWED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
# By which a picture is known in a folder.
PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif"})
_ORIENTATION = 0x0112  # tag of EXIF
_BACKGROUND = (255, 255, 255, 255)
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    struct.error,
    MemoryError,
    OverflowError,
    Image.DecompressionBombError,
)

ImageSource = str | os.PathLike | bytes | Image.Image | Mapping[str, Any]


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file."""


def read_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """A path, encoded bytes, a PIL image or the `datasets` record `{"bytes", "path"}` -> upright 8-bit RGB picture.

    Raises `ImageError` for a missing, undecodable or truncated file, for formats outside `ALLOWED_FORMATS` and for more
    than `max_pixels` pixels.
    """
    with _errors_that_name(_source_name(source)):
        image = _open_within(source, max_pixels)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def read_pixels(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """What `read_image` gives, bit for bit, and its errors -> uint8 (3, h, w), which lies in memory pixel by pixel."""
    with _errors_that_name(_source_name(source)):
        image = _open_within(source, max_pixels)
        pixels_3hw = None if image is source else _decode_plain_jpeg(image)
        if pixels_3hw is None:
            image.load()
            pixels_3hw = torch.from_numpy(np.array(_to_rgb(ImageOps.exif_transpose(image)))).permute(2, 0, 1)
        return pixels_3hw


def read_image_size(source: ImageSource) -> tuple[int, int]:
    """(height, width) as `read_image` would give them, from the header alone: no pixel is decoded."""
    name = _source_name(source)
    try:
        image = _open(source)
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)  # those that lie on their side
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name}: the header cannot be read ({type(error).__name__}: {error})") from error
    return (width, height) if turned else (height, width)


@contextmanager
def _errors_that_name(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in one of the formats {', '.join(ALLOWED_FORMATS)}") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _source_name(source: ImageSource) -> str:
    if isinstance(source, Mapping):
        return str(source.get("path") or "<picture in memory>")
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, ImageFile.ImageFile) and source.filename:
        return str(source.filename)
    return "<picture in memory>"


def _open(source: ImageSource) -> Image.Image:
    """The picture with its header read and its pixels not decoded."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Mapping):
        data = source.get("bytes")
        source = data if data is not None else source.get("path") or b""
    if isinstance(source, (bytes, bytearray, memoryview)):
        file = BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        file = Path(source)
    else:
        raise ImageError(f"expected a path, bytes, a PIL image or a record with bytes and path, got {type(source)}")
    Image.init()
    formats = [name for name in ALLOWED_FORMATS if name in Image.OPEN]  # AVIF and JPEG 2000 are optional in Pillow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller's own limit decides
        return Image.open(file, formats=formats)


def _open_within(source: ImageSource, max_pixels: int) -> Image.Image:
    image = _open(source)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{_source_name(source)}: {width} x {height} pixels, more than the limit of {max_pixels}")
    return image


def _decode_plain_jpeg(image: Image.Image) -> Tensor | None:
    """The pixels of a JPEG file of three colours that stands upright, its header read and its pixels not; else None."""
    if image.format != "JPEG" or image.mode != "RGB" or image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    image.fp.seek(0)
    data = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    try:
        return cast(Tensor, decode_jpeg(data, mode=ImageReadMode.RGB))  # one file, hence one tensor
    except RuntimeError:
        return None  # broken, or a torchvision without JPEG: Pillow decides which errors are forgiven


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _gray_to_rgb(np.asarray(image).astype(np.float32) / 257)
    if image.mode in ("I", "F"):
        return _gray_to_rgb(_to_8_bit_range(np.asarray(image).astype(np.float64), is_float=image.mode == "F"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit_range(values_HW: np.ndarray, *, is_float: bool) -> np.ndarray:
    values_HW = np.nan_to_num(values_HW, nan=0.0, posinf=65535.0, neginf=0.0)
    largest = values_HW.max(initial=0.0)
    if is_float and largest <= 1:
        return values_HW * 255
    return values_HW if largest <= 255 else values_HW / 257


def _gray_to_rgb(values_HW: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values_HW).clip(0, 255).astype(np.uint8)).convert("RGB")
