"""Pseudo masks against the real masks of training images: a measurement that teaches nothing."""

import pytest
import torch

from factories import make_step, prime, tiny_model, tiny_processor, write_shapes
from sim_hf.data import load_coco
from sim_hf.training.pseudo_quality import generated_mask_quality, pseudo_mask_quality


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = write_shapes(tmp_path_factory.mktemp("shapes"), empty=(2,))
    return load_coco(folder / "images", folder / "instances_train.json", with_masks=True)


def test_pseudo_masks_stand_beside_filled_boxes_and_nothing_is_learnt(rows):
    step = prime(make_step(tiny_model()))
    before = step.prototype_bank.prototypes_KLC.clone()
    quality = pseudo_mask_quality(step, rows, tiny_processor(), limit=6, batch_size=4)
    step.prototype_bank.commit()
    assert step.training and torch.equal(step.prototype_bank.prototypes_KLC, before)
    assert 0 <= quality["pseudo_mask_iou"] <= 1 and 0 <= quality["share_improved"] <= 1
    # Of a rectangle the box is the mask, of the ellipses an octagon of 0.745 of it (less or more by the cells of the grid).
    assert 0.7 < quality["filled_box_iou"] < 1
    assert quality["instances"] == sum(len(rows[i]["objects"]["bbox"]) for i in range(6))


def test_a_supervision_without_pseudo_masks_gives_nothing(rows):
    assert pseudo_mask_quality(make_step(tiny_model(), "boxinst"), rows, tiny_processor(), limit=2) == {}


def test_generated_masks_count_as_what_they_are_and_missing_ones_as_boxes(rows):
    real = [list(row["objects"]["segmentation"]) for row in rows]
    perfect = generated_mask_quality(rows, real, limit=6)
    assert perfect["pseudo_mask_iou"] == 1.0 and perfect["instances"] == sum(len(masks) for masks in real[:6])
    boxes = generated_mask_quality(rows, [[""] * len(masks) for masks in real], limit=6)
    assert boxes["pseudo_mask_iou"] == boxes["filled_box_iou"] == perfect["filled_box_iou"] < 1
    assert boxes["share_improved"] == 0


@pytest.mark.gpu
def test_it_measures_the_same_on_the_gpu(rows):
    on_cpu = pseudo_mask_quality(prime(make_step(tiny_model())), rows, tiny_processor(), limit=6)
    step = prime(make_step(tiny_model())).to("cuda")
    step.teacher.model.to("cuda")
    on_gpu = pseudo_mask_quality(step, rows, tiny_processor(), limit=6)
    assert on_gpu == pytest.approx(on_cpu, abs=0.02)
