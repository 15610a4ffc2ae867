"""What strangers send: how much of it is read, and into how much memory it may unfold.

gradio decodes a picture before the app's own code runs, takes data URLs past its limit for uploads, and fetches addresses
of any size. Here a picture comes as an uploaded file or not at all, its header is judged before its pixels are decoded, and
everything behind the door works on a picture of at most `WORKING_SIDE` pixels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, UnidentifiedImageError
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sim_hf.data import ImageError, read_image, read_image_size

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 25_000_000
_PLAIN_MODES = ("RGB", "L", "P")  # others unfold into several times as many bytes a pixel on the way to RGB
_MAX_PIXELS_OF_OTHERS = MAX_PIXELS // 3
WORKING_SIDE = 1600

MAX_UPLOAD_BYTES = 10 * 2**20
_MAX_UPLOAD_BODY = 14 * 2**20  # the form around the file; or the file as base64, which MCP clients send
_MAX_BODY = 2**20
_CLOSED = ("/process_recording",)  # gradio would run ffmpeg on what a stranger sends, in no queue; no button here leads there

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]{0,99}")


class UploadError(ValueError):
    """What was sent cannot be used; the message is for the person who sent it."""


@dataclass(frozen=True)
class Upload:
    """picture: RGB, upright, at most `WORKING_SIDE` pixels long; size: (height, width) before it was reduced."""

    picture: Image.Image
    size: tuple[int, int]
    file_name: str

    @property
    def scale(self) -> float:
        """Pixels of the picture per pixel of what was sent."""
        return max(self.picture.size) / max(self.size)


def read_upload(path: str | Path) -> Upload:
    """An uploaded file -> its picture. Raises `UploadError` for what is no picture, too large or broken."""
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # an error where `restrict_pillow` was called
        raise UploadError(_too_many_pixels(MAX_PIXELS)) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise UploadError("This file is not a picture: please use a JPEG, PNG or WebP file.") from None
    with image:
        is_plain = image.mode in _PLAIN_MODES and "transparency" not in image.info
        limit = MAX_PIXELS if is_plain else _MAX_PIXELS_OF_OTHERS
        if image.width * image.height > limit:
            raise UploadError(_too_many_pixels(limit))
        try:
            size = read_image_size(path)
            image.draft("RGB", (WORKING_SIDE, WORKING_SIDE))  # a large JPEG is decoded at a half, a quarter or an eighth
            picture = read_image(image, max_pixels=limit)
        except ImageError:
            raise UploadError("This picture is broken and cannot be read.") from None
    picture.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.LANCZOS)
    plain = Image.new("RGB", picture.size)  # without the place where it was taken, and whatever else the file says
    plain.paste(picture)
    name = Path(path).name
    return Upload(plain, size, name if _PLAIN_NAME.fullmatch(name) else "image")


def _too_many_pixels(limit: int) -> str:
    return f"This picture is too large: at most {limit / 1e6:.0f} million pixels, please."


def restrict_pillow() -> None:
    """For the whole process, wherever gradio itself opens a picture: three formats, and no picture beyond the limit."""
    Image.init()
    Image.ID[:] = FORMATS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def take_uploads_only(component: type[gr.components.Component], preprocess: Callable[[Any], Any]) -> None:
    """Components of this class hand what `preprocess` makes of a payload to the app, undecoded, and never fetch an address.

    It replaces methods of the class. An instance would lose its own, as gradio makes a component anew from its class whenever a
    handler updates it; a subclass would lose its page, as gradio looks for browser code beside the module of the class.
    """
    move_to_cache = component.async_move_resource_to_block_cache

    async def move_files_to_cache(self: gr.components.Component, source: str | Path | None) -> str | None:
        if source is not None and re.match(r"\s*[a-z+.-]+:", str(source), re.IGNORECASE):
            raise gr.Error("Please upload the picture itself: addresses are not fetched.")
        return await move_to_cache(self, source)

    component.async_move_resource_to_block_cache = move_files_to_cache
    component.preprocess = staticmethod(preprocess)


def uploaded_path(payload: Any) -> str | None:
    """`preprocess` of a picture: the path of the file that gradio has found among its uploads."""
    if payload is None:
        return None
    if payload.path is None or (payload.url or "").lstrip().lower().startswith("data:"):
        raise gr.Error("Please upload the picture as a file.")
    return payload.path


class BodyLimit:
    """ASGI middleware: 413 for a request whose body is longer than its route has use for, declared or not; 404 for `_CLOSED`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"].rstrip("/")
        if path.endswith(_CLOSED):
            await PlainTextResponse("not found", status_code=404)(scope, receive, send)
            return
        limit = _MAX_UPLOAD_BODY if path.endswith("/upload") or "/mcp" in path else _MAX_BODY
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            await PlainTextResponse("too large", status_code=413)(scope, receive, send)
            return
        received, started = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _BodyTooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _BodyTooLargeError:
            if not started:
                await PlainTextResponse("too large", status_code=413)(scope, receive, send)


class _BodyTooLargeError(Exception):
    pass
