"""Two hundred requests to a running Space from eight clients at once. `make soak`."""

import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from gradio_client import Client, handle_file

from example_pictures import FOLDER

BIRDS = FOLDER / "birds.jpg"
NUM_CLIENTS, NUM_REQUESTS = 8, 200
MEMORY_MB = 300  # beyond what the Space takes after its first answer


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_two_hundred_requests_from_eight_clients(server, capsys, tmp_path):
    first = Client(server.url, verbose=False, download_files=str(tmp_path))
    first.predict(handle_file(BIRDS), 0.5, api_name="/segment")
    process = psutil.Process(server.process.pid)
    before, files = server.memory("VmRSS"), process.num_fds()
    server.forget_peak()

    def ask(number):
        client = Client(server.url, verbose=False, download_files=str(tmp_path / str(number)))
        answers = []
        for request in range(NUM_REQUESTS // NUM_CLIENTS):
            started = time.monotonic()
            if request % 2:
                _, document = client.predict(handle_file(BIRDS), "100, 38, 460, 397", "bird", api_name="/label")
            else:
                _, document = client.predict(handle_file(BIRDS), 0.5, api_name="/segment")
            answers.append((len(document["annotations"]), time.monotonic() - started))
        client.close()
        return answers

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [answer for answers in pool.map(ask, range(NUM_CLIENTS)) for answer in answers]
    time.sleep(5)  # connections close
    seconds = sorted(second for _, second in answers)
    with capsys.disabled():
        print(
            f"{len(answers)} answers, {seconds[len(seconds) // 2]:.1f} s in the middle, {seconds[-1]:.1f} s at most, "
            f"memory {before} MB before, {server.memory('VmRSS')} after, {server.memory('VmHWM')} at most, "
            f"open files {files} before, {process.num_fds()} after"
        )
    assert len(answers) == NUM_REQUESTS and all(count > 0 for count, _ in answers)
    assert server.memory("VmHWM") - before < MEMORY_MB
    assert process.num_fds() <= files + NUM_CLIENTS
