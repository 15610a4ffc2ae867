"""What may come in, and as what."""

import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from uploads import MAX_PIXELS, WORKING_SIDE, BodyLimit, UploadError, read_upload


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_the_three_formats_are_read(tmp_path, ending):
    upload = read_upload(saved(Image.new("RGB", (40, 30), "red"), tmp_path / f"a.{ending}"))
    assert upload.picture.size == (40, 30) and upload.size == (30, 40) and upload.scale == 1
    assert upload.file_name == f"a.{ending}"


@pytest.mark.parametrize("ending", ["gif", "tiff", "bmp", "ppm", "ico", "eps"])
def test_other_formats_are_refused_under_any_name(tmp_path, ending):
    path = saved(Image.new("RGB", (40, 30)), tmp_path / f"a.{ending}").rename(tmp_path / "a.png")
    with pytest.raises(UploadError, match="not a picture"):
        read_upload(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html><script>alert(1)</script>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\x89PNG\r\n",
    ],
    ids=["empty", "html", "svg", "eps", "png header"],
)
def test_what_only_calls_itself_a_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UploadError, match="not a picture"):
        read_upload(tmp_path / "a.png")


def test_half_a_picture_is_broken(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(UploadError, match="broken"):
        read_upload(path)


@pytest.mark.parametrize("size", [(26_000, 1_000), (9_000, 9_000), (13_000, 13_000), (14_000, 14_000), (100_000, 100_000)])
def test_a_bomb_is_refused_by_its_header(bomb, size, monkeypatch):
    if size[0] < 100_000:
        path = bomb(*size)
    else:  # a header that promises more than anyone could send
        path = bomb(8, 8)
        data = bytearray(path.read_bytes())
        data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path.write_bytes(data)
    monkeypatch.setattr(Image.core, "new", lambda *a: pytest.fail("decoded"))
    monkeypatch.setattr(Image.core, "fill", lambda *a: pytest.fail("decoded"))
    with pytest.raises(UploadError, match="too large: at most"):
        read_upload(path)


def test_modes_that_unfold_into_more_bytes_have_a_lower_limit(tmp_path):
    size = (3_000, 3_000)
    assert size[0] * size[1] < MAX_PIXELS
    with pytest.raises(UploadError, match="at most 8 million"):
        read_upload(saved(Image.new("RGBA", size), tmp_path / "a.png", compress_level=1))
    assert read_upload(saved(Image.new("RGB", size), tmp_path / "a.png", compress_level=1)).size == size


def test_a_long_picture_is_reduced_and_knows_its_size(tmp_path):
    upload = read_upload(saved(Image.new("RGB", (4000, 1000)), tmp_path / "a.jpg"))
    assert upload.picture.size == (WORKING_SIDE, 400) and upload.size == (1000, 4000)
    assert upload.scale == WORKING_SIDE / 4000


def test_one_pixel_high_is_a_picture(tmp_path):
    assert read_upload(saved(Image.new("RGB", (5000, 1)), tmp_path / "a.png")).picture.size == (WORKING_SIDE, 1)


def test_a_turned_jpeg_is_upright_and_its_size_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "taken at home"
    upload = read_upload(saved(Image.new("RGB", (4000, 2000)), tmp_path / "a.jpg", exif=exif))
    assert upload.size == (4000, 2000) and upload.picture.size == (800, 1600)
    assert not upload.picture.getexif() and "exif" not in upload.picture.info


@pytest.mark.parametrize("name", ["‮gnp.exe.png", "a<b>.png", "x" * 120 + ".png"])
def test_strange_file_names_are_not_repeated(tmp_path, name):
    assert read_upload(saved(Image.new("RGB", (4, 4)), tmp_path / name)).file_name == "image"


@pytest.fixture
def limited():
    async def echo(request):
        return PlainTextResponse(str(len(await request.body())))

    routes = [Route(path, echo, methods=["POST"]) for path in ("/gradio_api/upload", "/gradio_api/queue/join")]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(BodyLimit)]))


def test_bodies_within_the_limit_pass(limited):
    assert limited.post("/gradio_api/queue/join", content=b"x" * 1000).text == "1000"
    assert limited.post("/gradio_api/upload", content=b"x" * 12_000_000).text == "12000000"


@pytest.mark.parametrize(("path", "size"), [("/gradio_api/queue/join", 2_000_000), ("/gradio_api/upload", 16_000_000)])
def test_longer_bodies_are_refused_whether_they_say_so_or_not(limited, path, size):
    assert limited.post(path, content=b"x" * size).status_code == 413
    chunks = (b"x" * 100_000 for _ in range(size // 100_000))
    assert limited.post(path, content=chunks).status_code == 413


def test_a_length_that_is_no_number_is_refused(limited):
    assert limited.post("/gradio_api/queue/join", content=b"x", headers={"content-length": "-1"}).status_code == 413
