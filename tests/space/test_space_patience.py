"""A Space whose clients hang up, dawdle, and leave their files behind."""

import os
import socket
import time

import httpx
import pytest
from gradio_client import Client, handle_file

from example_pictures import FOLDER

BIRDS = FOLDER / "birds.jpg"
PATIENCE = 600

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * PATIENCE)]


def test_35_clients_that_hang_up_and_slow_ones_stop_nobody(server):
    client = Client(server.url, verbose=False)
    uploaded = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("a.jpg", BIRDS.read_bytes())}, timeout=PATIENCE)
    picture = {"path": uploaded.json()[0], "meta": {"_type": "gradio.FileData"}}
    dawdlers = []
    for _ in range(8):  # a body that never comes
        dawdler = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port))
        dawdler.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc")
        dawdlers.append(dawdler)
    for _ in range(5):  # a result that nobody waits for
        call = httpx.post(f"{server.url}/gradio_api/call/segment", json={"data": [picture, 0.5]}, timeout=PATIENCE)
        with httpx.stream("GET", f"{server.url}/gradio_api/call/segment/{call.json()['event_id']}", timeout=PATIENCE):
            pass
    _, document = client.predict(handle_file(BIRDS), 0.5, api_name="/segment")
    assert document["annotations"]
    for dawdler in dawdlers:
        dawdler.close()


def test_35_old_uploads_are_deleted(hurried_server):
    files = {"files": ("a.jpg", BIRDS.read_bytes())}
    sent = httpx.post(f"{hurried_server.url}/gradio_api/upload", files=files, timeout=PATIENCE).json()[0]
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(sent):
        assert time.monotonic() < deadline, "the upload stays"
        time.sleep(0.5)
