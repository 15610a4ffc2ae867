"""What is pushed comes back as it was, through the real client libraries."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

from factories import NAMES, tiny_model, tiny_processor
from sim_hf.data import decode_segmentation, load_coco, load_detection_dataset
from sim_hf.hub import coco_dataset, push_dataset, push_model, push_space
from sim_hf.hub.repository import HubError
from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor

MODEL_FILES = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_model_and_processor_come_back_bit_for_bit(hub):
    model, processor = tiny_model("swin"), tiny_processor()
    model.push_to_hub("ann/shapes")
    processor.push_to_hub("ann/shapes")
    assert same_weights(SIMForInstanceSegmentation.from_pretrained("ann/shapes"), model)
    assert SIMImageProcessor.from_pretrained("ann/shapes").to_dict() == processor.to_dict()
    assert same_weights(AutoModelForInstanceSegmentation.from_pretrained("ann/shapes"), model)
    assert isinstance(AutoImageProcessor.from_pretrained("ann/shapes"), SIMImageProcessor)


def test_a_run_is_pushed_in_one_commit_and_only_what_is_on_the_list(hub, run):
    push_model(run, "ann/shapes")
    files = hub.files("ann/shapes")
    assert set(files) == MODEL_FILES
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert len(HfApi().list_repo_commits("ann/shapes")) == 2  # the Hub's first, and ours
    local = SIMForInstanceSegmentation.from_pretrained(run / "model")
    assert same_weights(SIMForInstanceSegmentation.from_pretrained("ann/shapes"), local)


def test_older_revisions_and_branches_stay_loadable(hub, run, tmp_path):
    first = push_model(run, "ann/shapes").oid
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    push_model(tmp_path, "ann/shapes")
    push_model(run, "ann/shapes", revision="from/first")
    HfApi().create_tag("ann/shapes", tag="v1", revision=first)
    local = SIMForInstanceSegmentation.from_pretrained(run / "model")
    assert same_weights(SIMForInstanceSegmentation.from_pretrained("ann/shapes"), other)
    for revision in (first, "v1", "from/first"):
        assert same_weights(SIMForInstanceSegmentation.from_pretrained("ann/shapes", revision=revision), local)


def test_a_push_replaces_the_shards_of_an_earlier_one(hub, run, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_processor().save_pretrained(tmp_path)
    push_model(tmp_path, "ann/shapes")
    assert sum(name.endswith(".safetensors") for name in hub.files("ann/shapes")) > 1
    assert same_weights(SIMForInstanceSegmentation.from_pretrained("ann/shapes"), model)
    push_model(run, "ann/shapes")
    assert set(hub.files("ann/shapes")) == MODEL_FILES


def test_the_same_push_twice_makes_no_second_commit(hub, run):
    assert push_model(run, "ann/shapes").oid == push_model(run, "ann/shapes").oid


def test_private_repositories_are_seen_by_their_owner_only(hub, run, tmp_path, monkeypatch):
    push_model(run, "ann/secret", private=True)
    assert hub.repos["models", "ann/secret"].private
    SIMForInstanceSegmentation.from_pretrained("ann/secret")
    for token in ("hf_other", "hf_wrong", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match="ann/secret"):
            SIMForInstanceSegmentation.from_pretrained("ann/secret", cache_dir=tmp_path / "fresh")
        with pytest.raises(RepositoryNotFoundError) if token != "hf_wrong" else pytest.raises(OSError, match="401"):
            HfApi().model_info("ann/secret")


def test_a_public_repository_does_not_take_a_private_push(hub, run):
    push_model(run, "ann/open")
    before = hub.head("ann/open")
    with pytest.raises(HubError, match="ann/open is there already and public"):
        push_model(run, "ann/open", private=True)
    assert hub.head("ann/open") == before


def test_a_card_of_ones_own_is_taken_as_it_is(hub, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    card = "---\nlicense: mit\nlibrary_name: sim_hf\npipeline_tag: image-segmentation\ntags: [mine]\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(card)
    push_model(tmp_path, "ann/mine")
    assert hub.files("ann/mine")["README.md"].decode() == card
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="begins without metadata"):
        push_model(tmp_path, "ann/other")
    assert ("models", "ann/other") not in hub.repos


def test_what_does_not_load_is_not_pushed(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json and preprocessor_config\.json is missing|is missing"):
        push_model(tmp_path, "ann/broken")
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(Exception, match=r"(?i)safetensors|header"):
        push_model(tmp_path, "ann/broken")
    assert not hub.repos


def rows_of(dataset):
    return [{name: value for name, value in row.items() if name != "image"} for row in dataset]


def pixels(dataset):
    return [row["image"].convert("RGB").tobytes() for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
def test_boxes_come_back_as_they_were(hub, shapes, tmp_path, streaming):
    splits = {
        "train": coco_dataset(shapes / "images", shapes / "instances_train.json", cache_dir=tmp_path),
        "validation": coco_dataset(shapes / "images", shapes / "instances_val.json", cache_dir=tmp_path),
    }
    push_dataset(splits, "ann/boxes", license="cc0-1.0")
    assert len(HfApi().list_repo_commits("ann/boxes", repo_type="dataset")) == 2
    for split, rows in splits.items():
        back = datasets.load_dataset("ann/boxes", split=split, streaming=streaming)
        assert back.features == rows.features
        assert rows_of(back) == rows_of(rows)
        assert pixels(back) == pixels(rows)
        assert rows_of(load_detection_dataset("ann/boxes", split, streaming)) == rows_of(rows)
    contents = b"".join(hub.files("ann/boxes", "datasets").values())
    assert str(shapes).encode() not in contents and b"segmentation" not in contents


def test_generated_masks_come_back_with_their_scores(hub, shapes, tmp_path):
    document = json.loads((shapes / "instances_val.json").read_text())
    for annotation in document["annotations"]:
        annotation["score"] = annotation["id"] / 16
    labelled = tmp_path / "labelled.json"
    labelled.write_text(json.dumps(document))
    rows = coco_dataset(shapes / "images", labelled, with_masks=True, cache_dir=tmp_path)
    push_dataset({"train": rows}, "ann/masks")
    back = datasets.load_dataset("ann/masks", split="train")
    assert rows_of(back) == rows_of(rows) and pixels(back) == pixels(rows)
    objects = back[0]["objects"]
    assert objects["score"] == [number / 16 for number in objects["id"]]
    mask = decode_segmentation(objects["segmentation"][0], back[0]["height"], back[0]["width"])
    assert mask.shape == (back[0]["height"], back[0]["width"]) and mask.any()
    card = hub.files("ann/masks", "datasets")["README.md"].decode()
    assert "generated from the boxes" in card and "image-segmentation" in card
    trained_on = load_detection_dataset("ann/masks", "train")
    assert "segmentation" in trained_on.features["objects"] and trained_on[0]["objects"]["bbox"] == objects["bbox"]


def test_a_data_set_goes_up_in_shards_and_a_smaller_one_replaces_them(hub, shapes, tmp_path, monkeypatch):
    rows = coco_dataset(shapes / "images", shapes / "instances_train.json", cache_dir=tmp_path)
    monkeypatch.setattr("sim_hf.hub.dataset.SHARD_BYTES", 500)
    push_dataset({"train": rows}, "ann/boxes")
    assert sum(name.endswith(".parquet") for name in hub.files("ann/boxes", "datasets")) > 2
    assert rows_of(datasets.load_dataset("ann/boxes", split="train")) == rows_of(rows)
    monkeypatch.setattr("sim_hf.hub.dataset.SHARD_BYTES", 10**9)
    push_dataset({"train": rows.select(range(3))}, "ann/boxes")
    names = {name for name in hub.files("ann/boxes", "datasets") if name.endswith(".parquet")}
    assert names == {"data/train-00000-of-00001.parquet"}


def test_the_push_of_datasets_itself_works_too(hub, shapes, tmp_path):
    rows = load_coco(shapes / "images", shapes / "instances_val.json", with_masks=True, cache_dir=tmp_path)
    rows.push_to_hub("ann/plain", split="validation")
    back = load_detection_dataset("ann/plain", "validation")
    assert rows_of(back) == rows_of(rows) and pixels(back) == pixels(rows)


def test_a_data_set_without_a_split_or_with_other_classes_is_refused(hub, shapes, tmp_path):
    rows = coco_dataset(shapes / "images", shapes / "instances_val.json", cache_dir=tmp_path)
    other = datasets.Dataset.from_list([{"a": 1}])
    with pytest.raises(ValueError, match="at least one split"):
        push_dataset({}, "ann/boxes")
    with pytest.raises(ValueError, match="'test' has other classes or columns"):
        push_dataset({"train": rows, "test": other}, "ann/boxes")
    assert not hub.repos and rows.features["objects"]["category"].feature.names == list(NAMES)


def test_a_space_goes_up_without_pictures_and_secrets(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nsdk: gradio\napp_file: app.py\ntitle: Masks\n---\n")
    (tmp_path / "app.py").write_text("import gradio\n")
    (tmp_path / "requirements.txt").write_text("gradio\n")
    (tmp_path / "photo.jpg").write_bytes(b"someone")
    (tmp_path / ".env").write_text("TOKEN=1")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "app.pyc").write_bytes(b"0")
    push_space(tmp_path, "ann/space", model="ann/shapes")
    assert set(hub.files("ann/space", "spaces")) == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    back = snapshot_download("ann/space", repo_type="space")
    assert (tmp_path / "app.py").read_text() == Path(back, "app.py").read_text()
    assert hub.variables["ann/space"] == {"SIM_MODEL": "ann/shapes"}
    (tmp_path / "app.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"app\.py: the README\.md names it"):
        push_space(tmp_path, "ann/space")
