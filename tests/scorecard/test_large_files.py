"""23 json-zoo: the largest file that a person would make."""

import json
import os
import time

import psutil

from sim_hf.data.validation import validate_coco

SECONDS, MEGABYTES = 30, 1500  # of processor time and of memory, for 200,000 annotations with polygons


def test_23_two_hundred_thousand_annotations(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(20_000)]
    annotation = '{"id": %d, "image_id": %d, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": 0, "segmentation": [%s]}'
    polygon = json.dumps([1.5, 2.5] * 20)
    annotations = ", ".join(annotation % (i, i % 20_000, polygon) for i in range(1, 200_001))
    path = tmp_path / "large.json"
    path.write_text(
        f'{{"images": {json.dumps(images)}, "categories": [{{"id": 1, "name": "a"}}], "annotations": [{annotations}]}}'
    )
    process = psutil.Process(os.getpid())
    before, started = process.memory_info().rss, time.process_time()
    report = validate_coco(path)
    assert report.num_annotations == 200_000 and report.ok
    assert time.process_time() - started < SECONDS
    assert (process.memory_info().rss - before) / 2**20 < MEGABYTES
