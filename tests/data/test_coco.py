"""load_coco: the columns, the labels, what is repaired, and a cache that goes by content."""

import errno
import json
import logging
import multiprocessing
import os
import sys
import time

import datasets
import numpy as np
import pytest
from PIL import Image

from coco_faults import encode, sound_document
from sim_hf.data import coco
from sim_hf.data.annotation_file import AnnotationError
from sim_hf.data.category_ids import category_ids
from sim_hf.data.coco import load_coco


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in (("1.png", (255, 0, 0)), ("2.png", (0, 0, 255))):
        Image.new("RGB", (100, 80), color).save(folder / name)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def load(tmp_path, images, cache):
    def load_document(document, **options):
        path = tmp_path / "instances.json"
        path.write_bytes(document if isinstance(document, bytes) else encode(document))
        return load_coco(images, path, cache_dir=cache, **options)

    return load_document


@pytest.fixture
def parses(monkeypatch):
    """How often an annotation file is parsed."""
    calls = []
    parse = coco.parse_annotations
    monkeypatch.setattr(coco, "parse_annotations", lambda *given: calls.append(1) or parse(*given))
    return calls


def test_rows_are_the_images_in_the_order_of_the_file(load, images):
    dataset = load(sound_document())
    first, second = dataset[0], dataset[1]
    assert (first["image_id"], first["width"], first["height"]) == (1, 100, 80)
    assert first["image"].size == (100, 80) and first["image"].getpixel((0, 0)) == (255, 0, 0)
    assert first["objects"] == {
        "id": [1, 2],
        "bbox": [[10, 20, 30, 40], [50, 10, 20, 30]],
        "category": [0, 1],
        "area": [1200, 600],
        "iscrowd": [False, False],
    }
    assert second["objects"]["bbox"] == [[0, 0, 100, 80], [5.5, 6.5, 7, 8]]
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    assert undecoded[0]["image"] == {"bytes": None, "path": str(images / "1.png")}


def test_annotations_may_come_in_any_order(load):
    document = sound_document()
    document["annotations"].reverse()
    document["images"].reverse()
    dataset = load(document)
    assert dataset["image_id"][:] == [2, 1]
    assert [objects["id"] for objects in dataset["objects"]] == [[4, 3], [2, 1]]


def test_labels_are_the_categories_sorted_by_id(load):
    dataset = load(sound_document())
    assert dataset.features["objects"]["category"].feature.names == ["dog", "kite"]
    assert category_ids(dataset) == [5, 9]


def test_an_image_without_annotations_has_empty_lists(load, images):
    document = sound_document()
    Image.new("L", (7, 9)).save(images / "3.png")
    document["images"].insert(1, {"id": 3, "file_name": "3.png", "width": 7, "height": 9})
    dataset = load(document)
    assert dataset[1]["objects"] == {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
    assert np.array(dataset[1]["objects"]["bbox"]).reshape(-1, 4).shape == (0, 4)
    assert dataset[2]["objects"]["id"] == [3, 4]


def test_a_file_without_any_annotation_loads(load):
    document = {**sound_document(), "annotations": []}
    assert [len(objects["bbox"]) for objects in load(document)["objects"]] == [0, 0]


def test_a_file_without_any_image_loads_as_no_rows(load):
    assert len(load({**sound_document(), "images": [], "annotations": []})) == 0


def test_batches_join_without_a_seam(load, monkeypatch):
    whole = load(sound_document())[:]
    monkeypatch.setattr(coco, "_ROWS_PER_BATCH", 1)
    monkeypatch.setattr(coco, "CACHE_VERSION", -1)
    one_by_one = load(sound_document())[:]
    assert one_by_one["objects"] == whole["objects"] and one_by_one["image_id"] == whole["image_id"]


def test_missing_area_and_iscrowd_are_filled(load):
    document = sound_document()
    for annotation in document["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    document["annotations"][3]["area"] = 0
    dataset = load(document)
    assert [objects["area"] for objects in dataset["objects"]] == [[1200, 600], [8000, 56]]
    assert not any(sum(objects["iscrowd"]) for objects in dataset["objects"])


def test_boxes_are_clipped_and_dropped_with_one_warning_that_counts_them(load, caplog):
    document = sound_document()
    for annotation, box in zip(
        document["annotations"], ([90, -5, 30, 40], [1, 1, 0, 5], [200, 0, 5, 5], [1, 2, 3, 4]), strict=True
    ):
        annotation["bbox"] = box
        del annotation["area"]
    with caplog.at_level(logging.WARNING):
        dataset = load(document)
    assert [objects["bbox"] for objects in dataset["objects"]] == [[[90, 0, 10, 35]], [[1, 2, 3, 4]]]
    assert dataset[0]["objects"]["area"] == [350]  # of the clipped box
    [message] = [record.message for record in caplog.records]
    for part in ("instances.json", "1 x box that leaves its image; clipped", "1 x box without width", "1 x box wholly outside"):
        assert part in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(document)  # from the cache: the same warning
    assert [record.message for record in caplog.records] == [message]


def test_bad_annotation_ids_are_numbered_anew(load):
    for bad in (0, -4, 2, None):
        document = sound_document()
        document["annotations"][0]["id"] = bad
        assert [objects["id"] for objects in load(document)["objects"]] == [[1, 2], [3, 4]]


def test_corners_become_sizes_with_the_option(load):
    document = sound_document()
    boxes = ([60, 30, 90, 70], [40, 20, 95, 79], [55, 10, 99, 40], [10, 45, 60, 75])
    for annotation, box in zip(document["annotations"], boxes, strict=True):
        annotation["bbox"] = box
    with pytest.raises(AnnotationError, match="--box-format xyxy"):
        load(document)
    assert load(document, box_format="xyxy")[0]["objects"]["bbox"] == [[60, 30, 30, 40], [40, 20, 55, 59]]


def test_missing_images_are_refused_by_name(load, images):
    (images / "2.png").unlink()
    with pytest.raises(AnnotationError, match=r"image file missing: image 2 \(2.png\)"):
        load(sound_document())


def test_nothing_outside_the_image_folder_is_opened(load, tmp_path, images):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (100, 80)).save(secret)
    (images / "link.png").symlink_to(secret)
    opened = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" and given else None)
    for name in ("../secret.png", str(secret), f"file://{secret}", "link.png"):
        document = sound_document()
        document["images"][0]["file_name"] = name
        with pytest.raises(AnnotationError, match="file_name that leaves the image folder"):
            load(document)
    assert str(secret) not in opened


# masks


def test_segmentations_come_as_json_text_when_asked_for(load):
    document = sound_document()
    document["annotations"][1]["segmentation"] = {"size": [80, 100], "counts": [0, 8000]}
    document["annotations"][2]["segmentation"] = []
    del document["annotations"][3]["segmentation"]
    texts = [text for objects in load(document, with_masks=True)["objects"] for text in objects["segmentation"]]
    assert json.loads(texts[0]) == [[1, 1, 9, 1, 9, 9]]
    assert json.loads(texts[1]) == {"size": [80, 100], "counts": [0, 8000]}
    assert texts[2:] == ["", ""]
    assert "segmentation" not in load(document)[0]["objects"]


def test_segmentations_stay_with_their_boxes_when_others_are_dropped(load):
    document = sound_document()
    for number, annotation in enumerate(document["annotations"]):
        annotation["segmentation"] = [[number, 1, 9, 1, 9, 9]]
    document["annotations"][0]["bbox"] = [0, 0, 0, 0]
    document["annotations"].reverse()
    rows = load(document, with_masks=True)
    first_numbers = [[json.loads(text)[0][0] for text in objects["segmentation"]] for objects in rows["objects"]]
    assert first_numbers == [[1], [3, 2]]


def test_a_broken_segmentation_is_refused_by_name_only_when_masks_are_asked_for(load):
    document = sound_document()
    document["annotations"][1]["segmentation"] = {"counts": [1, 2]}
    load(document)
    with pytest.raises(AnnotationError, match=r"annotation 2: has size None, expected \[80, 100\]"):
        load(document, with_masks=True)


# category ids


def test_category_ids_survive_what_datasets_do(load, tmp_path):
    dataset = load(sound_document())
    dataset.save_to_disk(tmp_path / "saved")
    variants = [
        load(sound_document()),
        datasets.load_from_disk(str(tmp_path / "saved")),
        dataset.select([1]),
        dataset.shuffle(seed=1),
        dataset.map(lambda row: {"image_id": row["image_id"] + 1}),
        dataset.filter(lambda objects: len(objects["id"]) > 0, input_columns=["objects"]),
        dataset.with_transform(lambda rows: rows),
        dataset.select_columns(["image_id", "objects"]),
        datasets.concatenate_datasets([dataset, dataset.select([0])]),
    ]
    assert [category_ids(variant) for variant in variants] == [[5, 9]] * len(variants)


def test_category_ids_of_a_set_that_never_had_any_are_its_labels():
    row = {"objects": {"category": [2]}}
    features = datasets.Features({"objects": {"category": datasets.List(datasets.ClassLabel(names=["cat", "dog", "owl"]))}})
    assert category_ids(datasets.Dataset.from_list([row], features=features)) == [0, 1, 2]


def test_category_ids_refuse_other_data_and_name_what_is_missing():
    with pytest.raises(ValueError, match="no column `objects`, it has \\['text'\\]"):
        category_ids(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="must hold ClassLabels, it holds List\\(Value\\('int64'\\)\\)"):
        category_ids(datasets.Dataset.from_dict({"objects": [{"category": [1]}]}))


def test_category_ids_refuse_joined_sets_with_different_ids(load):
    first = load(sound_document())
    document = sound_document()
    document["categories"][0]["id"] = 4
    for annotation in document["annotations"]:
        annotation["category_id"] = {9: 4, 5: 5}[annotation["category_id"]]
    second = load(document).cast(first.features)
    with pytest.raises(ValueError, match="different category ids were joined"):
        category_ids(datasets.concatenate_datasets([first, second]))


# the cache


def test_the_same_content_is_parsed_once(load, parses, tmp_path):
    first = load(sound_document())
    later = time.time() + 100
    os.utime(tmp_path / "instances.json", (later, later))
    second = load_coco(tmp_path / "images", tmp_path / "instances.json", cache_dir=tmp_path / "cache")
    assert len(parses) == 1
    assert second._fingerprint == first._fingerprint and second.features == first.features


def test_changed_content_of_equal_size_and_time_is_parsed_again(load, parses, tmp_path):
    path = tmp_path / "instances.json"
    load(sound_document())
    times = path.stat().st_mtime_ns, path.stat().st_size
    document = sound_document()
    document["annotations"][0]["bbox"] = [11, 21, 31, 41]
    path.write_bytes(encode(document))
    os.utime(path, ns=(times[0], times[0]))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == times
    changed = load_coco(tmp_path / "images", path, cache_dir=tmp_path / "cache")
    assert len(parses) == 2 and changed[0]["objects"]["bbox"][0] == [11, 21, 31, 41]


def test_options_and_image_folder_are_part_of_the_key(load, parses, tmp_path):
    load(sound_document())
    load(sound_document(), with_masks=True)
    load(sound_document(), strict=True)
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = load_coco(tmp_path / "moved", tmp_path / "instances.json", cache_dir=tmp_path / "cache")
    assert len(parses) == 4 and moved[0]["image"].size == (100, 80)


def test_a_damaged_entry_is_built_again(load, parses, cache):
    load(sound_document())
    [table] = cache.glob("*/rows.arrow")
    table.write_bytes(table.read_bytes()[:-100])
    assert load(sound_document())[1]["image_id"] == 2
    [summary] = cache.glob("*/summary.json")
    summary.write_text("{")
    assert load(sound_document())[1]["image_id"] == 2
    assert len(parses) == 3


def test_what_a_killed_process_left_behind_is_cleaned_up(load, cache):
    load(sound_document())
    [entry] = [path for path in cache.iterdir() if path.is_dir()]
    leftover = cache / f"{entry.name}.tmp123"
    entry.rename(leftover)
    load(sound_document())
    assert entry.exists() and not leftover.exists()


def test_a_full_disk_is_named_and_leaves_nothing_behind(load, cache, monkeypatch):
    def no_space(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(coco, "_batches", no_space)
    with pytest.raises(OSError, match=r"cannot be written there .*No space left"):
        load(sound_document())
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_refused_file_leaves_no_entry(load, cache):
    document = sound_document()
    document["annotations"][0]["bbox"] = None
    for _ in range(2):
        with pytest.raises(AnnotationError):
            load(document)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_processes_that_start_together_build_once_and_agree(tmp_path, images, cache, monkeypatch):
    (tmp_path / "instances.json").write_bytes(encode(sound_document()))
    context = multiprocessing.get_context("fork")  # starts at once, and inherits the counting parser
    results, barrier, parse = context.Queue(), context.Barrier(3), coco.parse_annotations
    monkeypatch.setattr(coco, "parse_annotations", lambda *given: results.put("parsed") or time.sleep(0.2) or parse(*given))

    def load_at_once():
        barrier.wait()
        results.put(load_coco(images, tmp_path / "instances.json", cache_dir=cache)[1]["objects"]["id"])

    processes = [context.Process(target=load_at_once) for _ in range(3)]
    for process in processes:
        process.start()
    outputs = [results.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join(timeout=60)
    assert outputs == ["parsed", [3, 4], [3, 4], [3, 4]]


def test_the_default_cache_is_that_of_datasets(tmp_path, images, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "instances.json").write_bytes(encode(sound_document()))
    load_coco(images, tmp_path / "instances.json")
    assert len(list((tmp_path / "hf" / "sim_hf_coco").glob("*/rows.arrow"))) == 1
