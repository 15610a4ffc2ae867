"""What `sim-hf label` writes, read by the tools that people go on with. Those that are not installed are skipped: each is large,
and nothing here needs it; docs/other_tools.md says with which versions this was run."""

import importlib
import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from factories import NAMES, save_tiny_model, write_shapes
from sim_hf.cli import main


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """images/, rle.json and polygons.json: the same masks of an untrained network, in both forms."""
    folder = tmp_path_factory.mktemp("labelled")
    shapes = write_shapes(folder / "shapes", num_train=4, num_val=1, empty=(1,))
    model = save_tiny_model(folder / "model")
    source = ["--annotations", str(shapes / "instances_train.json"), "--images", str(shapes / "images")]
    for form, options in (("rle", []), ("polygons", ["--polygons"])):
        output = shapes / f"{form}.json"
        assert main(["label", str(model), *source, "--output", str(output), "--crop-below", "0", *options]) == 0
    return shapes


def annotations_of(labelled, form):
    """file name -> its annotations, each with its mask as pycocotools decodes it, and the name of its class"""
    coco = COCO(str(labelled / f"{form}.json"))
    found = {image["file_name"]: [] for image in coco.imgs.values()}
    for annotation in coco.anns.values():
        annotation |= {"mask": coco.annToMask(annotation).astype(bool), "name": coco.cats[annotation["category_id"]]["name"]}
        found[coco.imgs[annotation["image_id"]]["file_name"]].append(annotation)
    return found


def iou(one, other):
    return (one & other).sum() / max((one | other).sum(), 1)


def test_pycocotools_decodes_both_forms_to_the_same_masks(labelled):
    """Polygons lose holes, and nothing else."""
    from scipy.ndimage import binary_fill_holes

    rle, polygons = (annotations_of(labelled, form) for form in ("rle", "polygons"))
    assert [len(some) for some in rle.values()].count(0) == 1  # the image without objects is still there
    for name, annotations in rle.items():
        for one, other in zip(annotations, polygons[name], strict=True):
            assert one["mask"].sum() == one["area"] > 0
            assert iou(other["mask"], binary_fill_holes(one["mask"])) > 0.97


@pytest.mark.parametrize("form", ["rle", "polygons"])
def test_supervision(labelled, form):
    supervision = pytest.importorskip("supervision", reason="pip install supervision")
    dataset = supervision.DetectionDataset.from_coco(str(labelled / "images"), str(labelled / f"{form}.json"), force_masks=True)
    assert dataset.classes == list(NAMES)
    expected = annotations_of(labelled, form)
    for path, _, found in dataset:
        annotations = expected[path.rpartition("/")[2]]
        assert [dataset.classes[label] for label in (() if found.class_id is None else found.class_id)] == [
            a["name"] for a in annotations
        ]
        for annotation, mask in zip(annotations, () if found.mask is None else found.mask, strict=True):
            if form == "rle":
                assert np.array_equal(mask, annotation["mask"])
            else:  # it draws the outline, too: a pixel more at the right and at the bottom
                assert (mask & annotation["mask"]).sum() > 0.98 * annotation["mask"].sum() and iou(mask, annotation["mask"]) > 0.6


@pytest.mark.parametrize("form", ["rle", "polygons"])
def test_fiftyone(labelled, form, tmp_path, monkeypatch):
    """Its importer, without the database that a `fiftyone.Dataset` needs (a MongoDB server)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    pytest.importorskip("fiftyone", reason="pip install fiftyone")
    coco = importlib.import_module("fiftyone.utils.coco")
    importer = coco.COCODetectionDatasetImporter(
        data_path=str(labelled / "images"), labels_path=str(labelled / f"{form}.json"), label_types=["segmentations"]
    )
    importer.setup()
    expected = annotations_of(labelled, form)
    assert len(importer) == len(expected)
    for path, metadata, found in importer:
        annotations = expected[path.rpartition("/")[2]]
        detections = found.detections if found is not None else []
        assert [item.label for item in detections] == [annotation["name"] for annotation in annotations]
        for item, annotation in zip(detections, annotations, strict=True):
            assert item.confidence == pytest.approx(annotation["score"])
            left, top = round(item.bounding_box[0] * metadata.width), round(item.bounding_box[1] * metadata.height)
            height, width = item.mask.shape
            assert np.array_equal(item.mask, annotation["mask"][top : top + height, left : left + width])


@pytest.mark.parametrize(("package", "num_read"), [("label_studio_sdk.converter", None), ("label_studio_converter", 1)])
def test_label_studio_takes_polygons(labelled, package, num_read, tmp_path):
    """Its importer of COCO files reads no run lengths, which is what `sim-hf label --polygons` is for. The older package (0.0.59)
    reads an object's first polygon only: it is the largest."""
    pytest.importorskip(package, reason="pip install label-studio-sdk (or label-studio-converter)")
    importer = importlib.import_module(f"{package}.imports.coco")
    output = tmp_path / "tasks.json"
    importer.convert_coco_to_ls(str(labelled / "polygons.json"), str(output), out_type="predictions")
    document = json.loads((labelled / "polygons.json").read_text())
    expected = annotations_of(labelled, "polygons")
    tasks = json.loads(output.read_text())
    assert len(tasks) == len(document["images"])
    for task, image in zip(tasks, document["images"], strict=True):
        assert task["data"]["image"].endswith(image["file_name"])
        results = task["predictions"][0]["result"]
        polygons = [result for result in results if result["type"] == "polygonlabels"]
        wanted = [(a["name"], polygon) for a in expected[image["file_name"]] for polygon in a["segmentation"][:num_read]]
        assert [result["value"]["polygonlabels"] for result in polygons] == [[name] for name, _ in wanted]
        corners = [corner for _, polygon in wanted for corner in polygon[:2]]
        size = (image["width"], image["height"])
        drawn = [
            value * side / 100 for result in polygons for value, side in zip(result["value"]["points"][0], size, strict=True)
        ]
        assert drawn == pytest.approx(corners)
