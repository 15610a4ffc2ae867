"""A Space whose clients hang up, dawdle, and leave their files behind."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from gradio_client import Client, handle_file

from conftest import SPACE, wait_until_up
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


def test_35_old_uploads_are_deleted(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    hurried = "import app; app._CLEAN_EVERY, app._FILES_LIVE = 1, 2; app.main()"
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", hurried], cwd=SPACE, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_up(url, process, tmp_path / "log.txt")
        sent = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.jpg", BIRDS.read_bytes())}, timeout=PATIENCE).json()[0]
        deadline = time.monotonic() + PATIENCE
        while os.path.exists(sent):
            assert time.monotonic() < deadline, "the upload stays"
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(timeout=60)
