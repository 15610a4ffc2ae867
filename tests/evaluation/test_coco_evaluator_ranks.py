"""Every image counts once, however often it is seen and by whom."""

import contextlib
import datetime
import json
import os

import numpy as np
import pytest
import torch
from evaluation_cases import CATEGORY_IDS, rle, small_case, square

from sim_hf.evaluation import CocoEvaluator


def test_padded_repeat_of_an_image_counts_once():
    ground_truth, results = small_case()
    evaluator = CocoEvaluator(ground_truth, CATEGORY_IDS)
    for image_id in (5, 6, 7, 5):
        evaluator.update(torch.tensor([image_id]), results[image_id])
    assert len(evaluator.coco_results()) == 6


def seven_images() -> tuple[dict, dict[int, dict]]:
    annotations, results = [], {}
    for image_id in range(7):
        mask_HW = square(image_id, 2, 10)
        annotations.append({"image_id": image_id, "category_id": 7, "bbox": [image_id, 2, 10, 10], "segmentation": rle(mask_HW)})
        found = [mask_HW, square(20, 20, 8)][: image_id % 3]
        results[image_id] = {
            "scores": torch.tensor([0.5 + image_id / 100, 0.6])[: len(found)],
            "labels": torch.zeros(len(found)),
            "masks": torch.from_numpy(np.array(found).reshape(-1, 40, 40).astype(bool)),
        }
    images = [{"id": image_id, "width": 40, "height": 40} for image_id in range(7)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "a"}]}, results


def evaluate_as_rank(rank: int, folder) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20)
    )
    ground_truth, results = seven_images()
    evaluator = CocoEvaluator(ground_truth, [7])
    # batches of 2, dealt out in turn; the last is filled up with images from the front, as accelerate does
    for image_id in ([0, 1, 4, 5], [2, 3, 6, 0])[rank]:
        evaluator.update(image_id, results[image_id])
    with contextlib.suppress(RuntimeError):
        evaluator.compute()
        raise AssertionError("compute before synchronize must be refused")
    evaluator.synchronize()
    evaluator.synchronize()
    (folder / f"{rank}.json").write_text(json.dumps([evaluator.compute(), evaluator.coco_results(), evaluator.note]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_count_every_image_once_and_agree_with_one(tmp_path):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                evaluate_as_rank(rank, tmp_path)
                os._exit(0)
            except BaseException as error:
                (tmp_path / f"error{rank}").write_text(repr(error))
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("error*")]
    ground_truth, results = seven_images()
    evaluator = CocoEvaluator(ground_truth, [7])
    for image_id, result in results.items():
        evaluator.update(image_id, result)
    expected = [evaluator.compute(), evaluator.coco_results(), evaluator.note]
    assert 0 < expected[0]["segm/AP"] < 1
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
