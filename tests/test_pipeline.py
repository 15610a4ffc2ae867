"""pipeline("instance-segmentation") and pipeline("image-segmentation") on every kind of input."""

import base64
import http.server
import io
import logging
import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from transformers import pipeline

from factories import NAMES, tiny_model, tiny_processor
from sim_hf import InstanceSegmentationPipeline
from sim_hf.labeling import masks_for_boxes

SIZES = [(64, 48), (40, 60), (90, 64), (64, 48), (33, 80)]  # width, height: three different inputs after resizing and padding


def picture(width, height, seed=0):
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(generator.integers(40, 120, 3).tolist()))
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 5, width // 2, height - 6), fill=tuple(generator.integers(130, 250, 3).tolist()))
    draw.rectangle((width // 2 + 2, 8, width - 5, height - 9), fill=tuple(generator.integers(130, 250, 3).tolist()))
    return image


@pytest.fixture(scope="module")
def pictures():
    return [picture(*size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def segmenter():
    with torch.random.fork_rng():
        model = tiny_model()
    return pipeline("instance-segmentation", model=model, image_processor=tiny_processor(), device="cpu", threshold=0.02)


def assert_same_objects(found, expected):
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine["mask"] != theirs["mask"]).mean() <= 1e-4


def test_an_object_has_a_label_a_score_a_box_and_a_mask(segmenter, pictures):
    objects = segmenter(pictures[1])
    assert isinstance(segmenter, InstanceSegmentationPipeline) and len(objects) > 1
    scores = [entry["score"] for entry in objects]
    assert scores == sorted(scores, reverse=True) and all(0.02 <= score <= 1 for score in scores)
    for entry in objects:
        assert set(entry) == {"label", "score", "box", "mask"} and entry["label"] in NAMES
        assert entry["mask"].shape == (60, 40) and entry["mask"].dtype == bool
        rows, columns = np.nonzero(entry["mask"])
        assert entry["box"] == {
            "xmin": columns.min(),
            "ymin": rows.min(),
            "xmax": columns.max() + 1,
            "ymax": rows.max() + 1,
        }


def test_overlaps_are_kept(segmenter, pictures):
    masks = np.stack([entry["mask"] for entry in segmenter(pictures[0])])
    assert masks.sum(0).max() > 1


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_masks_do_not_depend_on_the_batch_and_its_padding(segmenter, pictures, batch_size):
    alone = [segmenter(image) for image in pictures]
    together = segmenter(pictures, batch_size=batch_size)
    assert all(len(objects) > 1 for objects in alone)
    for found, expected in zip(together, alone, strict=True):
        assert_same_objects(found, expected)


def test_run_lengths_are_the_arrays(segmenter, pictures):
    arrays, run_lengths = segmenter(pictures[2]), segmenter(pictures[2], mask_format="rle")
    for array, encoded in zip(arrays, run_lengths, strict=True):
        assert encoded["mask"]["size"] == [64, 90] and isinstance(encoded["mask"]["counts"], str)
        assert np.array_equal(coco_mask.decode(encoded["mask"]).astype(bool), array["mask"])


def test_path_bytes_array_tensor_and_record_are_the_same_image(segmenter, pictures, tmp_path):
    image = pictures[0]
    path = tmp_path / "picture.png"
    image.save(path)
    expected = segmenter(image)
    array = np.asarray(image)
    kinds = {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "array": array,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "float array": array / 255,
        "record": {"image": image, "image_id": 3},
        "data url": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        "not decoded": {"image": {"bytes": path.read_bytes(), "path": None}},
    }
    for kind, given in kinds.items():
        found = segmenter(given)
        assert found, kind
        assert_same_objects(found, expected)


def test_url(segmenter, pictures):
    content = io.BytesIO()
    pictures[0].save(content, "png")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = segmenter(f"http://127.0.0.1:{server.server_port}/picture.png", timeout=10)
        server.shutdown()
    assert_same_objects(found, segmenter(pictures[0]))


def test_an_upright_picture_is_made_of_one_that_lies(segmenter, tmp_path):
    lying = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    lying.save(tmp_path / "lying.png", exif=exif)
    assert segmenter(str(tmp_path / "lying.png"))[0]["mask"].shape == (60, 40)


def test_a_list_gives_a_list_and_an_empty_one_nothing(segmenter, pictures):
    assert [len(objects) for objects in segmenter(pictures[:2])] == [len(segmenter(image)) for image in pictures[:2]]
    assert segmenter([]) == []


def test_a_data_set_is_streamed(segmenter, pictures):
    rows = datasets.Dataset.from_list([{"image": image, "image_id": n} for n, image in enumerate(pictures)])
    rows = rows.cast_column("image", datasets.Image())
    results = segmenter(rows, batch_size=2)
    assert len(results) == 5 and not isinstance(results, list)
    for found, image in zip(results, pictures, strict=True):
        assert_same_objects(found, segmenter(image))


def test_a_stream_reads_no_further_than_its_batch(segmenter, pictures):
    read = []

    def images():
        for number, image in enumerate(pictures):
            read.append(number)
            yield image

    results = segmenter(images(), batch_size=2)
    assert read == []
    iterator = iter(results)
    next(iterator)
    assert read == [0, 1]
    with pytest.raises(TypeError, match="no length"):
        len(results)
    assert len(list(iterator)) == 4 and len(read) == 5


def test_an_iterable_data_set_is_streamed(segmenter, pictures):
    rows = datasets.Dataset.from_list([{"image": image} for image in pictures]).cast_column("image", datasets.Image())
    assert len(list(segmenter(rows.to_iterable_dataset(), batch_size=3))) == 5


def test_progress_shows_the_number_of_images(segmenter, pictures, capsys):
    segmenter(pictures[:3], progress=True)
    assert "3/3" in capsys.readouterr().err
    list(segmenter((image for image in pictures[:2]), progress=True))
    assert "2image" in capsys.readouterr().err


def test_options_of_the_call_and_of_the_pipeline(segmenter, pictures):
    assert len(segmenter(pictures[0], max_instances=1)) == 1
    assert segmenter(pictures[0], threshold=0.99) == []
    loose, tight = (sum(entry["mask"].sum() for entry in segmenter(pictures[0], mask_threshold=t)) for t in (0.3, 0.7))
    assert loose > tight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda segmenter, image: segmenter(image, overlap=0.5), "no option overlap"),
        (lambda segmenter, image: segmenter(image, mask_format="polygon"), "mask_format must be one of"),
        (lambda segmenter, image: segmenter(np.zeros((5, 6, 7))), r"an image must be \(H, W\)"),
        (lambda segmenter, image: segmenter([3]), "expected a path, a URL"),
        (lambda segmenter, image: segmenter(3), "expected an image, a list of images or a data set"),
        (lambda segmenter, image: segmenter(iter([image]), boxes=[[0, 0, 5, 5]]), "records of a stream"),
    ],
)
def test_what_is_wrong_is_said(segmenter, pictures, call, message):
    with pytest.raises(ValueError, match=message):
        call(segmenter, pictures[0])


def test_masks_for_given_boxes(segmenter, pictures):
    boxes = [[4.0, 5.0, 32.0, 42.5], [30.0, 6.0, 62.0, 44.0]]
    objects = segmenter(pictures[0], boxes=boxes)
    expected = masks_for_boxes(segmenter.model, segmenter.image_processor, pictures[0], torch.tensor(boxes))
    assert [list(entry["box"].values()) for entry in objects] == boxes
    for entry, mask, confidence in zip(objects, expected.masks(), expected.confidence_n, strict=True):
        assert entry["label"] is None and entry["score"] == pytest.approx(float(confidence))
        assert np.array_equal(entry["mask"], mask.numpy()) and entry["mask"].any()
    listed = segmenter(pictures[:2], boxes=[boxes, []])
    assert len(listed[0]) == 2 and listed[1] == []
    assert np.array_equal(listed[0][1]["mask"], objects[1]["mask"])


def test_a_stock_processor_is_refused_with_the_way_out(segmenter):
    from transformers import Mask2FormerImageProcessor

    with pytest.raises(ValueError, match=r"SIMForInstanceSegmentation\.from_pretrained"):
        InstanceSegmentationPipeline(segmenter.model, image_processor=Mask2FormerImageProcessor(), task="x", device="cpu")


def test_image_segmentation_has_a_fitting_threshold_and_logs_no_error(pictures, tmp_path, caplog, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        plain = pipeline("image-segmentation", model=str(tmp_path), device="cpu")
    assert caplog.text == ""
    assert plain._postprocess_params == {"threshold": 0.5}
    assert (
        pipeline("image-segmentation", model=str(tmp_path), device="cpu", threshold=0.7)._postprocess_params["threshold"] == 0.7
    )
    segments = plain(pictures[0], threshold=0.02, overlap_mask_area_threshold=0.1)
    assert segments and {entry["label"] for entry in segments} <= set(NAMES)
    areas = np.stack([np.asarray(entry["mask"]) for entry in segments])
    assert areas.shape[1:] == (48, 64) and set(np.unique(areas)) == {0, 255}
    assert (areas > 0).sum(0).max() == 1  # one instance a pixel
    batch = plain([pictures[0], pictures[3]], batch_size=2, threshold=0.02, subtask="instance")
    assert len(batch) == 2
