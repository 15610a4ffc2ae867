"""From a picture to what the Space shows and gives away."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from boxes import NamedBox, parse_boxes
from example_pictures import FOLDER, examples, render
from factories import save_tiny_condinst
from segmenter import Segmenter, distinct, load_segmenter
from sim_hf.data import decode_segmentation, render_scene
from uploads import read_upload


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter()


@pytest.fixture(scope="module")
def starfish(segmenter):
    return segmenter.find(read_upload(FOLDER / "starfish.jpg"))


def test_the_examples_are_the_scenes_that_the_generator_makes(tmp_path):
    render(tmp_path)
    for path in sorted(FOLDER.glob("*.json")):
        assert json.loads(path.read_text()) == json.loads((tmp_path / path.name).read_text())
        ours, made = (np.asarray(Image.open(p.with_suffix(".jpg")), dtype=int) for p in (path, tmp_path / path.name))
        assert np.abs(ours - made).mean() < 1  # another JPEG library may round differently


def test_there_are_scenes_with_boxes_and_photographs_without():
    assert {bool(example.boxes) for example in examples()} == {True, False}
    assert all(example.path.is_file() for example in examples())


def test_an_object_is_found_and_the_document_is_coco(starfish, tmp_path):
    (tmp_path / "coco.json").write_text(json.dumps(starfish.coco(0.5)))
    coco = COCO(tmp_path / "coco.json")
    annotations = coco.loadAnns(coco.getAnnIds())
    assert coco.loadCats(annotations[0]["category_id"])[0]["name"] == "starfish"
    truth = render_scene(7, size=512, difficulty=0.6).masks[0]
    mask = coco.annToMask(annotations[0]).astype(bool)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.6
    assert annotations[0]["area"] == mask.sum()


def test_a_higher_least_score_shows_the_same_instances_and_fewer(segmenter):
    birds = segmenter.find(read_upload(FOLDER / "birds.jpg"))
    many = birds.coco(0.05)["annotations"]
    least = (many[0]["score"] + many[-1]["score"]) / 2
    few = birds.coco(least)["annotations"]
    assert len(many) > len(few) > 0 and many[: len(few)] == few
    assert all(annotation["score"] >= least for annotation in few)
    assert len(birds.table(least)) == len(few)
    assert birds.coco(1.0)["annotations"] == [] == birds.coco(1.0)["categories"]
    assert birds.drawn(1.0).size == birds.drawn(0.05).size


def test_each_box_gets_one_mask_in_it_in_order(segmenter):
    upload = read_upload(FOLDER / "birds.jpg")
    boxes = parse_boxes((FOLDER / "birds.json").read_text())
    document = segmenter.fill(upload, boxes).coco()
    assert [annotation["id"] for annotation in document["annotations"]] == [1, 2]
    assert [category["name"] for category in document["categories"]] == ["bird"]
    for annotation, box, truth in zip(
        document["annotations"], boxes, render_scene(11, size=512, difficulty=0.6).masks, strict=True
    ):
        assert annotation["bbox"] == [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1]
        mask = decode_segmentation(annotation["segmentation"], *upload.size)
        assert (mask & truth).sum() / (mask | truth).sum() > 0.8


def test_a_name_gets_the_id_of_the_model_or_one_of_its_own(segmenter):
    upload = read_upload(FOLDER / "birds.jpg")
    found = segmenter.fill(
        upload, [NamedBox(10, 10, 100, 100, "unicorn"), NamedBox(10, 10, 90, 90), NamedBox(5, 5, 50, 50, "Bird")]
    )
    assert found.names == ["unicorn", "object", "bird"]
    ids = [annotation["category_id"] for annotation in found.annotations]
    assert ids[2] == segmenter.category_ids["bird"]
    assert len(set(ids)) == 3 and not set(ids[:2]) & set(segmenter.category_ids.values())


def test_masks_of_a_reduced_picture_have_the_size_of_the_sent_one(segmenter, tmp_path):
    Image.open(FOLDER / "starfish.jpg").resize((3200, 2125)).save(tmp_path / "a.jpg")
    upload = read_upload(tmp_path / "a.jpg")
    box = NamedBox(1300, 300, 3100, 1900)
    (annotation,) = segmenter.fill(upload, [box]).coco()["annotations"]
    assert annotation["segmentation"]["size"] == [2125, 3200]
    y, x = np.nonzero(decode_segmentation(annotation["segmentation"], 2125, 3200))
    assert x.min() > 1290 and x.max() < 3110 and y.min() > 290 and y.max() < 1910
    assert annotation["area"] == len(x) and annotation["bbox"] == [1300, 300, 1800, 1600]
    for found in segmenter.find(upload).coco()["annotations"]:
        assert found["segmentation"]["size"] == [2125, 3200]


def test_a_picture_of_nothing_has_no_objects_and_still_a_document(segmenter, tmp_path):
    Image.new("RGB", (64, 48), "white").save(tmp_path / "a.png")
    found = segmenter.find(read_upload(tmp_path / "a.png"))
    assert found.coco(0.9)["annotations"] == []
    assert found.drawn(0.9).size == (640, 480)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (3000, 1)])
def test_thin_pictures_are_pictures(segmenter, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    upload = read_upload(tmp_path / "a.png")
    segmenter.find(upload).drawn()
    (annotation,) = segmenter.fill(upload, [NamedBox(0, 0, *map(float, size))]).annotations
    assert annotation["segmentation"]["size"] == [size[1], size[0]]


def test_a_model_of_the_other_architecture_finds_and_fills(monkeypatch, tmp_path):
    model = save_tiny_condinst(tmp_path, score_threshold=0.0, category_ids=[3, 8])
    monkeypatch.setenv("SIM_MODEL", str(model))
    segmenter, upload = load_segmenter(), read_upload(FOLDER / "birds.jpg")
    assert type(segmenter.model).__name__ == "CondInstForInstanceSegmentation"
    assert segmenter.find(upload).drawn().size == (640, 640 * upload.picture.height // upload.picture.width)
    found = segmenter.fill(upload, [NamedBox(100, 38, 460, 397, "ellipse"), NamedBox(10, 10, 90, 90)])
    y, x = np.nonzero(decode_segmentation(found.annotations[0]["segmentation"], *upload.size))
    assert x.min() >= 100 and x.max() < 460 and y.min() >= 38 and y.max() < 397
    assert [annotation["category_id"] for annotation in found.annotations] == [3, 9]


def test_a_model_that_is_not_there_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("SIM_MODEL", "no/such-model")
    with pytest.raises(SystemExit, match="SIM_MODEL=no/such-model"):
        load_segmenter()


def test_pickled_weights_are_not_loaded(segmenter, tmp_path):
    segmenter.model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(OSError, match="safetensors"):
        Segmenter(tmp_path)


def test_an_object_that_was_found_twice_is_shown_once_with_its_better_score():
    masks = torch.zeros(4, 40, 40, dtype=torch.bool)
    masks[0, :20, :20] = masks[1, :20, :24] = masks[2, :20, :28] = masks[3, 24:, 24:] = True  # IoU with mask 1: 0.83, 1, 0.86, 0
    assert distinct(masks, [0.6, 0.9, 0.7, 0.1]) == [1, 3]
    assert distinct(masks, [0.9, 0.6, 0.7, 0.1]) == [0, 2, 3]  # IoU of 0 and 2 is 0.71: 2 stays, 1 goes
    assert distinct(masks[:0], []) == []
