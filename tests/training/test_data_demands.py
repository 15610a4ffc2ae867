"""What training images ask for: queries for many objects, a larger input for small ones."""

import json

import pytest

from factories import NAMES, save_tiny_condinst, save_tiny_model, write_shapes
from sim_hf.data import MixedRows, load_coco
from sim_hf.training.arguments import ModelArguments
from sim_hf.training.assembly import build_model
from sim_hf.training.data_demands import crowded_image, fitting_input, typical_object


def rows_with(tmp_path, counts):
    """Rows whose images have so many boxes."""
    folder = write_shapes(tmp_path / "shapes", num_train=len(counts), num_val=1)
    path = folder / "instances_train.json"
    document = json.loads(path.read_text())
    box = document["annotations"][0]
    document["annotations"] = [
        {**box, "id": 100 * image["id"] + k, "image_id": image["id"], "bbox": [2, 2, 10 + k, 10]}
        for image, count in zip(document["images"], counts, strict=True)
        for k in range(count)
    ]
    path.write_text(json.dumps(document))
    return load_coco(folder / "images", path)


def build(model=None, crowded=0, **options):
    return build_model(ModelArguments(model=model, **options), names=list(NAMES), category_ids=[3, 8], crowded=crowded)


def test_objects_are_counted_over_all_data_sets_and_an_image_without_any_counts(tmp_path):
    rows = rows_with(tmp_path, [3, 0, 5])
    mixed = MixedRows([rows, rows])
    assert mixed.object_counts() == [3, 0, 5, 3, 0, 5] == [len(mixed[i]["objects"]["bbox"]) for i in range(6)]
    assert crowded_image(mixed) == 5 and crowded_image(iter(())) == 0


def test_one_image_in_a_hundred_may_hold_more(tmp_path, monkeypatch):
    mixed = MixedRows([rows_with(tmp_path, [1, 1])])
    monkeypatch.setattr(mixed, "object_counts", lambda: [4] * 98 + [7, 900])
    assert crowded_image(mixed) == 7


def test_a_network_gets_queries_for_its_data(tmp_path):
    start = str(save_tiny_model(tmp_path / "model"))  # 8 queries
    assert [build(start, crowded)[0].config.num_queries for crowded in (0, 8, 9, 400)] == [8, 8, 12, 300]
    network, _, report = build(start, 9)
    assert "12 queries instead of 8" in report[-1] and "99 hold at most 9" in report[-1]
    assert network.model.transformer_module.queries_features.num_embeddings == 12


def test_the_number_that_is_asked_for_wins(tmp_path):
    start = str(save_tiny_model(tmp_path / "model"))
    assert build(start, 9, num_queries=8)[0].config.num_queries == 8
    assert build(start, 0, num_queries=20)[0].config.num_queries == 20
    assert build(None, 0, preset="tiny", num_queries=40)[0].config.num_queries == 40
    with pytest.raises(ValueError, match="has 8 queries; 5 would"):
        build(start, num_queries=5)


def test_condinst_has_no_queries(tmp_path):
    start = str(save_tiny_condinst(tmp_path / "model"))
    assert not any("queries instead" in line for line in build(start, 500)[2])
    with pytest.raises(ValueError, match="CondInst has none"):
        build(start, num_queries=100)


def test_the_typical_object_is_the_median_as_a_share_of_the_longest_side(tmp_path):
    mixed = MixedRows([rows_with(tmp_path, [3, 0, 1])])  # of 56 x 64 px: boxes of 10 x 10, 11 x 10, 12 x 10 and 10 x 10
    assert typical_object(mixed) == pytest.approx((10 + 110**0.5) / 2 / 64)
    assert typical_object(MixedRows([rows_with(tmp_path / "empty", [0, 0])])) is None and typical_object(iter(())) is None


@pytest.mark.parametrize(
    ("typical", "fitting"),
    [(None, 256), (0.5, 256), (28 / 256, 256), (0.1, 288), (15 / 256, 480), (0.001, 512)],  # 280, 477.9 and 28000 px
)
def test_small_objects_ask_for_a_larger_input(typical, fitting):
    assert fitting_input(typical, 256) == fitting
