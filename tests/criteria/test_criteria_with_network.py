"""Every supervision on a real, tiny network: one step, gradients everywhere."""

import pytest
import torch
from synthetic_outputs import make_images, make_targets

from factories import tiny_config
from sim_hf.criteria.build import MASK_CRITERIA, build_criterion
from sim_hf.criteria.set_criterion import StepNormalizers
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.arguments import SupervisionArguments
from sim_hf.training.box_prompts import prompt_boxes

INPUT = (32, 64)


@pytest.mark.parametrize("supervision", sorted(MASK_CRITERIA))
@pytest.mark.parametrize("num_instances", [0, 2])
def test_one_step_gives_finite_losses_and_a_gradient_for_every_weight(supervision, num_instances):
    network = SIMForInstanceSegmentation(tiny_config()).train()
    images, pixel_mask = make_images(2)
    images, pixel_mask = (torch.nn.functional.pad(t, (0, INPUT[1] - t.shape[-1])) for t in (images, pixel_mask))
    boxes = [[4, 4, 20, 24], [8, 0, 28, 16]][:num_instances]
    targets = make_targets(boxes, [0, 1][:num_instances], [0, 1][:num_instances], num_images=2)
    targets.input_size = INPUT
    if supervision == "full":
        targets.masks_GHW = torch.zeros(num_instances, *INPUT, dtype=torch.bool)
        targets.masks_GHW[:, 5:15, 9:19] = True
        targets.has_mask_G = torch.ones(num_instances, dtype=torch.bool)
    arguments = SupervisionArguments(supervision=supervision, pseudo_start=0)
    criterion = build_criterion(arguments, network.config, steps=lambda length: round(100 * length))
    asked = {"prompt_boxes": prompt_boxes(targets.boxes_G4, targets), "output_auxiliary_logits": True}
    output = network(pixel_values=images - 0.5, pixel_mask=pixel_mask, **asked)
    with torch.no_grad():
        teacher = network(pixel_values=images - 0.5, pixel_mask=pixel_mask, **asked)
    normalizers = StepNormalizers.from_counts(*criterion.counts(targets))
    result = criterion(output, teacher, targets, images, pixel_mask, normalizers=normalizers, global_step=500)
    assert all(loss.isfinite() for loss in result.losses.values())
    result.total.backward()
    missing = [name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
    assert missing == []
