"""Labelling with a stand-in network that paints what it is asked to, so that the expected masks are known by hand."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from factories import tiny_processor
from sim_hf.label_views import View, views_of
from sim_hf.labeling import LabelOptions, _blended, _decide, _seen, _weigh_queries, _WeightedMap, masks_for_boxes
from sim_hf.structures import box_iou_pairwise, box_masks, mask_boxes


class DarkPixels(nn.Module):
    """Query 0 is the dark pixels of the view, query 1 its left half, query 2 nothing; class 0 always."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(box_prompts=False)
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values, pixel_mask):
        small = torch.nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True) * pixel_mask[:, None], 4)[:, 0]
        dark = torch.where(small < -0.5, 9.0, -9.0)
        left = torch.full_like(dark, -9.0)
        left[:, :, : dark.shape[2] // 2] = 9.0
        masks = torch.stack([dark, left, torch.full_like(dark, -9.0)], 1)
        classes = torch.tensor([5.0, 0.0, 0.0]).expand(len(dark), 3, 3)
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def picture_of(dark_box, size=(64, 64)):
    picture = Image.new("RGB", size, (200, 200, 200))
    picture.paste((0, 0, 0), dark_box)
    return picture


@pytest.mark.parametrize("options", [LabelOptions(crop_below=0.0), LabelOptions(crop_below=1.0), LabelOptions()])
def test_the_mask_is_the_object_inside_the_box(options):
    picture = picture_of((16, 16, 40, 48))
    found = masks_for_boxes(DarkPixels(), tiny_processor(), picture, torch.tensor([[16.0, 16.0, 40.0, 48.0]]), [0], options)
    mask = found.mask(0)
    assert mask.shape == (64, 64)
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[16:48, 16:40] = True
    assert (mask & expected).sum() / (mask | expected).sum() > 0.9  # the grid has 16 cells a side
    assert found.confidence_n[0] > 0.85


def test_boxes_may_be_plain_numbers():
    picture = picture_of((16, 16, 40, 48))
    plain = masks_for_boxes(DarkPixels(), tiny_processor(), picture, [[16, 16, 40, 48]])
    tensor = masks_for_boxes(DarkPixels(), tiny_processor(), picture, torch.tensor([[16.0, 16.0, 40.0, 48.0]]))
    assert torch.equal(plain.masks(), tensor.masks())


def test_a_small_object_is_sharper_with_crops_than_without():
    box = (40, 40, 46, 46)
    picture = picture_of(box, size=(256, 256))
    boxes = torch.tensor([box], dtype=torch.float32)
    ious = []
    for options in (LabelOptions(crop_below=0.0), LabelOptions()):
        found = masks_for_boxes(DarkPixels(), tiny_processor(), picture, boxes, [0], options)
        ious.append(float(box_iou_pairwise(mask_boxes(found.masks()), boxes)))
    assert ious[1] >= ious[0]


def test_where_nothing_is_found_a_blob_fills_the_box_with_confidence_near_zero():
    blank = Image.new("RGB", (64, 64), (200, 200, 200))

    class Nothing(DarkPixels):
        def forward(self, pixel_values, pixel_mask):
            output = super().forward(pixel_values, pixel_mask)
            output.masks_queries_logits = torch.full_like(output.masks_queries_logits, -9.0)
            return output

    box = torch.tensor([[10.0, 20.0, 30.0, 50.0]])
    found = masks_for_boxes(Nothing(), tiny_processor(), blank, box)
    assert 0.7 < found.mask(0).sum() / (20 * 30) < 0.95  # an ellipse fills 0.785 of its box
    assert torch.equal(mask_boxes(found.masks()), box)
    assert found.confidence_n[0] < 0.01


def test_a_picture_without_boxes_has_no_masks():
    found = masks_for_boxes(DarkPixels(), tiny_processor(), Image.new("RGB", (30, 20)), torch.zeros(0, 4))
    assert found.masks().shape == (0, 20, 30)


def test_a_one_pixel_box_and_a_box_at_the_border_have_a_mask():
    picture = picture_of((0, 0, 64, 64))
    boxes = torch.tensor([[63.0, 63.0, 64.0, 64.0], [0.2, 0.2, 0.8, 0.9], [50.0, 50.0, 90.0, 90.0]])
    found = masks_for_boxes(DarkPixels(), tiny_processor(), picture, boxes)
    assert [int(mask.sum()) > 0 for mask in found.masks()] == [True, True, True]
    assert found.mask(0).nonzero().tolist() == [[63, 63]]


def test_more_boxes_than_queries_share_queries():
    boxes = torch.tensor([[16.0, 16.0, 40.0, 48.0]] * 5)
    assert len(masks_for_boxes(DarkPixels(), tiny_processor(), picture_of((16, 16, 40, 48)), boxes)) == 5


def test_the_threshold_is_the_one_whose_extent_agrees_with_the_box():
    probability = torch.zeros(6, 6)
    probability[:, :] = 0.35  # the whole object, as large as the box
    probability[2:4, 2:4] = 0.9
    total = _WeightedMap((2, 2, 8, 8), probability, agreement=1.0, weight=1.0)
    box = torch.tensor([2.0, 2.0, 8.0, 8.0])
    blended = _blended(total, LabelOptions())
    assert torch.equal(blended, probability)
    assert int(_decide(blended, total, box, LabelOptions())[0].sum()) == 36
    assert int(_decide(blended, total, box, LabelOptions(fit_threshold=False))[0].sum()) == 4


def test_queries_are_weighed_by_agreement_and_class():
    masks = torch.zeros(3, 8, 8)
    masks[0, 2:6, 2:6] = 1  # fits the box
    masks[1, 2:6, 2:4] = 1  # half of it
    classes = torch.tensor([[0.5, 0.4, 0.1]]).expand(3, 3)
    weights, agreement = _weigh_queries(classes, masks, torch.tensor([8.0, 8.0, 24.0, 24.0]), 0, 4.0, LabelOptions(mu=2.0))
    assert agreement.tolist() == [1.0, 0.5, 0.0]
    assert torch.allclose(weights, 0.5 * torch.tensor([2.0, 1.0, 0.0]).exp())
    unknown, _ = _weigh_queries(classes, masks, torch.tensor([8.0, 8.0, 24.0, 24.0]), None, 4.0, LabelOptions(mu=2.0))
    assert torch.allclose(unknown, 0.9 * torch.tensor([2.0, 1.0, 0.0]).exp())


class Prompted(DarkPixels):
    """Answers a box with the box filled in, sure of class 1; its queries find nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(box_prompts=True)

    def forward(self, pixel_values, pixel_mask, prompt_boxes):
        output = super().forward(pixel_values, pixel_mask)
        output.masks_queries_logits = torch.full_like(output.masks_queries_logits, -9.0)
        height, width = output.masks_queries_logits.shape[-2:]
        filled = [box_masks(boxes, height, width, 4.0) for boxes in prompt_boxes]
        output.masks_prompts_logits = torch.where(torch.stack(filled), 9.0, -9.0)
        output.class_prompts_logits = torch.tensor([0.0, 5.0, 0.0]).expand(*prompt_boxes.shape[:2], 3)
        return output


@pytest.mark.parametrize("options", [LabelOptions(crop_below=0.0), LabelOptions(crop_below=1.0, flip=True)])
def test_a_network_that_takes_prompts_is_asked_for_the_boxes(options):
    boxes = torch.tensor([[4.0, 8.0, 24.0, 28.0], [32.0, 40.0, 60.0, 56.0]])
    found = masks_for_boxes(Prompted(), tiny_processor(), picture_of((0, 0, 64, 64)), boxes, [1, 1], options)
    assert box_iou_pairwise(mask_boxes(found.masks()), boxes).min() > 0.95
    assert found.confidence_n.min() > 0.9


def test_masks_of_overlapping_boxes_share_their_pixels():
    boxes = torch.tensor([[0.0, 16.0, 40.0, 48.0], [24.0, 16.0, 64.0, 48.0]])
    picture = picture_of((0, 0, 64, 64))
    both = [
        int(masks_for_boxes(Prompted(), tiny_processor(), picture, boxes, [1, 1], options).masks().all(0).sum())
        for options in (LabelOptions(pixel_competition=False), LabelOptions())
    ]
    assert both[0] > 0.95 * 16 * 32 and both[1] < 0.7 * both[0]


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_a_margin_that_is_no_size_is_refused(margin):
    with pytest.raises(ValueError, match="crop_margins must be 0 or more"):
        LabelOptions(crop_margins=(0.2, margin))


def test_masks_of_a_crowd_come_from_windows_that_it_shares():
    """Sixteen squares of 6 pixels each: their masks fill their boxes, as they do one by one."""
    picture = Image.new("RGB", (256, 256), (200, 200, 200))
    corners = [(20 + 14 * column, 30 + 14 * row) for row in range(4) for column in range(4)]
    for x, y in corners:
        picture.paste((0, 0, 0), (x, y, x + 6, y + 6))
    boxes = torch.tensor([[x, y, x + 6, y + 6] for x, y in corners], dtype=torch.float32)
    assert len(views_of(picture.size, boxes, small=0.5, margins=(2.0,), mirrored=False)) == 1 + 4
    found = masks_for_boxes(DarkPixels(), tiny_processor(), picture, boxes, options=LabelOptions(crop_margins=(2.0,)))
    assert found.masks().flatten(1).sum(-1).tolist() == [36] * 16


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_a_view_says_about_a_region_is_the_resized_map_cut_there(mirrored):
    torch.manual_seed(0)
    map_11hw = torch.rand(1, 1, 24, 32)
    view = View((10, 20, 150, 110), (0,), mirrored)
    resized = torch.nn.functional.interpolate(map_11hw, (90, 140), mode="bilinear")[0, 0]
    resized = resized.flip(-1) if mirrored else resized
    for region in ((10, 20, 150, 110), (30, 25, 31, 60), (149, 109, 150, 110)):
        left, top, right, bottom = region
        assert torch.allclose(_seen(map_11hw, view, region), resized[top - 20 : bottom - 20, left - 10 : right - 10], atol=1e-5)
