"""A running Space under those who use it and those who abuse it, over the network."""

import asyncio
import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from PIL import Image

from boxes import MAX_BOXES
from example_pictures import FOLDER
from sim_hf.data import decode_segmentation

BIRDS = FOLDER / "birds.jpg"
LINES = "100, 38, 460, 397\n9, 342, 208, 465"
MEMORY_MB = 300  # that a request may take beyond what the Space takes anyway
QUEUE_LENGTH = 16
PATIENCE = 600  # seconds, on a loaded machine

pytestmark = pytest.mark.timeout(2 * PATIENCE)


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server.url, download_files=str(tmp_path_factory.mktemp("downloads")), verbose=False)
    client.predict(handle_file(BIRDS), 0.5, api_name="/segment")  # what loads on first use is loaded
    return client


def file_data(path="", url=None):
    return {"path": path, "url": url, "meta": {"_type": "gradio.FileData"}}


def uploaded(server, content, name="a.png"):
    answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, content)}, timeout=PATIENCE)
    return answer.json()[0] if answer.status_code == 200 else answer.status_code


def answer_of(server, endpoint, data):
    """The last event of a raw call: ("complete" | "error", what came with it)."""
    call = httpx.post(f"{server.url}/gradio_api/call/{endpoint}", json={"data": data}, timeout=PATIENCE)
    if call.status_code != 200:
        return "error", call.text
    stream = httpx.get(f"{server.url}/gradio_api/call/{endpoint}/{call.json()['event_id']}", timeout=PATIENCE).text
    event, _, content = stream.strip().split("event: ")[-1].partition("\n")
    return event, json.loads(content.removeprefix("data: "))


# ----- what it is for


def test_segment_answers_with_a_picture_and_a_coco_document(client):
    picture, document = client.predict(handle_file(BIRDS), 0.5, api_name="/segment")
    assert Image.open(picture).format == "WEBP" and Image.open(picture).size == (640, 640)
    assert document["images"] == [{"id": 1, "file_name": "birds.jpg", "width": 512, "height": 512}]
    assert {category["name"] for category in document["categories"]} == {"bird"}
    for annotation in document["annotations"]:
        mask = decode_segmentation(annotation["segmentation"], 512, 512)
        assert annotation["area"] == mask.sum() > 0 and annotation["score"] >= 0.5


def test_label_answers_with_a_mask_for_each_box(client):
    picture, document = client.predict(handle_file(BIRDS), LINES, "bird", api_name="/label")
    assert Image.open(picture).size == (640, 640)
    assert [annotation["bbox"] for annotation in document["annotations"]] == [[100, 38, 360, 359], [9, 342, 199, 123]]


def test_label_takes_a_coco_document_and_its_names(client):
    _, document = client.predict(handle_file(BIRDS), (FOLDER / "birds.json").read_text(), api_name="/label")
    assert len(document["annotations"]) == 2 and document["categories"][0]["name"] == "bird"


def test_a_picture_of_24_million_pixels_works_in_bounded_memory(server, client, bomb):
    path = bomb(6000, 4000, bits=8, channels=3)
    server.forget_peak()
    before = server.memory("VmRSS")
    _, document = client.predict(handle_file(path), 0.05, api_name="/segment")
    assert (document["images"][0]["width"], document["images"][0]["height"]) == (6000, 4000)
    _, document = client.predict(handle_file(path), "100 100 5000 3000", api_name="/label")
    assert document["annotations"][0]["segmentation"]["size"] == [4000, 6000]
    assert server.memory("VmHWM") - before < MEMORY_MB


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ("", "no boxes yet"),
        ("1 2 3", "Line 1 is not four numbers"),
        ("600 600 700 700", "outside the picture, which is 512 x 512"),
        ("0 0 9 9\n" * (MAX_BOXES + 1), f"at most {MAX_BOXES}"),
        ("{", "cannot be read"),
    ],
)
def test_wrong_boxes_are_explained(client, boxes, said):
    with pytest.raises(AppError, match=said):
        client.predict(handle_file(BIRDS), boxes, api_name="/label")


def test_a_least_score_that_nothing_reaches_gives_an_empty_document(client):
    _, document = client.predict(handle_file(BIRDS), 1.0, api_name="/segment")
    assert document["annotations"] == []


def test_only_the_two_endpoints_are_offered(client):
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {"/segment", "/label"}


def test_agents_find_and_call_both_as_tools(server, client):
    async def talk():
        async with (
            streamablehttp_client(f"{server.url}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name.split("_")[-1]: tool for tool in (await session.list_tools()).tools}
            picture = "data:image/jpeg;base64," + base64.b64encode(BIRDS.read_bytes()).decode()
            label = await session.call_tool(tools["label"].name, {"image": picture, "boxes": LINES})
            address = await session.call_tool(tools["segment"].name, {"image": f"{server.url}/a.png", "score": 0.5})
            return tools, label, address

    tools, label, address = asyncio.run(talk())
    assert set(tools) == {"segment", "label"}
    assert "one for each box, in the same order" in tools["label"].description
    assert "x1, y1, x2, y2" in tools["label"].inputSchema["properties"]["boxes"]["description"]
    assert not label.isError and any("segmentation" in getattr(part, "text", "") for part in label.content)
    assert address.isError


# ----- bombs


@pytest.mark.parametrize("size", [(26_000, 1_000), (9_000, 9_000), (13_000, 13_000), (14_000, 14_000)])
def test_bombs_are_refused_with_a_plain_message_in_bounded_memory(server, client, bomb, size):
    path = bomb(*size)
    server.forget_peak()
    before = server.memory("VmRSS")
    for endpoint, rest in (("/segment", [0.5]), ("/label", ["1 2 30 40"])):
        with pytest.raises(AppError, match="too large"):
            client.predict(handle_file(path), *rest, api_name=endpoint)
    assert server.memory("VmHWM") - before < MEMORY_MB


@pytest.mark.parametrize("with_meta", [True, False], ids=["as a file", "as an object"])
def test_a_bomb_in_a_data_url_is_refused_unread(server, client, bomb, with_meta):
    picture = file_data(None, "data:image/png;base64," + base64.b64encode(bomb(14_000, 14_000).read_bytes()).decode())
    if not with_meta:
        del picture["meta"]
    server.forget_peak()
    before = server.memory("VmRSS")
    event, said = answer_of(server, "segment", [picture, 0.5])
    assert event == "error" and "Traceback" not in str(said)
    assert server.memory("VmHWM") - before < MEMORY_MB


def test_the_canvas_refuses_bombs_and_data_urls_too(server, client, bomb):
    """Its handler is not offered to clients, but whoever reads the page's source can call it."""
    (number,) = (d["id"] for d in client.config["dependencies"] if d["api_name"] == "fill")
    path = uploaded(server, bomb(14_000, 14_000).read_bytes())
    url = "data:image/png;base64," + base64.b64encode(BIRDS.read_bytes()).decode()
    server.forget_peak()
    before = server.memory("VmRSS")
    for picture in (file_data(path), file_data("", url), file_data(url, url), file_data("/etc/passwd")):
        canvas = {"image": picture, "boxes": [{"xmin": 1, "ymin": 1, "xmax": 9, "ymax": 9}], "orientation": 0}
        stream = joined(server, number, [canvas, ""])
        assert "webp" not in stream and "root:" not in stream and "Traceback" not in stream
    assert server.memory("VmHWM") - before < MEMORY_MB


def test_the_canvas_keeps_its_guard_after_a_handler_has_updated_it(server, client, bomb):
    """gradio makes a component anew from its class when a handler updates it, also when it updates nothing."""
    numbers = {d["api_name"]: d["id"] for d in client.config["dependencies"]}
    boxes = [{"xmin": 1, "ymin": 1, "xmax": 99, "ymax": 99}]
    picture = uploaded(server, BIRDS.read_bytes(), "birds.jpg")
    canvas = {"image": file_data(picture), "boxes": boxes, "orientation": 0}
    assert "no boxes yet" in joined(server, numbers["paste"], [canvas, ""], session="updated")
    assert "1 object in" in joined(server, numbers["fill"], [canvas, ""], session="updated")
    canvas = {"image": file_data(uploaded(server, bomb(14_000, 14_000).read_bytes())), "boxes": boxes, "orientation": 0}
    assert "This picture is too large" in joined(server, numbers["fill"], [canvas, ""], session="updated")


def joined(server, number, data, session="test"):
    """Everything that the queue says to a job."""
    join = {"data": data, "fn_index": number, "session_hash": session}
    answer = httpx.post(f"{server.url}/gradio_api/queue/join", json=join, timeout=PATIENCE)
    if answer.status_code != 200:
        return answer.text
    return httpx.get(f"{server.url}/gradio_api/queue/data", params={"session_hash": session}, timeout=PATIENCE).text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("a.png", b"<html><script>alert(1)</script></html>"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("a.png", b""),
    ],
    ids=["svg", "html", "eps", "empty"],
)
def test_what_is_no_picture_is_refused_and_never_shown_as_a_page(server, client, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AppError, match="not a picture"):
        client.predict(handle_file(tmp_path / name), 0.5, api_name="/segment")
    path = uploaded(server, content, name)
    shown = httpx.get(f"{server.url}/gradio_api/file={path}", timeout=PATIENCE)
    assert "html" not in shown.headers["content-type"] and "svg" not in shown.headers["content-type"]


@pytest.mark.parametrize("ending", ["gif", "tiff"])
def test_pictures_in_other_formats_are_refused(client, tmp_path, ending):
    Image.new("RGB", (40, 30)).save(tmp_path / f"a.{ending}")
    with pytest.raises(AppError, match="JPEG, PNG or WebP"):
        client.predict(handle_file(tmp_path / f"a.{ending}"), 0.5, api_name="/segment")


# ----- disclosure


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "/proc/self/environ"]
)
def test_paths_and_addresses_are_no_pictures(server, client, path):
    for picture in (file_data(path), file_data("", path), {"path": path}):
        event, said = answer_of(server, "segment", [picture, 0.5])
        assert event == "error"
        assert "root:" not in str(said) and "Traceback" not in str(said) and "/work" not in str(said)


def test_files_of_the_machine_are_not_served(server):
    space = FOLDER.parent
    inside = [space / "app.py", space / "README.md", space.parents[1] / "assets" / "sim-tiny" / "model.safetensors"]
    for path in ["/etc/passwd", "../../../../etc/passwd", "/proc/self/environ", *map(str, inside), f"{FOLDER}/../app.py"]:
        answer = httpx.get(f"{server.url}/gradio_api/file={path}", timeout=PATIENCE)
        assert answer.status_code in (403, 404), path


def test_monitoring_and_unknown_endpoints_are_closed(server):
    assert httpx.get(f"{server.url}/gradio_api/monitoring", timeout=PATIENCE).status_code in (403, 404)
    assert httpx.get(f"{server.url}/monitoring", timeout=PATIENCE).status_code in (403, 404)
    assert httpx.post(f"{server.url}/gradio_api/call/nothing", json={"data": [None, 0.5]}, timeout=PATIENCE).status_code >= 400


def test_recordings_of_strangers_are_not_processed(server):
    """gradio would keep the file and run ffmpeg on it, outside the queue."""
    files = {"video": ("a.mp4", b"not a video")}
    for address in ("gradio_api/process_recording", "gradio_api/process_recording/", "gradio_api//process_recording"):
        assert httpx.post(f"{server.url}/{address}", files=files, timeout=PATIENCE).status_code == 404


def test_what_the_picture_says_of_its_owner_does_not_come_out(client, tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    Image.open(BIRDS).save(tmp_path / "a.jpg", exif=exif)
    picture, _ = client.predict(handle_file(tmp_path / "a.jpg"), 0.5, api_name="/segment")
    with open(picture, "rb") as file:
        assert b"taken at home" not in file.read()


# ----- floods


def test_long_bodies_are_refused_declared_or_not(server):
    join = f"{server.url}/gradio_api/queue/join"
    body = b'{"data": ["' + b"x" * 6_000_000 + b'"]}'
    assert httpx.post(join, content=body, timeout=PATIENCE).status_code == 413
    try:
        answer = httpx.post(join, content=(body[i : i + 100_000] for i in range(0, len(body), 100_000)), timeout=PATIENCE)
        assert answer.status_code in (400, 413)
    except httpx.WriteError:
        pass  # hung up on while still sending
    assert uploaded(server, bytes(11 * 2**20)) == 413
    assert uploaded(server, bytes(20 * 2**20)) == 413


def test_a_flood_meets_a_bounded_queue_and_the_space_recovers(server, client, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    path = uploaded(server, (tmp_path / "a.jpg").read_bytes(), "a.jpg")
    body = {"data": [file_data(path), "10 10 900 900\n" * 3, ""]}

    def call(_):
        return httpx.post(f"{server.url}/gradio_api/call/label", json=body, timeout=PATIENCE).status_code

    with ThreadPoolExecutor(25) as pool:
        codes = list(pool.map(call, range(50)))
    assert set(codes) == {200, 503}
    assert codes.count(200) < 50 - QUEUE_LENGTH
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client.predict(handle_file(BIRDS), 0.5, api_name="/segment")
            return
        except Exception as error:
            assert "full" in str(error) and time.monotonic() < deadline
            time.sleep(1)
