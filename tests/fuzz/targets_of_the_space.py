"""Garbage over the network. Whatever a request holds, the Space answers, tells nothing of itself, and goes on.

Unlike the other targets these need a Space that runs: `target(space, data)`.
"""

from __future__ import annotations

import json
import time

import httpx
from targets_of_data import PICTURES
from workplace import SPACE

from running_space import Server

PATIENCE = 300  # seconds, on a loaded machine
MEMORY_MB = 800  # that the Space may grow by, whatever it is sent: each of its threads keeps what it once needed
CHECK_EVERY = 50  # requests
BIRDS = (SPACE / "examples" / "birds.jpg").read_bytes()
PLACEHOLDER = b"UPLOADED"  # in the seeds: the path of a picture that was uploaded
_ENDPOINTS = ("call/segment", "call/label", "queue/join", "run/segment", "run/label", "reset", "component_server", "mcp/")
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
_NEVER_SAID = ("Traceback", 'File "', "root:", str(SPACE.parents[1]))


class RunningSpace:
    """Sends, and judges what comes back. A finding is an AssertionError, or an answer that does not come (an httpx error)."""

    def __init__(self, server: Server) -> None:
        self.server, self.sent = server, 0
        once = httpx.Limits(max_keepalive_connections=0)  # the server hangs up on a connection that is silent for 5 s
        self.client = httpx.Client(base_url=f"{server.url}/gradio_api/", timeout=PATIENCE, limits=once)
        self.picture = self.upload(BIRDS).json()[0]
        self.assert_alive()
        self.memory = server.memory("VmRSS")

    def upload(self, content: bytes) -> httpx.Response:
        return self.judged(self.client.post("upload", files={"files": ("a.png", content)}))

    def post(self, endpoint: str, body: bytes) -> str:
        """What the Space says to a body, and then to the job that it made of it."""
        answer = self.judged(self.client.post(endpoint, content=body, headers=_HEADERS))
        if answer.status_code != 200 or not endpoint.startswith("call/"):
            return answer.text
        events = self.judged(self.client.get(f"{endpoint}/{answer.json()['event_id']}")).text
        assert "event: complete" in events or "event: error" in events, events[-300:]
        return events

    def judged(self, answer: httpx.Response) -> httpx.Response:
        assert not any(words in answer.text for words in _NEVER_SAID), answer.text[:300]
        self.sent += 1
        if self.sent % CHECK_EVERY == 0:
            self.assert_alive()
        return answer

    def assert_alive(self) -> None:
        """A sound request is answered with masks, once there is room in the queue."""
        deadline = time.monotonic() + PATIENCE
        while "Queue is full" in (events := self.post("call/segment", segment_body(self.picture))):
            assert time.monotonic() < deadline, "the queue stays full"
            time.sleep(0.2)
        assert "event: complete" in events and '"segmentation"' in events, events[-300:]
        assert self.server.process.poll() is None
        if self.sent > CHECK_EVERY:
            grown = self.server.memory("VmRSS") - self.memory
            assert grown < MEMORY_MB, f"{grown} MB more than at the start after {self.sent} requests"


def space_body(space: RunningSpace, data: bytes) -> None:
    """The bytes as the JSON of each endpoint."""
    for endpoint in _ENDPOINTS:
        space.post(endpoint, data.replace(PLACEHOLDER, space.picture.encode()))


def space_file(space: RunningSpace, data: bytes) -> None:
    """The bytes as an uploaded file, which is then asked about."""
    uploaded = space.upload(data)
    if uploaded.status_code == 200:
        for endpoint, rest in (("call/segment", [0.5]), ("call/label", ["1 2 13 14", ""])):
            space.post(endpoint, _body(uploaded.json()[0], *rest))


def segment_body(path: str) -> bytes:
    return _body(path, 0.5)


def _file(path: str) -> dict:
    return {"path": path, "url": None, "meta": {"_type": "gradio.FileData"}}


def _body(path: str, *rest, **fields) -> bytes:
    return json.dumps({"data": [_file(path), *rest], **fields}).encode()


def _seeds_of_bodies() -> list[bytes]:
    path = PLACEHOLDER.decode()
    canvas = {"image": _file(path), "boxes": [{"xmin": 1, "ymin": 2, "xmax": 90, "ymax": 80, "label": "bird"}], "orientation": 0}
    joined = {"session_hash": "fuzz", "event_data": None, "trigger_id": 7}
    tool = {"name": "segment", "arguments": {"image": "data:image/png;base64,AAAA", "score": 0.5}}
    return [
        segment_body(path),
        _body(path, "10 20 300 400\n5, 6, 70, 80", "bird"),
        *(json.dumps({"data": [canvas, ""], "fn_index": number, **joined}).encode() for number in range(12)),
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": tool}).encode(),
        json.dumps({"session_hash": "fuzz", "fn_index": 0, "fn_name": "f", "component_id": 1, "data": []}).encode(),
    ]


SEEDS: dict[str, list[bytes]] = {"space_body": _seeds_of_bodies(), "space_file": PICTURES}
TARGETS = {function.__name__: function for function in (space_body, space_file)}
