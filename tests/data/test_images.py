import io
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from sim_hf.data.images import ImageError, read_image, read_image_size, read_pixels

RED = (220, 20, 20)


def _encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _stored_under(upright, orientation):
    """The pixels that a camera stores so that EXIF `orientation` shows `upright`."""
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    return upright if inverse is None else upright.transpose(inverse)


def _upright():
    image = Image.new("RGB", (64, 40), "white")
    image.paste(RED, (8, 4, 24, 16))
    return image


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_come_out_upright(orientation):
    data = _encoded(_stored_under(_upright(), orientation), "PNG", exif=_exif(orientation))
    image = read_image(data)
    assert np.array_equal(np.asarray(image), np.asarray(_upright()))
    assert read_image_size(data) == (40, 64)
    assert np.array_equal(np.asarray(read_image(image)), np.asarray(image)), "reading twice turns nothing twice"


def test_path_bytes_pil_and_datasets_record_give_the_same_picture(tmp_path):
    path = tmp_path / "picture.png"
    _upright().save(path)
    data = path.read_bytes()
    sources = [path, str(path), data, Image.open(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for source in sources:
        image = read_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(_upright()))


def test_16_bit_ramp_keeps_its_gray_levels():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = np.asarray(read_image(_encoded(Image.fromarray(ramp))))
    assert len(np.unique(image)) >= 200
    assert image.min() == 0 and image.max() == 255 and abs(image.mean() - 127.5) < 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, np.nan, 65535.0]], np.float32), [0, 0, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
    ],
)
def test_32_bit_modes_are_scaled_by_the_smallest_range_that_holds_them(values, expected):
    assert np.asarray(read_image(Image.fromarray(values)))[0, :, 0].tolist() == expected


def _with_alpha(mode):
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, *RED])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 0
        return image
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (*RED, 255))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(mode):
    pixels = np.asarray(read_image(_encoded(_with_alpha(mode))))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1, 0] < 255 and pixels[0, 1, 1] < 120


def test_half_transparent_black_becomes_middle_gray():
    assert np.asarray(read_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))[0, 0, 0] in (127, 128)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("RGB", (2, 2), RED).convert("P"), RED),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
    ],
)
def test_bilevel_gray_palette_and_cmyk_become_rgb(image, expected):
    assert np.allclose(np.asarray(read_image(image))[0, 0], expected, atol=35)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html><body>404</body></html>", _encoded(_upright(), "JPEG")[:200], _encoded(_upright())[:-40]],
    ids=["empty", "html", "half jpeg", "cut png"],
)
def test_broken_file_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "broken_0007.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken_0007\.jpg"):
        read_image(path)


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.jpg: no such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match=r"nowhere\.jpg: no such file"):
        read_image_size(tmp_path / "nowhere.jpg")


def test_bomb_is_refused_on_its_header(monkeypatch):
    data = _encoded(Image.new("1", (20_000, 15_000)))
    assert len(data) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the pixels were decoded"))
    with pytest.raises(ImageError, match=r"(?i)limit|bomb"):
        read_image(data)
    with pytest.raises(ImageError, match="20 x 10 pixels, more than the limit of 100"):
        read_image(_encoded_small(), max_pixels=100)


def _encoded_small():
    return b"P6 20 10 255\n" + bytes(600)


def test_format_outside_the_list_is_refused():
    with pytest.raises(ImageError, match="not a picture in one of the formats"):
        read_image(_encoded(Image.new("RGB", (4, 4)), "ICO", sizes=[(4, 4)]))


def test_wrong_type_of_source_is_named():
    with pytest.raises(ImageError, match="NoneType"):
        read_image(None)


def _wavy(height, width):
    """A picture whose colours change from pixel to pixel, so that the way colour is enlarged shows."""
    values = np.random.default_rng(height * width).integers(0, 256, (-(-height // 3), -(-width // 3), 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("size", [(40, 64), (37, 51), (1, 1)])
def test_pixels_of_a_jpeg_are_those_of_the_picture_bit_for_bit(tmp_path, subsampling, options, size):
    data = _encoded(_wavy(*size), "JPEG", **{"quality": 92, "subsampling": subsampling, **options})
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    expected = torch.from_numpy(np.array(read_image(data))).permute(2, 0, 1)
    assert expected.shape == (3, *size)
    for source in (data, path, Image.open(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}):
        pixels = read_pixels(source)
        assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected)


def test_a_plain_jpeg_is_read_without_a_picture_of_pillow(monkeypatch):
    data = _encoded(_wavy(40, 64), "JPEG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("Pillow decoded it"))
    assert read_pixels(data).shape == (3, 40, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_of_a_turned_jpeg_stand_upright(orientation):
    data = _encoded(_stored_under(_wavy(40, 64), orientation), "JPEG", exif=_exif(orientation), quality=95, subsampling=0)
    pixels = read_pixels(data)
    assert torch.equal(pixels, torch.from_numpy(np.array(read_image(data))).permute(2, 0, 1))
    assert (pixels - torch.from_numpy(np.array(_wavy(40, 64))).permute(2, 0, 1).float()).abs().mean() < 8


@pytest.mark.parametrize(
    "data",
    [
        _encoded(Image.new("L", (5, 4), 77), "JPEG"),
        _encoded(Image.new("CMYK", (5, 4), (0, 255, 255, 0)), "JPEG"),
        _encoded(_wavy(40, 64), "JPEG", keep_rgb=True, subsampling=0),
        _encoded(_with_alpha("RGBA")),
        _encoded(_with_alpha("P")),
        _encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)),
    ],
    ids=["gray jpeg", "cmyk jpeg", "rgb jpeg", "alpha", "palette", "16 bits"],
)
def test_pixels_of_other_pictures_are_those_of_the_picture(data):
    assert torch.equal(read_pixels(data), torch.from_numpy(np.array(read_image(data))).permute(2, 0, 1))


def test_a_damaged_jpeg_gives_the_same_pixels_or_the_same_error():
    """Bytes of it are changed, cut off or added; what Pillow forgives is forgiven, what it refuses is refused."""
    random = np.random.default_rng(0)
    whole = _encoded(_wavy(40, 64), "JPEG", quality=70)
    outcomes = set()
    for damage in range(150):
        data = bytearray(whole)
        if damage % 3 == 0:
            del data[int(random.integers(2, len(data))) :]
        elif damage % 3 == 1:
            data[int(random.integers(2, len(data)))] = int(random.integers(256))
        else:
            data += random.bytes(9)
        results = []
        for read in (read_pixels, lambda source: torch.from_numpy(np.array(read_image(source))).permute(2, 0, 1)):
            try:
                results.append(read(bytes(data)))
            except ImageError as error:
                results.append(re.sub("0x[0-9a-f]+", "", str(error)))
        ours, expected = results
        outcomes.add(type(ours))
        assert torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected
    assert outcomes == {torch.Tensor, str}


def test_pixels_of_a_large_jpeg_are_refused_on_its_header():
    with pytest.raises(ImageError, match="64 x 40 pixels, more than the limit of 100"):
        read_pixels(_encoded(_wavy(40, 64), "JPEG"), max_pixels=100)
