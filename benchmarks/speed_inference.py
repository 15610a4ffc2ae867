"""Inference beside transformers: from a picture to run lengths, and the way from the network's outputs to run lengths alone.

Shape letters: Q queries, K classes, N instances, H W rows and columns of the original image, h w of the mask grid.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Mask2FormerImageProcessor

from measuring import Row, compare
from sim_hf import SIMConfig, SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.data.cropped_masks import CroppedMasks
from sim_hf.evaluation import to_coco_results
from sim_hf.evaluation.prediction import predict_images
from speed_loading import pictures, round_up
from speed_step import exact_convolutions, stock_network

NUM_CLASSES = 80
SIZE = (800, 1333)
COCO_SIZES = ((0.41, 8, 32), (0.34, 32, 96), (0.25, 96, 400))  # share of the objects, least and greatest side in pixels
COCO_SIDE = 640  # of the pictures in which COCO's objects have those sides


def inference_rows(
    repeats: int,
    data: Path | None,
    *,
    preset: str = "r50",
    size: tuple[int, int] = SIZE,
    num_queries: int = 100,
    device: str = "cpu",
) -> list[Row]:
    """The whole way at `size` (height, width), then the post-processing alone: at `size`, and for a picture that was
    enlarged by 5/3 on its way in. On a GPU the networks and our post-processing run there."""
    end_to_end = end_to_end_row(repeats, picture_of(data, size), preset, device)
    return [end_to_end, *post_processing_rows(repeats, size=size, num_queries=num_queries, device=device)]


def picture_of(data: Path | None, size: tuple[int, int] = SIZE) -> Image.Image:
    return pictures(data, 1, size)[0]


def post_processing_rows(repeats: int, *, size: tuple[int, int] = SIZE, num_queries: int = 100, device: str = "cpu") -> list[Row]:
    small = (round(size[0] * 0.6), round(size[1] * 0.6))
    return [post_processing_row(repeats, original, size, num_queries, device) for original in (size, small)]


def end_to_end_row(repeats: int, picture: Image.Image, preset: str, device: str = "cpu") -> Row:
    whole = EndToEnd(picture, preset, device)
    on_host = "; the peer's post-processing runs on the host, as it refuses outputs that lie on a GPU" if device == "cuda" else ""
    return compare(
        f"picture to run lengths, {preset}, {picture.height}x{picture.width}, fp32",
        "transformers' Mask2Former, its processor and its post-processing, pycocotools' run lengths",
        whole.ours,
        whole.peer,
        equal=whole.is_equal(),
        goal=0.5,
        repeats=repeats,
        device=device,
        note="equal: both networks get the same pixels and give the same logits; the peer's masks are made at 384x384 and"
        " scaled by nearest neighbour, so the run lengths differ. Random weights: masks all over the picture, the worst case"
        + on_host,
    )


def post_processing_row(
    repeats: int, original_size: tuple[int, int], input_size: tuple[int, int], num_queries: int, device: str = "cpu"
) -> Row:
    step = PostProcessing(original_size, input_size, num_queries, device=device)
    agreement = step.agreement()
    row = compare(
        f"logits of {num_queries} queries to run lengths, {original_size[0]}x{original_size[1]}",
        "masks at full size: to the input's size, cut, to the original size; pycocotools' run lengths",
        step.ours,
        step.peer,
        equal=agreement.is_equal,
        goal=0.1,
        repeats=repeats,
        device=device,
    )
    row.note = agreement.note
    return row


class EndToEnd:
    """A picture through both networks, with the same weights, to COCO results of as many instances as there are queries."""

    def __init__(self, picture: Image.Image, preset: str, device: str = "cpu") -> None:
        self.picture, self.device = picture, device
        torch.manual_seed(0)
        config = SIMConfig.from_preset(preset, id2label={label: f"class {label}" for label in range(NUM_CLASSES)})
        self.model = SIMForInstanceSegmentation(config).eval().to(device)
        self.stock = stock_network(self.model).eval()
        edges = {"shortest_edge": min(picture.size), "longest_edge": max(picture.size)}
        self.processor = SIMImageProcessor(size=edges)
        # Its own rule stretches the picture to multiples of 32 instead of padding it: then the inputs would differ.
        self.stock_processor = Mask2FormerImageProcessor(
            size=edges, size_divisor=0, pad_size={"height": round_up(picture.height), "width": round_up(picture.width)}
        )
        self.num_queries = config.num_queries

    def ours(self) -> list[dict[str, Any]]:
        (result,) = predict_images(self.model, self.processor, [self.picture], threshold=0.0, max_instances=self.num_queries)
        return to_coco_results(1, result, range(NUM_CLASSES))

    @torch.inference_mode()
    def peer(self) -> list[dict[str, Any]]:
        inputs = self.stock_processor(self.picture, return_tensors="pt")
        outputs: Any = self.stock(**{name: value.to(self.device) for name, value in inputs.items()})
        if self.device != "cpu":
            logits = (outputs.class_queries_logits.cpu(), outputs.masks_queries_logits.cpu())
            outputs = SimpleNamespace(class_queries_logits=logits[0], masks_queries_logits=logits[1])
        (result,) = self.stock_processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=[(self.picture.height, self.picture.width)], return_binary_maps=True
        )
        infos = result["segments_info"]
        masks = result["segmentation"].numpy().astype(np.uint8)[: len(infos)]  # without instances it is one map of -1
        results = []
        for info, mask_HW in zip(infos, masks, strict=True):
            results.append(coco_result(info["label_id"], info["score"], encoded(mask_HW)))
        return results

    @torch.inference_mode()
    def is_equal(self) -> bool:
        """Same pixels; same logits where all of the input counts as picture (transformers' network does not leave the
        padding out everywhere)."""
        ours = self.processor(self.picture, return_tensors="pt")
        theirs = self.stock_processor(self.picture, return_tensors="pt")
        if not torch.allclose(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-3):
            return False
        if not torch.equal(ours["pixel_mask"], theirs["pixel_mask"]):
            return False
        with exact_convolutions():
            a, b = (network(pixel_values=ours["pixel_values"].to(self.device)) for network in (self.model, self.stock))
        return torch.allclose(a.class_queries_logits, b.class_queries_logits, atol=1e-3, rtol=1e-3) and torch.allclose(
            a.masks_queries_logits, b.masks_queries_logits, atol=1e-2, rtol=1e-3
        )


class PostProcessing:
    """Outputs as a trained network gives them: each query a blob of a usual size and one class that it is sure of."""

    def __init__(
        self,
        original_size: tuple[int, int],
        input_size: tuple[int, int],
        num_queries: int = 100,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.original_size, self.input_size = original_size, input_size
        self.padded_size = (round_up(input_size[0]), round_up(input_size[1]))
        self.processor = SIMImageProcessor()
        generator = torch.Generator().manual_seed(seed)
        stride = self.processor.mask_stride
        self.outputs: Any = SimpleNamespace(
            class_queries_logits=sure_class_logits(num_queries, generator)[None].to(device),
            masks_queries_logits=blob_logits(num_queries, self.padded_size, input_size, stride, generator)[None].to(device),
        )
        # The peer's last rows and columns read cells of the padding, too, ours only those of the picture: with the nearest
        # of these in the padding both must give the same.
        rows, columns = (math.ceil(side / stride) for side in input_size)
        self.outputs.masks_queries_logits[:, :, rows:] = self.outputs.masks_queries_logits[:, :, rows - 1 : rows]
        self.outputs.masks_queries_logits[..., columns:] = self.outputs.masks_queries_logits[..., columns - 1 : columns]

    @torch.inference_mode()
    def ours(self) -> list[dict[str, Any]]:
        (found,) = self.processor.post_process_crops(
            self.outputs,
            original_sizes=[self.original_size],
            input_sizes=[self.input_size],
            threshold=0.0,
            max_instances=len(self.outputs.masks_queries_logits[0]),
        )
        masks = CroppedMasks(found["crops"], found["corners"], self.original_size)
        return to_coco_results(1, {"scores": found["scores"], "labels": found["labels"], "masks": masks}, range(NUM_CLASSES))

    @torch.inference_mode()
    def peer(self) -> list[dict[str, Any]]:
        mask_logits_Qhw = self.outputs.masks_queries_logits[0]
        height, width = self.input_size
        rows, columns = (math.ceil(side / self.processor.mask_stride) for side in self.input_size)
        scores_QK = self.outputs.class_queries_logits[0].softmax(-1)[:, :-1]
        scores_QK = scores_QK * mask_scores(mask_logits_Qhw[:, :rows, :columns])[:, None]
        scores_N, index_N = scores_QK.flatten().topk(len(mask_logits_Qhw))
        logits_Nhw = mask_logits_Qhw[index_N // NUM_CLASSES]
        logits_NHW = interpolate(logits_Nhw[None], self.padded_size, mode="bilinear", align_corners=False)
        logits_NHW = logits_NHW[..., :height, :width]
        logits_NHW = interpolate(logits_NHW, self.original_size, mode="bilinear", align_corners=False)[0]
        masks_NHW = (logits_NHW > 0).cpu().numpy()
        labels = (index_N % NUM_CLASSES).tolist()
        return [
            coco_result(label, score, encoded(mask_HW))
            for label, score, mask_HW in zip(labels, scores_N.tolist(), masks_NHW, strict=True)
        ]

    def agreement(self) -> SimpleNamespace:
        """`is_equal` (same classes, same run lengths, scores to 1e-5) and a `note`."""
        ours, theirs = self.ours(), self.peer()
        if [result["category_id"] for result in ours] != [result["category_id"] for result in theirs]:
            return SimpleNamespace(is_equal=False, note="other classes")
        scores, their_scores = ([result["score"] for result in side] for side in (ours, theirs))
        same = [a["segmentation"] == b["segmentation"] for a, b in zip(ours, theirs, strict=True)]
        is_equal = all(same) and np.allclose(scores, their_scores, rtol=0, atol=1e-5)
        return SimpleNamespace(is_equal=is_equal, note=f"{sum(same)} of {len(same)} run lengths identical")


def sure_class_logits(num_queries: int, generator: torch.Generator) -> Tensor:
    """(Q, K + 1), the last for no object."""
    logits_QK = torch.randn(num_queries, NUM_CLASSES + 1, generator=generator)
    labels_Q = torch.randint(NUM_CLASSES, (num_queries,), generator=generator)
    logits_QK[torch.arange(num_queries), labels_Q] = 9 + 3 * torch.rand(num_queries, generator=generator)
    return logits_QK


def blob_logits(
    num_queries: int, padded_size: tuple[int, int], input_size: tuple[int, int], stride: int, generator: torch.Generator
) -> Tensor:
    """(Q, h, w): wavy ellipses whose sides are spread as COCO's, positive inside, steep over some cells, within -8 to 8."""
    height, width = (side // stride for side in padded_size)
    y_hw, x_hw = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    scale = max(input_size) / COCO_SIDE / stride
    blobs = []
    for query in range(num_queries):
        share, cell_y, cell_x, aspect, angle, phase = torch.rand(6, generator=generator).tolist()
        radius = max(object_side((query + 0.5) / num_queries, share) * scale / 2, 1.5)
        aspect = 0.6 + 0.8 * aspect
        dy_hw, dx_hw = y_hw - cell_y * input_size[0] / stride, x_hw - cell_x * input_size[1] / stride
        cosine, sine = math.cos(math.pi * angle), math.sin(math.pi * angle)
        along_hw, across_hw = (cosine * dx_hw + sine * dy_hw) * aspect, (cosine * dy_hw - sine * dx_hw) / aspect
        wave_hw = 1 + 0.15 * torch.sin(3 * torch.atan2(across_hw, along_hw) + 2 * math.pi * phase)
        blobs.append(2 * (radius * wave_hw - torch.hypot(along_hw, across_hw)))
    return torch.stack(blobs).clamp_(-8, 8)


def object_side(place: float, share: float) -> float:
    """A side in pixels. place: which of COCO's three sizes, 0 to 1; share: where between its bounds, on a log scale."""
    for fraction, low, high in COCO_SIZES:
        if place < fraction:
            return low * (high / low) ** share
        place -= fraction
    return COCO_SIZES[-1][2]


def mask_scores(mask_logits_Qhw: Tensor) -> Tensor:
    """Mean mask probability inside each mask (Mask2Former's), on the mask grid."""
    inside_Qhw = mask_logits_Qhw > 0
    return (mask_logits_Qhw.sigmoid() * inside_Qhw).sum((1, 2)) / (inside_Qhw.sum((1, 2)) + 1e-6)


def coco_result(category_id: int, score: float, run_lengths: dict[str, Any]) -> dict[str, Any]:
    box = coco_mask.toBbox(run_lengths).tolist()
    return {"image_id": 1, "category_id": category_id, "score": score, "segmentation": run_lengths, "bbox": box}


def encoded(mask_HW: np.ndarray) -> dict[str, Any]:
    """Run lengths as the documentation of pycocotools makes them, with text for JSON."""
    run_lengths = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": list(run_lengths["size"]), "counts": run_lengths["counts"].decode("ascii")}
