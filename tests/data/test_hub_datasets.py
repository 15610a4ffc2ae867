"""Detection data sets in the ways the Hub spells them, saved in folders, all read into the columns of `load_coco`."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from sim_hf.data.annotation_file import write_coco
from sim_hf.data.category_ids import category_ids
from sim_hf.data.coco import coco_features, load_coco
from sim_hf.data.hub import load_detection_dataset

BOXES = [[10.0, 20.0, 30.0, 40.0], [90.0, 70.0, 20.0, 20.0]]  # the second leaves the image of 100 x 80


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def picture(size=(100, 80)):
    return Image.new("RGB", size, "green")


def dataset_of(categories, feature, *, boxes=BOXES, **columns):
    rows = [{"image": picture(), "objects": {"bbox": boxes, "category": categories}, **columns}]
    rows.append({"image": picture((7, 9)), "objects": {"bbox": [], "category": []}, **columns})
    objects = {"bbox": List(List(Value("float32"), length=4)), "category": List(feature)}
    extra = {name: Value("int64" if isinstance(value, int) else "string") for name, value in columns.items()}
    return Dataset.from_list(rows, features=Features({"image": datasets.Image(), "objects": objects, **extra}))


@pytest.fixture
def saved(tmp_path):
    def save(dataset):
        dataset.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def test_class_labels_are_taken_and_what_is_missing_is_filled(saved):
    dataset = load_detection_dataset(saved(dataset_of([2, 0], ClassLabel(names=["a", "b", "c"]))))
    assert dataset.features == coco_features(["a", "b", "c"])
    first, second = dataset[0], dataset[1]
    assert (first["image_id"], first["width"], first["height"]) == (0, 100, 80)
    assert (second["image_id"], second["width"], second["height"]) == (1, 7, 9)
    assert first["image"].size == (100, 80)
    assert first["objects"]["bbox"] == [[10, 20, 30, 40], [90, 70, 10, 10]]
    assert first["objects"]["category"] == [2, 0] and first["objects"]["area"] == [1200, 100]
    assert first["objects"]["iscrowd"] == [False, False] and len(set(first["objects"]["id"])) == 2
    assert second["objects"]["bbox"] == [] and category_ids(dataset) == [0, 1, 2]


def test_plain_integers_are_numbered_in_order_and_keep_their_value_as_id(saved):
    dataset = load_detection_dataset(saved(dataset_of([7, 3], Value("int64"))))
    assert dataset.features["objects"]["category"].feature.names == ["3", "7"]
    assert dataset[0]["objects"]["category"] == [1, 0] and category_ids(dataset) == [3, 7]


def test_plain_integers_are_the_labels_when_class_names_are_given(saved):
    path = saved(dataset_of([1, 0], Value("int64")))
    assert load_detection_dataset(path, class_names=["a", "b"])[0]["objects"]["category"] == [1, 0]
    with pytest.raises(ValueError, match="row 0: category 1 is not among the 1 classes"):
        load_detection_dataset(path, class_names=["a"])


def test_words_are_classes(saved):
    dataset = load_detection_dataset(saved(dataset_of(["owl", "cat"], Value("string"))))
    assert dataset.features["objects"]["category"].feature.names == ["cat", "owl"]
    assert dataset[0]["objects"]["category"] == [1, 0]


def test_a_list_of_records_is_read_as_well(saved):
    objects = [{"boxes": box, "label": label} for box, label in zip(BOXES, (1, 0), strict=True)]
    feature = List({"boxes": List(Value("float32")), "label": ClassLabel(names=["a", "b"])})
    rows = [{"image": picture(), "objects": objects}, {"image": picture(), "objects": []}]
    dataset = load_detection_dataset(
        saved(Dataset.from_list(rows, features=Features({"image": datasets.Image(), "objects": feature})))
    )
    assert dataset[0]["objects"]["category"] == [1, 0] and dataset[1]["objects"]["bbox"] == []


def test_ids_and_sizes_that_are_there_are_kept_and_names_are_no_ids(saved, tmp_path):
    label = ClassLabel(names=["a", "b"])
    kept = load_detection_dataset(saved(dataset_of([1, 0], label, image_id=42, width=100, height=80)))
    assert kept["image_id"][:] == [42, 42]
    dataset_of([1, 0], label, image_id="000042.jpg").save_to_disk(tmp_path / "named")
    assert load_detection_dataset(tmp_path / "named")["image_id"][:] == [0, 1]


def test_parquet_folders_and_files_are_read(tmp_path):
    dataset = dataset_of([1, 0], ClassLabel(names=["a", "b"]))
    dataset.to_parquet(tmp_path / "data" / "train-00000.parquet")
    for path in (tmp_path / "data", tmp_path / "data" / "train-00000.parquet"):
        assert load_detection_dataset(path)[0]["objects"]["category"] == [1, 0]


def test_streams_give_the_same_rows(saved):
    path = saved(dataset_of([2, 0], ClassLabel(names=["a", "b", "c"])))
    rows, stream = load_detection_dataset(path), load_detection_dataset(path, streaming=True)
    assert isinstance(stream, datasets.IterableDataset) and stream.features == rows.features
    streamed = list(stream)
    assert [row["objects"] for row in streamed] == [row["objects"] for row in rows]
    assert [row["image"].size for row in streamed] == [(100, 80), (7, 9)]
    assert category_ids(stream) == [0, 1, 2]


def test_a_stream_of_plain_integers_needs_class_names(saved):
    path = saved(dataset_of([1, 0], Value("int64")))
    with pytest.raises(ValueError, match="to stream it, give class_names"):
        load_detection_dataset(path, streaming=True)
    assert next(iter(load_detection_dataset(path, streaming=True, class_names=["a", "b"])))["objects"]["category"] == [1, 0]


def test_what_load_coco_made_comes_back_as_it_was(tmp_path):
    picture().save(tmp_path / "1.png")
    annotation = {"id": 5, "image_id": 1, "category_id": 30, "bbox": [1, 2, 3, 4], "segmentation": [[1, 1, 5, 1, 5, 5]]}
    images = [{"id": 1, "file_name": "1.png", "width": 100, "height": 80}]
    categories = [{"id": 30, "name": "cat"}, {"id": 20, "name": "dog"}]
    write_coco(tmp_path / "a.json", {"images": images, "annotations": [annotation], "categories": categories})
    made = load_coco(tmp_path, tmp_path / "a.json", with_masks=True, cache_dir=tmp_path / "cache")
    made.save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        loaded = load_detection_dataset(tmp_path / "saved", streaming=streaming)
        assert category_ids(loaded) == [20, 30]
        assert next(iter(loaded))["objects"] == made[0]["objects"]


def test_a_dict_of_splits_gives_the_split_or_names_those_there_are(saved):
    path = saved(DatasetDict({"small": dataset_of([1, 0], ClassLabel(names=["a", "b"]))}))
    assert len(load_detection_dataset(path, "small")) == 2
    with pytest.raises(ValueError, match="no split 'train', it has 'small'"):
        load_detection_dataset(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "a"}, r"expected `image` \(Image\) and `objects` with `bbox` and `category`, it has text \(Value\)"),
        ({"image": "a.png", "objects": {"bbox": [[1.0]], "category": [1]}}, r"it has image \(Value\)"),
        ({"image": picture(), "objects": {"bbox": [[1.0]]}}, "`objects` has bbox"),
        ({"image": picture(), "objects": "none"}, "`objects` is Value"),
    ],
)
def test_other_columns_are_refused_by_name(columns, message, saved):
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(saved(Dataset.from_list([columns])))


def test_corners_and_relative_boxes_are_refused(saved, tmp_path):
    label = ClassLabel(names=["a", "b"])
    corners = [[60.0, 30.0, 90.0, 70.0], [40.0, 20.0, 95.0, 79.0], [55.0, 10.0, 99.0, 40.0]]
    path = saved(dataset_of([0, 1, 0], label, boxes=corners))
    with pytest.raises(ValueError, match="give box_format='xyxy'"):
        load_detection_dataset(path)
    assert load_detection_dataset(path, box_format="xyxy")[0]["objects"]["bbox"][0] == [60, 30, 30, 40]
    dataset_of([0], label, boxes=[[0.1, 0.2, 0.5, 0.5]]).save_to_disk(tmp_path / "relative")
    with pytest.raises(ValueError, match=r"boxes lie within 0\.\.1, expected pixels"):
        load_detection_dataset(tmp_path / "relative")


def test_paths_that_are_not_there_are_named_before_the_hub_is_asked(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        load_detection_dataset(tmp_path / "nowhere")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a folder or a \.parquet file"):
        load_detection_dataset(tmp_path / "a.json")
