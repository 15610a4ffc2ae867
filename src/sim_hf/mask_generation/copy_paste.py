"""Copy-paste of objects with pseudo masks from the memory bank into the batch (SIM, Sec. 3.4, Eq. 9).

All geometry is done on crops and on the CPU, where the bank lives; the batch's device only sees the writes.

Shape letters: B images, C channels, G instances of the batch, H and W rows and columns (of the input, or of a crop).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sim_hf.mask_generation.memory_bank import BankInstance, MemoryBank, valid_sizes
from sim_hf.structures import InstanceTargets, mask_boxes


@dataclass
class _Paste:
    """An object at its place: `mask_HW` holds its visible pixels (what no other pasted object covers)."""

    pixels_3HW: Tensor
    mask_HW: Tensor
    top: int
    left: int
    class_label: int

    @property
    def region(self) -> tuple[slice, slice]:
        height, width = self.mask_HW.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


@torch.no_grad()
def copy_paste(
    images_BCHW: Tensor,
    pixel_mask_BHW: Tensor,
    targets: InstanceTargets,
    bank: MemoryBank,
    *,
    seed: int,
    step: int,
    image_keys: Sequence[int],
    probability: float = 0.5,
    scale_range: tuple[float, float] = (0.7, 1.3),
    flip_probability: float = 0.5,
    min_visible: float = 0.25,
) -> tuple[Tensor, InstanceTargets]:
    """Paste objects of the bank into images of the batch (SIM, Eq. 9) -> new images and targets; the inputs stay as they are.

    images_BCHW: RGB float in 0..1 (the caller denormalises before and normalises after). image_keys: a number per image; what
    happens to an image depends on (seed, step, its key) and the bank only, never on the split into micro-batches or ranks.
    A pasted object lies wholly inside the valid area and gets its exact mask, the tight box of that, and `is_pasted`.

    Objects below: real and pasted masks lose the hidden pixels and their boxes follow; an object with a box only gets the
    tight box of the visible part of its rectangle. Fully hidden objects are dropped, and so are boxes (and pasted objects
    under other pasted ones) of which less than `min_visible` is left. Where nothing is pasted, the inputs are returned.
    """
    num_images = targets.num_images
    if not (len(images_BCHW) == len(pixel_mask_BHW) == len(image_keys) == num_images):
        raise ValueError(
            f"expected {num_images} images, pixel masks and image keys, "
            f"got {len(images_BCHW)}, {len(pixel_mask_BHW)} and {len(image_keys)}"
        )
    if not images_BCHW.is_floating_point():
        raise ValueError(f"images must be float in 0..1, got {images_BCHW.dtype}")
    if len(bank) == 0:
        return images_BCHW, targets
    generators = [step_generator(seed, step, key) for key in image_keys]
    chosen = [i for i, generator in enumerate(generators) if _uniform(generator) < probability]
    if not chosen:
        return images_BCHW, targets
    areas = valid_sizes(pixel_mask_BHW)
    pastes: dict[int, list[_Paste]] = {}
    for i in chosen:
        drawn = bank.draw(generators[i])
        placed = [_place(instance, areas[i], generators[i], scale_range, flip_probability) for instance in drawn]
        if visible := _drop_covered([paste for paste in placed if paste is not None], areas[i], min_visible):
            pastes[i] = visible
    if not pastes:
        return images_BCHW, targets
    return _paint(images_BCHW, pastes), _update_targets(targets, pastes, min_visible)


def step_generator(seed: int, step: int, image_key: int, *, purpose: str = "") -> torch.Generator:
    """The random numbers of one image in one step, for one purpose; hashed, because neighbouring seeds give related numbers."""
    digest = hashlib.blake2b(f"{int(seed)}/{int(step)}/{int(image_key)}{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _place(
    instance: BankInstance,
    area: tuple[int, int],
    generator: torch.Generator,
    scale_range: tuple[float, float],
    flip_probability: float,
) -> _Paste | None:
    """Flip, scale and move an object at random; it is shrunk where it would not fit. None when nothing of it is left."""
    pixels_3HW, mask_HW = instance.pixels_3HW, instance.mask_HW
    height, width = mask_HW.shape
    flip = _uniform(generator) < flip_probability
    scale = min(_uniform(generator, *scale_range), area[0] / height, area[1] / width)
    size = (max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))
    size = (min(size[0], area[0]), min(size[1], area[1]))
    top = int(_uniform(generator) * (area[0] - size[0] + 1))
    left = int(_uniform(generator) * (area[1] - size[1] + 1))
    if 0 in size:
        return None
    if flip:
        pixels_3HW, mask_HW = pixels_3HW.flip(-1), mask_HW.flip(-1)
    pixels_3HW = pixels_3HW.float() / 255
    if size != (height, width):
        stacked_14HW = torch.cat([pixels_3HW, mask_HW[None].float()])[None]
        resized_4HW = F.interpolate(stacked_14HW, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
        pixels_3HW, mask_HW = resized_4HW[:3].clamp(0, 1), resized_4HW[3] >= 0.5
    return _Paste(pixels_3HW, mask_HW, top, left, instance.class_label) if mask_HW.any() else None


def _drop_covered(pastes: list[_Paste], area: tuple[int, int], min_visible: float) -> list[_Paste]:
    """Let earlier objects cover later ones; objects that are covered too much are not pasted at all."""
    covered_HW = torch.zeros(area, dtype=torch.bool)
    visible: list[_Paste] = []
    for paste in pastes:
        num_pixels = int(paste.mask_HW.sum())
        paste.mask_HW = paste.mask_HW & ~covered_HW[paste.region]
        num_visible = int(paste.mask_HW.sum())
        if num_visible > 0 and num_visible >= min_visible * num_pixels:
            covered_HW[paste.region] |= paste.mask_HW
            visible.append(paste)
    return visible


def _paint(images_BCHW: Tensor, pastes: dict[int, list[_Paste]]) -> Tensor:
    images_BCHW = images_BCHW.clone()
    for i, of_image in pastes.items():
        for paste in of_image:
            region_CHW = images_BCHW[i][:, *paste.region]
            region_CHW.copy_(torch.where(paste.mask_HW.to(region_CHW.device), paste.pixels_3HW.to(region_CHW), region_CHW))
    return images_BCHW


def _update_targets(targets: InstanceTargets, pastes: dict[int, list[_Paste]], min_visible: float) -> InstanceTargets:
    """Originals without their hidden parts, and the pasted objects; the instances of an image stay together."""
    device = targets.boxes_G4.device
    boxes_G4, masks_GHW, keep_G = _hide(targets, pastes, min_visible)
    new = [(i, paste) for i, of_image in pastes.items() for paste in of_image]
    num_kept = int(keep_G.sum())
    kept = targets.select(keep_G.to(device))
    new_boxes_G4 = torch.cat([_paste_box(paste) for _, paste in new]).to(device)
    new_labels_G = torch.tensor([paste.class_label for _, paste in new], device=device)
    image_ids_G = torch.cat([kept.image_ids_G, torch.tensor([i for i, _ in new], device=device)])
    order_G = image_ids_G.argsort(stable=True)
    places = order_G.argsort().tolist()  # row of the result, for each kept and then each new instance
    result_GHW = torch.zeros(len(places), *targets.input_size, dtype=torch.bool, device=device)
    if masks_GHW is not None:
        result_GHW[places[:num_kept]] = masks_GHW[keep_G.to(device)]
    for place, (_, paste) in zip(places[num_kept:], new, strict=True):
        result_GHW[place][paste.region] = paste.mask_HW.to(device)
    is_new_G = torch.ones(len(new), dtype=torch.bool, device=device)
    return InstanceTargets(
        boxes_G4=torch.cat([boxes_G4[keep_G].to(device), new_boxes_G4])[order_G],
        class_labels_G=torch.cat([kept.class_labels_G, new_labels_G])[order_G],
        image_ids_G=image_ids_G[order_G],
        input_size=targets.input_size,
        num_images=targets.num_images,
        masks_GHW=result_GHW,
        has_mask_G=torch.cat([kept.has_mask_G, ~is_new_G])[order_G],
        is_pasted_G=torch.cat([kept.is_pasted_G, is_new_G])[order_G],
    )


def _paste_box(paste: _Paste) -> Tensor:
    offset_4 = torch.tensor([paste.left, paste.top, paste.left, paste.top])
    return mask_boxes(paste.mask_HW[None]) + offset_4


def _hide(targets: InstanceTargets, pastes: dict[int, list[_Paste]], min_visible: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Take the pasted pixels away from the originals -> boxes (on the CPU), masks (if there are any) and which to keep (CPU)."""
    boxes_G4 = targets.boxes_G4.cpu().clone()
    masks_GHW = None if targets.masks_GHW is None else targets.masks_GHW.clone()
    keep_G = torch.ones(len(targets), dtype=torch.bool)
    image_ids_G = targets.image_ids_G.cpu()
    with_mask_G = (targets.has_mask_G | targets.is_pasted_G).cpu()
    for i, of_image in pastes.items():
        hidden_HW = torch.zeros(targets.input_size, dtype=torch.bool)
        for paste in of_image:
            hidden_HW[paste.region] |= paste.mask_HW
        for g in ((image_ids_G == i) & ~with_mask_G).nonzero()[:, 0].tolist():
            box = _visible_box(boxes_G4[g].tolist(), hidden_HW, min_visible)
            keep_G[g] = box is not None
            if box is not None:
                boxes_G4[g] = torch.tensor(box)
        rows = ((image_ids_G == i) & with_mask_G).nonzero()[:, 0]
        if masks_GHW is None or len(rows) == 0:
            continue
        before_GHW = masks_GHW[rows.to(masks_GHW.device)]
        after_GHW = before_GHW & ~hidden_HW.to(masks_GHW.device)
        masks_GHW[rows.to(masks_GHW.device)] = after_GHW
        touched_G = (after_GHW != before_GHW).flatten(1).any(1).cpu()
        # An untouched mask keeps the annotated box, which may be finer than pixels.
        boxes_G4[rows] = torch.where(touched_G[:, None], mask_boxes(after_GHW).cpu(), boxes_G4[rows])
        keep_G[rows] = ~touched_G | after_GHW.flatten(1).any(1).cpu()
    return boxes_G4, masks_GHW, keep_G


def _visible_box(box: list[float], hidden_HW: Tensor, min_visible: float) -> list[float] | None:
    """Tight box of a rectangle without its hidden pixels; sides that are not cut keep their fraction of a pixel.

    None when less than `min_visible` of the rectangle, or nothing, is left.
    """
    height, width = hidden_HW.shape
    left, top = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    visible_HW = ~hidden_HW[top : max(round(box[3]), top + 1), left : max(round(box[2]), left + 1)]
    num_visible = int(visible_HW.sum())
    if num_visible == visible_HW.numel():
        return box
    if num_visible == 0 or num_visible < min_visible * visible_HW.numel():
        return None
    rows, columns = visible_HW.any(1).nonzero()[:, 0], visible_HW.any(0).nonzero()[:, 0]
    x1, y1, x2, y2 = box
    return [
        left + float(columns[0]) if columns[0] > 0 else x1,
        top + float(rows[0]) if rows[0] > 0 else y1,
        left + float(columns[-1]) + 1 if columns[-1] < visible_HW.shape[1] - 1 else x2,
        top + float(rows[-1]) + 1 if rows[-1] < visible_HW.shape[0] - 1 else y2,
    ]
