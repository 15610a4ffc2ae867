"""What the demo chooses for a start; its runs are in tests/e2e."""

import json

import pytest
import torch
from transformers import Mask2FormerImageProcessor

from factories import NAMES, save_tiny_model, write_shapes
from sim_hf import demo
from sim_hf.demo import (
    _check_comparable,
    _is_at_home,
    _meet_halfway,
    _weights,
    _with_affordable_queries,
    _with_fitting_input,
)
from sim_hf.training.arguments import DataArguments, ModelArguments


def test_the_same_names_in_other_pictures_are_not_home(tmp_path):
    data = DataArguments(data=[str(write_shapes(tmp_path / "shapes"))])
    names = dict(enumerate([*NAMES[:-1], "comet"]))
    upper = {label: name.upper() for label, name in enumerate(NAMES)}
    knows_all, knows_some, knows_upper = (
        ModelArguments(model=str(folder))
        for folder in (
            save_tiny_model(tmp_path / "all"),
            save_tiny_model(tmp_path / "some", id2label=names),
            save_tiny_model(tmp_path / "upper", id2label=upper),
        )
    )
    assert _is_at_home(knows_upper, data, {"bbox/AP": 0.25})
    assert [_is_at_home(knows_all, data, {"bbox/AP": ap}) for ap in (0.25, 0.24, None)] == [True, False, False]
    assert not _is_at_home(knows_some, data, {"bbox/AP": 0.9}) and not _is_at_home(ModelArguments(), data, {"bbox/AP": 0.9})


def test_a_comparison_without_masks_is_refused_before_training(tmp_path):
    shapes = write_shapes(tmp_path / "shapes")
    _check_comparable(DataArguments(data=[str(shapes)]))
    file = shapes / "instances_train.json"
    document = json.loads(file.read_text())
    for annotation in document["annotations"]:
        annotation["segmentation"] = []
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"--compare also trains with the real masks; .*instances_train\.json has none"):
        _check_comparable(DataArguments(data=[str(shapes)]))


def test_the_result_of_a_start_that_knows_all_is_the_mean_of_start_and_end():
    model = torch.nn.BatchNorm1d(2)
    beginning = _weights(model)  # weight 1, bias 0, 0 batches seen
    with torch.no_grad():
        model.weight.copy_(torch.tensor([3.0, -1.0]))
        model.bias.copy_(torch.tensor([0.5, 0.0]))
        model.num_batches_tracked += 7
    _meet_halfway(model, beginning)
    assert model.weight.tolist() == [2.0, 0.0] and model.bias.tolist() == [0.25, 0.0]
    assert model.num_batches_tracked == 7  # a count is not averaged
    assert beginning["weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("typical", "image_size"), [(0.25, 128), (0.3, 96), (0.5, None), (None, None)])  # 16, 19.2, 32 px of 64
def test_small_objects_are_looked_at_in_a_larger_input(tmp_path, monkeypatch, typical, image_size):
    monkeypatch.setattr(demo, "typical_object", lambda train: typical)
    start = ModelArguments(model=str(save_tiny_model(tmp_path / "model")))
    data = DataArguments(data=[str(write_shapes(tmp_path / "shapes"))])
    assert _with_fitting_input(start, data).image_size == image_size


@pytest.mark.parametrize(("crowded", "num_queries"), [(6, None), (80, None), (81, 100), (400, 100)])  # 1.25 queries an object
def test_crowded_images_get_no_more_queries_than_instances_count(tmp_path, monkeypatch, crowded, num_queries):
    monkeypatch.setattr(demo, "crowded_image", lambda train: crowded)
    start = ModelArguments(model=str(save_tiny_model(tmp_path / "model")))
    data = DataArguments(data=[str(write_shapes(tmp_path / "shapes"))])
    assert _with_affordable_queries(start, data).num_queries == num_queries
    assert _with_affordable_queries(ModelArguments(), data).num_queries == num_queries
    condinst = ModelArguments(preset="condinst-tiny")
    assert _with_affordable_queries(condinst, data) == condinst


def test_a_start_that_squashes_images_keeps_its_input(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "typical_object", lambda train: 0.01)
    folder = save_tiny_model(tmp_path / "model")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(folder)
    data = DataArguments(data=[str(write_shapes(tmp_path / "shapes"))])
    assert _with_fitting_input(ModelArguments(model=str(folder)), data) is data
