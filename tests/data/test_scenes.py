"""Generated photographs: the same everywhere, exact boxes and masks, a valid COCO data set on disk."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

from sim_hf.data import scenes
from sim_hf.data.scenes import CATEGORY_IDS, CLASS_NAMES, render_scene, write_scenes
from sim_hf.data.scenes_render import MIN_VISIBLE_PIXELS, Item, visible_shares
from sim_hf.data.scenes_shapes import AX, AY, BX, BY, RADIUS_A, RADIUS_B

FINGERPRINT = "b9b07ef200cc9c03"


@pytest.fixture(scope="module")
def some_scenes():
    return [render_scene(seed, size=160) for seed in range(24)]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=5, num_val=3, seed=1, size=96, progress=False)


def fingerprint(*arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def bounding_box(mask):
    pixels = np.argwhere(mask)
    (top, left), (bottom, right) = pixels.min(0), pixels.max(0) + 1
    return [left, top, right - left, bottom - top]


def test_pixels_of_a_scene_never_change_without_a_new_generator_version():
    scene = render_scene(7, size=128)
    assert fingerprint(scene.image, scene.masks, scene.boxes, scene.class_labels) == FINGERPRINT
    assert scenes.GENERATOR_VERSION == 2


def test_a_scene_depends_on_its_seed_only():
    first, other = render_scene((3, 0, 5), size=64), render_scene((3, 0, 6), size=64)
    again = render_scene((3, 0, 5), size=64)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.masks, again.masks)
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_arrays_have_the_promised_types_and_shapes(some_scenes):
    for scene in some_scenes:
        height, width, channels = scene.image.shape
        count = len(scene.class_labels)
        assert (max(height, width), channels, scene.image.dtype) == (160, 3, np.uint8)
        assert scene.masks.shape == (count, height, width) and scene.masks.dtype == np.bool_
        assert scene.boxes.shape == (count, 4) and scene.boxes.dtype == np.float32
        assert scene.class_labels.dtype == np.int64
        assert all(0 <= label < len(CLASS_NAMES) for label in scene.class_labels)
        assert 60 <= scene.jpeg_quality <= 95


def test_boxes_are_tight_around_the_visible_parts(some_scenes):
    for scene in some_scenes:
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            assert box.tolist() == bounding_box(mask)


def test_no_pixel_belongs_to_two_instances(some_scenes):
    assert all(scene.masks.sum(0).max(initial=0) <= 1 for scene in some_scenes)


def test_instances_that_are_almost_hidden_are_dropped(some_scenes):
    assert all(mask.sum() >= MIN_VISIBLE_PIXELS for scene in some_scenes for mask in scene.masks)


def test_a_mask_is_far_from_its_box_for_every_class(some_scenes):
    fills = {label: [] for label in range(len(CLASS_NAMES))}
    for scene in some_scenes:
        for mask, box, label in zip(scene.masks, scene.boxes, scene.class_labels, strict=True):
            fills[int(label)].append(mask.sum() / (box[2] * box[3]))
    assert all(values and np.mean(values) < 0.6 for values in fills.values())


def test_scenes_hold_one_to_three_instances(some_scenes):
    counts = [len(scene.class_labels) for scene in some_scenes]
    assert min(counts) >= 1 and max(counts) <= 3 and 1.4 < np.mean(counts) < 2.1


def test_bodies_are_large_and_masks_survive_a_grid_a_quarter_of_the_picture(some_scenes):
    """A mask head works at a quarter of the resolution; thinner limbs could not be learned."""
    longer_sides, overlaps = [], []
    for scene in some_scenes:
        longer_sides += (scene.boxes[:, 2:].max(1) / 160).tolist()
        for mask in scene.masks:
            framed = np.zeros((160, 160), bool)
            framed[: mask.shape[0], : mask.shape[1]] = mask
            coarse = framed.reshape(40, 4, 40, 4).mean((1, 3))
            rough = np.kron(coarse > 0.5, np.ones((4, 4), bool))
            overlaps.append((rough & framed).sum() / (rough | framed).sum())
    assert 0.4 < np.median(longer_sides) < 0.6
    assert np.mean(overlaps) > 0.8


def test_visible_shares_count_what_bodies_in_front_and_the_frame_hide():
    def bar(x, depth):
        bones = np.zeros((1, 10))
        bones[0, [AX, BX, AY, BY, RADIUS_A, RADIUS_B]] = x, x, 64, 192, 48, 48
        return Item(bones, depth, 0)

    assert visible_shares([bar(64, 0.0), bar(192, 1.0)], 256, 256) == [1.0, 1.0]
    assert visible_shares([bar(64, 0.0), bar(64, 1.0)], 256, 256) == [0.0, 1.0]
    assert visible_shares([bar(0, 0.0)], 256, 256) == pytest.approx([0.5], abs=0.1)
    assert visible_shares([bar(64, 0.0), bar(112, 1.0)], 256, 256) == pytest.approx([0.5, 1.0], abs=0.12)


def test_a_wreath_has_a_hole():
    label = CLASS_NAMES.index("wreath")
    found = [render_scene(s, size=96, num_objects=1, difficulty=0) for s in range(40)]
    rings = [scene.masks[0] for scene in found if scene.class_labels.tolist() == [label]]
    whole = [m for m in rings if not (m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any())]
    assert whole
    assert all(ndimage.binary_fill_holes(mask).sum() > 1.3 * mask.sum() for mask in whole)


def test_num_objects_bounds_the_number_of_instances():
    assert len(render_scene(0, size=64, num_objects=0).masks) == 0
    assert render_scene(0, size=64, num_objects=0).boxes.shape == (0, 4)
    assert all(len(render_scene(s, size=96, num_objects=1, difficulty=0).masks) == 1 for s in range(10))
    assert max(len(render_scene(s, size=128, num_objects=4).masks) for s in range(6)) == 4


def background_roughness(scene) -> float:
    """Mean step between neighbours outside all instances."""
    grey = scene.image.astype(float).mean(-1)
    outside = ~ndimage.binary_dilation(scene.masks.any(0), iterations=8)
    return float(np.abs(np.diff(grey, axis=1))[outside[:, 1:]].mean())


def test_difficulty_zero_has_a_plain_background():
    for seed in range(6):
        easy, hard = render_scene(seed, size=96, difficulty=0.0), render_scene(seed, size=96)
        assert background_roughness(easy) < 0.6 < background_roughness(hard)


def test_colour_alone_separates_bodies_better_when_easy_than_when_hard():
    def nearest_mean_accuracy(scene) -> float:
        """Balanced accuracy of 'closer to the mean colour of the bodies than to that of the rest', told both means."""
        pixels, inside = scene.image.reshape(-1, 3).astype(float), scene.masks.any(0).ravel()
        means = [pixels[chosen].mean(0) for chosen in (inside, ~inside)]
        called = np.square(pixels - means[0]).sum(1) < np.square(pixels - means[1]).sum(1)
        return 0.5 * (called[inside].mean() + (~called[~inside]).mean())

    easy, hard = (
        np.mean([nearest_mean_accuracy(s) for s in (render_scene(k, size=96, difficulty=d) for k in range(20)) if len(s.masks)])
        for d in (0.0, 1.0)
    )
    assert hard < easy - 0.05
    assert hard < 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"size": 8}, "32 pixels, got 8"), ({"difficulty": 1.5}, "0..1, got 1.5"), ({"num_objects": -1}, "negative, got -1")],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_scene(0, **arguments)


def test_written_set_is_valid_coco(data_set, capsys):
    for split, count in (("train", 5), ("val", 3)):
        coco = COCO(str(data_set / f"instances_{split}.json"))
        assert len(coco.getImgIds()) == count
        assert coco.getCatIds() == list(CATEGORY_IDS)
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASS_NAMES)
        for annotation in coco.loadAnns(coco.getAnnIds()):
            image = coco.loadImgs(annotation["image_id"])[0]
            mask = coco.annToMask(annotation)
            assert mask.shape == (image["height"], image["width"])
            assert annotation["bbox"] == bounding_box(mask)
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0


def test_written_images_are_the_rendered_ones_up_to_jpeg(data_set):
    document = json.loads((data_set / "instances_train.json").read_text())
    for index, record in enumerate(document["images"]):
        scene = render_scene((1, 0, index), size=96)
        with Image.open(data_set / "images" / record["file_name"]) as image:
            assert (image.width, image.height) == (record["width"], record["height"])
            assert np.abs(np.asarray(image).astype(int) - scene.image).mean() < 12
        assert sum(a["image_id"] == record["id"] for a in document["annotations"]) == len(scene.masks)


def test_ids_are_unique_over_both_splits(data_set):
    documents = [json.loads((data_set / f"instances_{split}.json").read_text()) for split in ("train", "val")]
    for key in ("images", "annotations"):
        ids = [record["id"] for document in documents for record in document[key]]
        assert len(ids) == len(set(ids))


def test_an_equal_set_is_reused(data_set, monkeypatch):
    monkeypatch.setattr(scenes, "render_scene", lambda *args, **kwargs: pytest.fail("rendered again"))
    assert write_scenes(data_set, num_train=5, num_val=3, seed=1, size=96, progress=False) == data_set


def test_a_set_with_a_missing_image_is_made_anew(tmp_path):
    write_scenes(tmp_path, num_train=2, num_val=0, size=48, progress=False)
    victim = tmp_path / "images" / "train_000001.jpg"
    before = victim.read_bytes()
    victim.unlink()
    write_scenes(tmp_path, num_train=2, num_val=0, size=48, progress=False)
    assert victim.read_bytes() == before


def test_another_seed_or_count_replaces_the_set_and_leaves_no_stale_images(tmp_path):
    write_scenes(tmp_path, num_train=3, num_val=1, size=48, progress=False)
    (tmp_path / "images" / "mine.txt").write_text("not from the generator")
    write_scenes(tmp_path, num_train=1, num_val=1, seed=9, size=48, progress=False)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["mine.txt", "train_000000.jpg", "val_000000.jpg"]
    assert json.loads((tmp_path / "instances_train.json").read_text())["info"]["seed"] == 9


def test_a_larger_set_begins_with_the_smaller_one(tmp_path):
    sets = [write_scenes(tmp_path / str(n), num_train=n, num_val=0, size=48, progress=False) for n in (1, 2)]
    first, second = ((folder / "images" / "train_000000.jpg").read_bytes() for folder in sets)
    assert first == second


@pytest.mark.parametrize("content", ['{"images": [], "annotations": []}', '{"info": {}}', "[]", "no json"])
def test_annotations_of_another_origin_are_never_overwritten(tmp_path, content):
    (tmp_path / "instances_val.json").write_text(content)
    with pytest.raises(ValueError, match="was not written by"):
        write_scenes(tmp_path, num_train=1, num_val=0, size=48, progress=False)
    assert (tmp_path / "instances_val.json").read_text() == content
