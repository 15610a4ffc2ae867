import pytest
import torch

from sim_hf.evaluation import CocoEvaluator
from sim_hf.evaluation.baselines import filled_box_metrics, mean_fills


def ground_truth():
    """One 20 x 20 image with a 10 x 10 box whose mask is the lower left triangle of 55 pixels."""
    polygon_rows = [[0] * 20 for _ in range(20)]
    for row in range(10):
        for column in range(row + 1):
            polygon_rows[5 + row][5 + column] = 1
    mask = torch.tensor(polygon_rows, dtype=torch.bool)
    from sim_hf.data import encode_rle

    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": 4,
        "bbox": [5, 5, 10, 10],
        "area": 55,
        "iscrowd": 0,
        "segmentation": encode_rle(mask.numpy()),
    }
    images = [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}]
    return {"images": images, "categories": [{"id": 4, "name": "corner"}], "annotations": [annotation]}, mask


def test_perfect_masks_beat_their_filled_boxes():
    truth, mask = ground_truth()
    evaluator = CocoEvaluator(truth, [4])
    evaluator.update(1, {"scores": torch.tensor([0.9]), "labels": torch.tensor([0]), "masks": mask[None]})
    assert evaluator.compute()["segm/AP"] == pytest.approx(1.0)
    # IoU 55 / 100: found at the threshold 0.5 and 0.55, lost at the other eight
    assert filled_box_metrics(evaluator)["segm/AP"] == pytest.approx(0.2)


def test_mean_fill_is_mask_area_over_box_area():
    truth, mask = ground_truth()
    evaluator = CocoEvaluator(truth, [4])
    filled = torch.zeros_like(mask)
    filled[5:15, 5:15] = True
    unsure = torch.zeros_like(mask)
    unsure[0, 0] = True
    masks = torch.stack([mask, filled, unsure])
    evaluator.update(1, {"scores": torch.tensor([0.9, 0.8, 0.1]), "labels": torch.zeros(3, dtype=torch.long), "masks": masks})
    predicted, real = mean_fills(evaluator)
    assert predicted == pytest.approx((0.55 + 1.0) / 2) and real == pytest.approx(0.55)


def test_no_predictions_have_no_fill():
    truth, _ = ground_truth()
    assert mean_fills(CocoEvaluator(truth, [4]))[0] is None
