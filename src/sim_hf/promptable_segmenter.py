"""Masks of boxes from a promptable segmenter of transformers (SAM, SAM 2, SAM-HQ): the comparison a practitioner makes.

Such a network has learned from a billion masks, ours from the boxes of a data set: as a labeller it is the baseline, as the
labeller of training images (`--label_model`) a teacher from outside. It is asked for one mask per box, as its authors advise
for prompts that say what is meant (Segment Anything, arXiv 2304.02643, Sec. 3); the class is not its business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskGeneration, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES

from sim_hf.label_views import pixel_region
from sim_hf.labeling import BoxMasks


class UnavailableError(OSError):
    """Neither a folder nor an id whose weights can be had here."""


def is_promptable(name: str) -> bool:
    """Whether the folder or Hub id holds a promptable segmenter. Raises `UnavailableError` where nobody can tell."""
    try:
        return AutoConfig.from_pretrained(name).model_type in MODEL_FOR_MASK_GENERATION_MAPPING_NAMES
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{name} is no model folder and cannot be loaded from the Hub: {error}") from error


class PromptableSegmenter:
    """A network of transformers' mask-generation classes and its processor, asked for the masks of boxes."""

    def __init__(self, model: nn.Module, processor, boxes_at_a_time: int = 64) -> None:
        self.model = model.eval()
        self.processor = processor
        self.boxes_at_a_time = boxes_at_a_time

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device | str = "cpu") -> PromptableSegmenter:
        """From a folder or a Hub id, in float32. Raises `UnavailableError` where it cannot be loaded, ValueError for another
        kind of model."""
        if not is_promptable(name):
            raise ValueError(f"{name} is no promptable segmenter of transformers (SAM, SAM 2, ...): it takes no boxes as prompts")
        try:
            model = AutoModelForMaskGeneration.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
            processor = AutoProcessor.from_pretrained(name)
        except OSError as error:
            raise UnavailableError(f"the weights of {name} cannot be had here: {error}") from error
        return cls(model.to(device), processor)

    @torch.inference_mode()
    def masks_for_boxes(self, picture: Image.Image, boxes_n4: Tensor, labels_n: Sequence[int | None] = ()) -> BoxMasks:
        """One mask per box, cut to the box. boxes_n4: xyxy pixels of `picture` (RGB); the labels are not looked at. The
        confidence is the network's own estimate of the mask's IoU."""
        boxes_n4 = boxes_n4.float().cpu().reshape(-1, 4)
        crops: list[Tensor] = []
        confidence: list[Tensor] = [torch.zeros(0)]
        regions = [pixel_region(box_4, picture.height, picture.width) for box_4 in boxes_n4]
        for start in range(0, len(boxes_n4), self.boxes_at_a_time):
            masks_nHW, iou_n = self._ask(picture, boxes_n4[start : start + self.boxes_at_a_time])
            for mask_HW, (left, top, right, bottom) in zip(masks_nHW, regions[start:], strict=False):
                crops.append(mask_HW[top:bottom, left:right].clone())
            confidence.append(iou_n)
        return BoxMasks(
            crops=crops,
            corners=[region[:2] for region in regions],
            size=(picture.height, picture.width),
            confidence_n=torch.cat(confidence),
        )

    def _ask(self, picture: Image.Image, boxes_n4: Tensor) -> tuple[Tensor, Tensor]:
        """-> masks (n, H, W) bool and estimated IoUs (n,) in 0..1."""
        inputs = self.processor(images=picture, input_boxes=[boxes_n4.tolist()], return_tensors="pt")
        outputs = self.model(
            pixel_values=inputs["pixel_values"].to(self.model.device),
            input_boxes=inputs["input_boxes"].to(self.model.device, torch.float32),
            multimask_output=False,
        )
        # SAM's processor has to be told how large the picture was without its padding, SAM 2's pads nothing.
        sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        masks_n1HW = self.processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)[0]
        return masks_n1HW[:, 0].bool(), outputs.iou_scores[0, :, 0].float().cpu().clamp(0, 1)
