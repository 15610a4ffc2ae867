"""A model over many images: batched, sharded over processes, in the one result format.

A result is {"scores" (n,), "labels" (n,), "boxes" (n, 4) xyxy of the original image, "masks"}, on the CPU; the masks are
`CroppedMasks`, which read like a tensor (n, H, W) bool and become run lengths without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from sim_hf.data.cropped_masks import CroppedMasks
from sim_hf.data.images import read_image


def names_of(model: nn.Module) -> dict[int, str]:
    """label -> class name, from the configuration of a transformers model."""
    return cast(Any, model).config.id2label  # torch types what a module holds as tensors and modules


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """eval mode, restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@torch.inference_mode()
def predict_images(
    model: nn.Module,
    processor,
    images: Sequence[Image.Image],
    *,
    threshold: float = 0.5,
    max_instances: int | None = None,
    allowed_labels: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Results of a batch of RGB images. allowed_labels: classes that may be predicted (None: all); the others are left out
    before the best `max_instances` (the post-processing's default: None) are chosen, so a data set with fewer classes than the
    model is judged fairly."""
    device = next(model.parameters()).device
    inputs = processor(list(images), return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device))
    if allowed_labels is not None:
        barred = torch.ones(outputs.class_queries_logits.shape[-1], dtype=torch.bool, device=device)
        barred[[*allowed_labels, -1]] = False
        outputs.class_queries_logits = outputs.class_queries_logits.masked_fill(barred, float("-inf"))
    results = processor.post_process_crops(
        outputs,
        original_sizes=inputs["original_sizes"],
        input_sizes=inputs["input_sizes"],
        threshold=threshold,
        max_instances=max_instances,
    )
    return [
        {
            **{name: result[name].cpu() for name in ("scores", "labels", "boxes")},
            "masks": CroppedMasks(result["crops"], result["corners"], (picture.height, picture.width)),
        }
        for result, picture in zip(results, images, strict=True)
    ]


def predict_rows(
    model: nn.Module,
    processor,
    rows,
    *,
    batch_size: int = 8,
    threshold: float = 0.0,
    max_instances: int = 100,
    allowed_labels: Sequence[int] | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    limit: int | None = None,
    progress: str | None = None,
) -> Iterator[tuple[dict, Image.Image, dict[str, Any]]]:
    """(row, picture, result) for this process's share of a data set; every image exactly once over all processes."""
    total = len(rows) if limit is None else min(limit, len(rows))
    mine = range(process_index, total, num_processes)
    bar = tqdm(total=len(mine), desc=progress, unit="image", disable=progress is None or process_index > 0, leave=False)
    with evaluating(model):
        for chunk in _chunks(mine, batch_size):
            batch = [rows[index] for index in chunk]
            pictures = [read_image(row["image"]) for row in batch]
            results = predict_images(
                model,
                processor,
                pictures,
                threshold=threshold,
                max_instances=max_instances,
                allowed_labels=allowed_labels,
            )
            bar.update(len(chunk))
            yield from zip(batch, pictures, results, strict=True)
    bar.close()


def _chunks(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    indices = list(indices)
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
