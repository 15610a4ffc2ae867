"""The boxes that a network is prompted with in training: the annotated ones, for the student a little off.

Shape letters: B images, P prompts an image, G instances of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sim_hf.mask_generation.copy_paste import step_generator
from sim_hf.structures import InstanceTargets

MAX_PROMPTS = 100  # of one image; further instances are learned by the matched queries alone


def prompt_boxes(boxes_G4: Tensor, targets: InstanceTargets) -> Tensor:
    """The boxes as prompts: prompt p of an image is its p-th instance -> (B, P, 4), P at least 1, zeros where there is none."""
    rank_G = targets.rank_in_image()
    kept_G = rank_G < MAX_PROMPTS
    num_prompts = int(rank_G[kept_G].max()) + 1 if len(targets) else 1
    prompts_BP4 = boxes_G4.new_zeros(targets.num_images, num_prompts, 4)
    prompts_BP4[targets.image_ids_G[kept_G], rank_G[kept_G]] = boxes_G4[kept_G]
    return prompts_BP4


def jittered_boxes(targets: InstanceTargets, *, amount: float, seed: int, step: int, image_keys: Sequence[int]) -> Tensor:
    """Every side of a box moved by up to `amount` of the box's extent -> (G, 4).

    People's boxes are never exact, so a prompt must find the object's own border. What happens to an image depends on
    (seed, step, its key) only.
    """
    noise_G4 = torch.zeros(len(targets), 4)
    image_ids_G = targets.image_ids_G.cpu()
    for image, key in enumerate(image_keys):
        rows = (image_ids_G == image).nonzero()[:, 0]
        generator = step_generator(seed, step, key, purpose="box prompts")
        noise_G4[rows] = torch.rand(len(rows), 4, generator=generator) * 2 - 1
    extent_G4 = (targets.boxes_G4[:, 2:] - targets.boxes_G4[:, :2]).repeat(1, 2)
    return targets.boxes_G4 + amount * noise_G4.to(extent_G4.device) * extent_G4
