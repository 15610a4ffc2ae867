"""`transformers.Trainer` pushing to a Hub, and an app of gradio as it comes, under the faults of the network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from running_space import Server, running_space

sys.path.append(str(Path(__file__).resolve().parents[1] / "hub"))
from hub_server import HubServer

_PUSHING = """
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
arguments = TrainingArguments(
    "run", use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_steps=1, push_to_hub=True,
    hub_model_id="ann/stock", hub_strategy="all_checkpoints", hub_token="hf_writer",
)
rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}] * 4
model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2))
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
trainer.push_to_hub()
"""
_APP = """
import time
import gradio as gr
def size(picture):
    time.sleep(0.05)
    return str(picture.shape)
gr.Interface(size, gr.Image(), "text", api_name="size").launch()
"""
_PATIENCE = 120


def pushed_by_trainer(folder: Path) -> str:
    with HubServer() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        words = [sys.executable, "-c", _PUSHING]
        pushed = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        if pushed.returncode != 0:
            raise RuntimeError(pushed.stderr.strip().splitlines()[-1])
        commits = len(hub.repos["models", "ann/stock"].commits) - 1  # without the one that makes the repository
        pickles = [name for name in hub.files("ann/stock") if name.endswith((".bin", ".pt", ".pth"))]
    return f"Trainer pushes 2 checkpoints and the model in {commits} commits, with {len(pickles)} pickles in them"


def _stock_app(folder: Path):
    return running_space(folder, "-c", _APP)


def watched_by_anyone(folder: Path) -> str:
    with _stock_app(folder) as server:
        summary = httpx.get(f"{server.url}/monitoring/summary", timeout=_PATIENCE).status_code
        event = _answer(server, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}})
    refused = "refuses" if "event: error" in event and "root:" not in event else "reads"
    return f"a plain app of gradio {refused} /etc/passwd as a picture; its monitoring tells anyone how it is used ({summary})"


def flooded(folder: Path) -> str:
    with _stock_app(folder) as server:
        call = f"{server.url}/gradio_api/call/size"

        def ask(_: int) -> int:
            return httpx.post(call, json={"data": [None]}, timeout=_PATIENCE).status_code

        with ThreadPoolExecutor(25) as pool:
            codes = Counter(pool.map(ask, range(50)))
        long_body = b'{"data": ["' + b"x" * 6_000_000 + b'"]}'
        body = httpx.post(call, content=long_body, headers={"Content-Type": "application/json"}, timeout=_PATIENCE).status_code
        files = {"files": ("a.png", bytes(20 * 2**20))}
        upload = httpx.post(f"{server.url}/gradio_api/upload", files=files, timeout=_PATIENCE).status_code
        video = {"video": ("a.mp4", b"not a video")}
        recording = httpx.post(f"{server.url}/gradio_api/process_recording", files=video, timeout=_PATIENCE).status_code
    said = ", ".join(f"{code} to {count}" for code, count in sorted(codes.items()))
    return (
        f"a plain app of gradio answers {said} of 50 requests at once, {body} to 6 MB of JSON, {upload} to a file of 20 MB, "
        f"{recording} to a video for ffmpeg"
    )


def _answer(server: Server, value: object) -> str:
    call = httpx.post(f"{server.url}/gradio_api/call/size", json={"data": [value]}, timeout=_PATIENCE)
    return httpx.get(f"{server.url}/gradio_api/call/size/{call.json()['event_id']}", timeout=_PATIENCE).text


MEASUREMENTS = {32: pushed_by_trainer, 34: watched_by_anyone, 35: flooded}
