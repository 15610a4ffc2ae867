import json

import pytest
from PIL import Image

from sim_hf.data import MixedRows, load_coco


@pytest.fixture
def coco(tmp_path):
    def write(name, categories, labels):
        folder = tmp_path / name
        folder.mkdir()
        images, annotations = [], []
        for index, category in enumerate(labels, start=1):
            Image.new("RGB", (20, 10), (index, 0, 0)).save(folder / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png", "width": 20, "height": 10})
            annotations.append(
                {"id": index, "image_id": index, "category_id": category, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
            )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": text} for number, text in categories.items()],
        }
        file = folder / "boxes.json"
        file.write_text(json.dumps(content))
        return load_coco(folder, file, cache_dir=tmp_path / "cache")

    return write


def test_classes_are_joined_by_name(coco):
    mixed = MixedRows([coco("a", {5: "cat", 9: "dog"}, [5, 9]), coco("b", {1: "dog", 2: "owl"}, [1, 2])])
    assert mixed.names == ["cat", "dog", "owl"]
    assert [mixed[i]["objects"]["category"] for i in range(len(mixed))] == [[0], [1], [1], [2]]


def test_image_ids_stay_apart_and_the_first_set_keeps_its_own(coco):
    mixed = MixedRows([coco("a", {5: "cat"}, [5, 5]), coco("b", {1: "dog"}, [1])])
    ids = [mixed[i]["image_id"] for i in range(3)]
    assert ids[:2] == [1, 2] and len(set(ids)) == 3


def test_a_set_listed_twice_is_seen_twice(coco):
    dataset = coco("a", {5: "cat"}, [5, 5])
    assert len(MixedRows([dataset, dataset])) == 4


def test_no_data_set_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        MixedRows([])
