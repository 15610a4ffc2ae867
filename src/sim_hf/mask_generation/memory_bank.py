"""The memory bank of past images with their pseudo masks, which copy-paste draws from (SIM, Sec. 3.4, Eq. 9).

An entry is one past image, reduced to what pasting needs: per instance the crop of the image (uint8), the crop of the mask
(one bit a pixel), class and score, on the CPU. This is an order of magnitude smaller than keeping images and masks.

Shape letters: B images, G instances of the batch, 3 channels, H and W rows and columns (of the input, the mask grid or a crop).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sim_hf.structures import InstanceTargets, PseudoMasks

REAL_MASK_SCORE = 1.0
_STATE_KEYS = ("image_keys", "instances_per_image", "class_labels", "scores", "corners", "sizes", "pixels", "packed_masks")


@dataclass(frozen=True)
class BankInstance:
    """One object of a past image: `pixels_3HW` uint8 RGB and `packed_mask` (bits, row by row) of its tight box, whose top
    left corner was at (left, top) of the padded input."""

    pixels_3HW: Tensor
    packed_mask: Tensor
    class_label: int
    score: float
    left: int
    top: int

    @property
    def mask_HW(self) -> Tensor:  # noqa: N802
        """The mask of the crop, bool."""
        height, width = self.pixels_3HW.shape[-2:]
        bits = np.unpackbits(self.packed_mask.numpy(), count=height * width)
        return torch.from_numpy(bits.reshape(height, width).astype(bool))

    @property
    def num_bytes(self) -> int:
        return self.pixels_3HW.numel() + self.packed_mask.numel()


@dataclass(frozen=True)
class _BankImage:
    image_key: int
    instances: tuple[BankInstance, ...]

    @property
    def num_bytes(self) -> int:
        return sum(instance.num_bytes for instance in self.instances)


class MemoryBank:
    """First in, first out bank of up to `capacity` past images, bounded in bytes too (SIM, Sec. 3.4; the paper keeps 100).

    `remember` stages, `commit` makes visible: all micro-batches of an optimiser step draw from the same bank. An image that
    is seen again replaces its older entry, since its masks have become better meanwhile.
    """

    def __init__(
        self,
        capacity: int = 100,
        max_bytes: int = 256 * 2**20,
        *,
        min_score: float = 0.5,
        min_pixels: int = 64,
        mask_threshold: float = 0.5,
    ) -> None:
        if capacity < 1 or max_bytes < 1:
            raise ValueError(f"capacity and max_bytes must be at least 1, got {capacity} and {max_bytes}")
        if min_score < 0:
            raise ValueError(f"min_score must not be negative, since instances are drawn by score, got {min_score}")
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.min_score = min_score
        self.min_pixels = max(min_pixels, 1)
        self.mask_threshold = mask_threshold
        self._images: dict[int, _BankImage] = {}  # a dict keeps the order of insertion: the first is the oldest
        self._staged: list[_BankImage] = []
        self._num_bytes = 0

    def __len__(self) -> int:
        """Number of images that can be drawn (staged ones do not count)."""
        return len(self._images)

    @property
    def num_bytes(self) -> int:
        """Bytes of pixels and masks of the images that can be drawn."""
        return self._num_bytes

    @property
    def image_keys(self) -> list[int]:
        """Keys of the images that can be drawn, the oldest first."""
        return list(self._images)

    @torch.no_grad()
    def remember(
        self,
        images_BCHW: Tensor,
        targets: InstanceTargets,
        pseudo: PseudoMasks | None,
        *,
        image_keys: Sequence[int],
        pixel_mask_BHW: Tensor | None = None,
    ) -> None:
        """Stage the instances of a micro-batch that were not pasted themselves and have a usable mask.

        images_BCHW: RGB, float in 0..1 or uint8. A real mask (`targets.has_mask_G`) is preferred to the pseudo mask;
        `pseudo` may be None when there are only real ones. image_keys: a number per image of the batch, which says the order
        of entries, whatever the split into micro-batches and ranks. pixel_mask_BHW: masks do not reach into the padding.
        """
        if len(image_keys) != targets.num_images or len(images_BCHW) != targets.num_images:
            raise ValueError(f"expected {targets.num_images} images and image keys, got {len(images_BCHW)} and {len(image_keys)}")
        usable_G = targets.has_mask_G & ~targets.is_pasted_G
        if pseudo is not None:
            usable_G = usable_G | ((pseudo.scores_G > self.min_score) & ~targets.is_pasted_G)
        rows = usable_G.nonzero()[:, 0]
        if len(rows) == 0:
            return
        chosen = targets.select(rows)
        scores = [REAL_MASK_SCORE] * len(rows) if pseudo is None else pseudo.scores_G[rows].tolist()
        probabilities_GHW = None if pseudo is None else pseudo.probabilities_GHW[rows].float().cpu()
        has_mask_G = chosen.has_mask_G.tolist()
        # Pasted objects alone give a batch masks of input size, of which none is stored: they stay where they are.
        real_masks_GHW = chosen.masks_GHW.cpu() if chosen.masks_GHW is not None and any(has_mask_G) else None
        # One transfer of bytes from a device; on the CPU only the crops are converted.
        images_BCHW = images_BCHW if images_BCHW.device.type == "cpu" else _to_uint8(images_BCHW).cpu()
        sizes = [targets.input_size] * targets.num_images if pixel_mask_BHW is None else valid_sizes(pixel_mask_BHW)
        found: dict[int, list[BankInstance]] = {}
        records = zip(chosen.boxes_G4.tolist(), chosen.image_ids_G.tolist(), has_mask_G, strict=True)
        labels = chosen.class_labels_G.tolist()
        for g, (box, image_id, has_mask) in enumerate(records):
            crop = _pixel_box(box, *sizes[image_id])
            if has_mask and real_masks_GHW is not None:
                mask_HW, score = real_masks_GHW[g, crop[1] : crop[3], crop[0] : crop[2]], REAL_MASK_SCORE
            elif probabilities_GHW is not None:
                mask_HW = _crop_upsampled(probabilities_GHW[g], box, crop, targets.input_size) > self.mask_threshold
                score = scores[g]
            else:
                raise ValueError("targets say that an instance has a real mask (has_mask_G), but masks_GHW is None")
            instance = self._make_instance(images_BCHW[image_id], mask_HW, crop, labels[g], score)
            if instance is not None:
                found.setdefault(image_id, []).append(instance)
        self._staged.extend(_BankImage(int(image_keys[i]), tuple(instances)) for i, instances in found.items())

    def commit(self) -> None:
        """Make what was staged visible; once per optimiser step, on every rank (a collective, also with nothing staged).

        Entries of all ranks are added in the order of their keys, so every rank holds the same bank.
        """
        for image in sorted(_gather_across_ranks(self._staged), key=lambda image: image.image_key):
            self._add(image)
        self._staged = []

    def discard(self) -> None:
        """Forget what was staged: the optimiser step was skipped."""
        self._staged = []

    def draw(
        self, generator: torch.Generator, *, share: float = 0.25, min_instances: int = 1, max_instances: int = 3
    ) -> list[BankInstance]:
        """One image of the bank, and of its instances `share`, but 1 to 3, by score and without replacement (SIM, Sec. 3.4).

        Empty when the bank is. The paper's numbers are the defaults; `generator` lives on the CPU.
        """
        if not self._images:
            return []
        row = int(torch.randint(len(self._images), (), generator=generator))
        instances = list(self._images.values())[row].instances
        wanted = min(max(int(len(instances) * share), min_instances), max_instances, len(instances))
        scores = torch.tensor([instance.score for instance in instances], dtype=torch.float64)
        return [instances[i] for i in torch.multinomial(scores, wanted, generator=generator).tolist()]

    def state_dict(self) -> dict[str, Tensor]:
        """What can be drawn, as eight plain tensors (staged entries belong to an unfinished step and are left out)."""
        images = list(self._images.values())
        instances = [instance for image in images for instance in image.instances]
        no_bytes = [torch.zeros(0, dtype=torch.uint8)]
        return {
            "image_keys": torch.tensor([image.image_key for image in images], dtype=torch.int64),
            "instances_per_image": torch.tensor([len(image.instances) for image in images], dtype=torch.int64),
            "class_labels": torch.tensor([instance.class_label for instance in instances], dtype=torch.int64),
            "scores": torch.tensor([instance.score for instance in instances], dtype=torch.float64),
            "corners": torch.tensor([(i.left, i.top) for i in instances], dtype=torch.int64).reshape(-1, 2),
            "sizes": torch.tensor([i.pixels_3HW.shape[1:] for i in instances], dtype=torch.int64).reshape(-1, 2),
            "pixels": torch.cat([instance.pixels_3HW.flatten() for instance in instances] or no_bytes),
            "packed_masks": torch.cat([instance.packed_mask for instance in instances] or no_bytes),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by that of `state_dict()`; staged entries are forgotten."""
        if set(state) != set(_STATE_KEYS):
            raise ValueError(f"the memory bank's state has {sorted(state)}, expected {sorted(_STATE_KEYS)}")
        state = {key: value.cpu() for key, value in state.items()}
        sizes = state["sizes"].tolist()
        pixel_counts = [3 * height * width for height, width in sizes]
        mask_counts = [-(-height * width // 8) for height, width in sizes]
        counts = state["instances_per_image"].tolist()
        found = (len(state["pixels"]), len(state["packed_masks"]), len(sizes), len(state["image_keys"]))
        expected = (sum(pixel_counts), sum(mask_counts), sum(counts), len(counts))
        if found != expected:
            raise ValueError(f"the memory bank's state holds {found} pixels, mask bytes, instances, images; not {expected}")
        columns = zip(
            state["pixels"].split(pixel_counts) if sizes else (),
            state["packed_masks"].split(mask_counts) if sizes else (),
            sizes,
            state["class_labels"].tolist(),
            state["scores"].tolist(),
            state["corners"].tolist(),
            strict=True,
        )
        instances = iter(
            # clone: an entry must not keep the bytes of all others alive
            BankInstance(pixels.reshape(3, *size).clone(), packed.clone(), label, score, left, top)
            for pixels, packed, size, label, score, (left, top) in columns
        )
        self._images, self._staged, self._num_bytes = {}, [], 0
        for image_key, count in zip(state["image_keys"].tolist(), counts, strict=True):
            self._add(_BankImage(image_key, tuple(next(instances) for _ in range(count))))

    def _make_instance(
        self, image_3HW: Tensor, mask_HW: Tensor, crop: tuple[int, int, int, int], class_label: int, score: float
    ) -> BankInstance | None:
        """Cut the tight box of the mask out of the image; None when the mask has too few pixels."""
        if int(mask_HW.sum()) < self.min_pixels:
            return None
        rows, columns = mask_HW.any(1).nonzero()[:, 0], mask_HW.any(0).nonzero()[:, 0]
        y1, y2, x1, x2 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        left, top = crop[0] + x1, crop[1] + y1
        pixels_3HW = image_3HW[:, top : top + y2 - y1, left : left + x2 - x1]
        packed_mask = torch.from_numpy(np.packbits(mask_HW[y1:y2, x1:x2].numpy()))
        # clone: a view would keep the whole batch alive
        return BankInstance(_to_uint8(pixels_3HW).clone(), packed_mask, class_label, score, left, top)

    def _add(self, image: _BankImage) -> None:
        replaced = self._images.pop(image.image_key, None)
        self._num_bytes -= 0 if replaced is None else replaced.num_bytes
        self._images[image.image_key] = image
        self._num_bytes += image.num_bytes
        while len(self._images) > self.capacity or self._num_bytes > self.max_bytes:
            oldest = self._images.pop(next(iter(self._images)))
            self._num_bytes -= oldest.num_bytes


def _to_uint8(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images must be float in 0..1 or uint8, got {images.dtype}")
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def valid_sizes(pixel_mask_BHW: Tensor) -> list[tuple[int, int]]:
    """(height, width) of each image without its padding, which is at the bottom and at the right."""
    sizes_B2 = torch.stack([pixel_mask_BHW[:, :, 0].bool().sum(1), pixel_mask_BHW[:, 0].bool().sum(1)], -1)
    return [(height, width) for height, width in sizes_B2.tolist()]


def _pixel_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """The pixels that belong to a box, by the rule of `rasterize_boxes`: those whose centre does -> x1, y1, x2, y2."""
    x1, y1 = max(round(box[0]), 0), max(round(box[1]), 0)
    return x1, y1, max(min(round(box[2]), width), x1), max(min(round(box[3]), height), y1)


def _crop_upsampled(
    probabilities_HW: Tensor, box: Sequence[float], crop: tuple[int, int, int, int], input_size: tuple[int, int]
) -> Tensor:
    """The map inside a box, bilinearly upsampled to the pixels of `crop` (x1, y1, x2, y2; the box in whole pixels).

    Only cells of the box itself are asked, its border cells are continued outwards: maps are zero outside of their box, which
    would gnaw at the border of every mask that reaches it.
    """
    height, width = probabilities_HW.shape
    stride = input_size[0] // height
    if (height * stride, width * stride) != tuple(input_size):
        raise ValueError(f"mask grid {(height, width)} is not the input {tuple(input_size)} divided by a whole stride")
    x1, y1, x2, y2 = crop
    top, bottom = _cells(box[1], box[3], height, stride)
    left, right = _cells(box[0], box[2], width, stride)
    window_11HW = F.pad(probabilities_HW[None, None, top:bottom, left:right], (1, 1, 1, 1), mode="replicate")
    pixels_HW = F.interpolate(window_11HW, scale_factor=stride, mode="bilinear", align_corners=False)[0, 0]
    y0, x0 = (top - 1) * stride, (left - 1) * stride
    return pixels_HW[y1 - y0 : y2 - y0, x1 - x0 : x2 - x0]


def _cells(low: float, high: float, length: int, stride: int) -> tuple[int, int]:
    """First cell and the one after the last, by the rule of `rasterize_boxes`: at least one."""
    first, last = round(low / stride), round(high / stride)
    if last <= first:
        first = math.floor((low + high) / (2 * stride))
    first = min(max(first, 0), length - 1)
    return first, max(min(last, length), first + 1)


def _gather_across_ranks(images: list[_BankImage]) -> list[_BankImage]:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return images
    gathered: list[list[_BankImage]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, images)
    return [image for of_rank in gathered for image in of_rank]
