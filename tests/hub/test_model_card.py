"""The card says what the run did, and the Hub accepts it."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from factories import tiny_model, tiny_processor
from sim_hf.data.scenes import CLASS_NAMES
from sim_hf.hub import CardError, RunFacts, check_model_card, facts_of_run, push_model, write_model_card
from sim_hf.hub.card_check import card_problems
from sim_hf.hub.card_picture import scenes_picture
from sim_hf.hub.run_facts import DataFacts, shareable_command


@pytest.fixture
def card(hub, run):
    push_model(run, "ann/shapes")
    return ModelCard.load("ann/shapes")


def test_the_card_of_a_run_tells_data_supervision_schedule_results_command_and_commit(card, run):
    results = json.loads((run / "results.json").read_text())
    text = card.text
    assert "Boxes only: this training read no mask" in text
    assert "| data | shapes: 8 images, 12 boxes |" in text
    assert "ellipse, rectangle" in text
    assert "| steps | 2 of 2 |" in text and "learning rate 0.0005" in text and "| seed | 0 |" in text
    assert "| start | start |" in text
    assert f"| AP | {results['segm/AP']:.3f} | {results['bbox/AP']:.3f} |" in text
    assert f"| AP50 | {results['segm/AP50']:.3f} | {results['bbox/AP50']:.3f} |" in text
    assert results["git"]["commit"] in text
    assert f"torch {results['versions']['torch']}" in text
    assert "fill" in text and "would be filled boxes" in text
    assert "```bash\n" in text


def test_its_metadata_is_what_the_hub_understands(card, run, hub):
    results = json.loads((run / "results.json").read_text())
    data = card.data.to_dict()
    assert data["license"] == "cc-by-nc-4.0"  # of the model that the run started from
    assert data["library_name"] == "sim_hf" and data["pipeline_tag"] == "image-segmentation"
    assert {"instance-segmentation", "box-supervised", "mask2former"} <= set(data["tags"])
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["mask AP"] == pytest.approx(results["segm/AP"], abs=1e-5)
    assert found["box AP50"] == pytest.approx(results["bbox/AP50"], abs=1e-5)
    check_model_card(str(card))
    card.validate()
    assert ("POST", "/api/validate-yaml") in hub.requests


def test_the_card_names_no_path_of_the_machine(card, run, shapes):
    text = str(card)
    for folder in (run, shapes, run.parent, shapes.parent):
        assert str(folder) not in text
    assert not re.search(r"(?<![\w.:/])/(tmp|home|work|root|usr)/", text)


def test_a_run_with_masks_does_not_say_boxes_only():
    for facts in (RunFacts(supervision="full", used_masks=True), RunFacts(supervision="sim", used_masks=True)):
        card = str(write_model_card("ann/a", facts, architecture="Mask2Former", classes=["x"], num_parameters=1))
        assert "Real masks were used" in card and "Boxes only" not in card and "box-supervised" not in card
    nothing_known = str(write_model_card("ann/a", RunFacts(), architecture="Mask2Former", classes=["x"], num_parameters=1))
    assert "Boxes only" not in nothing_known and "Real masks" not in nothing_known and "model-index" not in nothing_known
    check_model_card(nothing_known)


def test_data_and_models_of_the_hub_are_linked():
    facts = RunFacts(supervision="sim", train=[DataFacts("ann/boxes, train", "ann/boxes")], base_model="bob/start")
    data = write_model_card("ann/a", facts, architecture="Mask2Former", classes=["x"], num_parameters=1, license="mit").data
    assert data.datasets == ["ann/boxes"] and data.base_model == "bob/start"


def test_class_names_cannot_write_the_card():
    facts = RunFacts(supervision="sim", metrics={"segm/AP": 0.5})
    evil = ["a\n---\nlicense: mit", "<script>", "| x |", "[link](http://x)", "{{ facts }}"]
    card = write_model_card("ann/a", facts, architecture="Mask2Former", classes=evil, num_parameters=1)
    assert card.data.license == "unknown" and "<script>" not in str(card).replace("\\<script\\>", "")
    assert "\nlicense: mit" not in card.text and "RunFacts" not in card.text
    check_model_card(str(card))


def test_pictures_of_others_are_shown_only_when_asked_for(hub, run):
    push_model(run, "ann/plain")
    assert not any(name.endswith(".jpg") for name in hub.files("ann/plain"))
    push_model(run, "ann/shown", card_pictures=True)
    sheet = hub.files("ann/shown")["pictures/instances.jpg"]
    assert sheet == sorted((run / "pictures").glob("step-*.jpg"))[-1].read_bytes()
    assert "![Validation images" in hub.files("ann/shown")["README.md"].decode()


def test_a_model_that_knows_the_generated_classes_shows_them():
    names = dict(enumerate([*CLASS_NAMES, "other"]))
    model = tiny_model(id2label=names, label2id={name: label for label, name in names.items()})
    picture = scenes_picture(model, tiny_processor())
    assert picture is not None and picture[:2] == b"\xff\xd8"
    assert scenes_picture(tiny_model(), tiny_processor()) is None


def test_a_run_of_which_nothing_is_left_gives_empty_facts(tmp_path):
    assert facts_of_run(tmp_path) == RunFacts()
    (tmp_path / "results.json").write_text("[1")
    (tmp_path / "metrics.jsonl").write_text('{"fill"')
    assert facts_of_run(tmp_path) == RunFacts()


@pytest.mark.parametrize(
    ("command", "shared"),
    [
        ("sim-hf train --data /home/ann/photos/tiny", "sim-hf train --data tiny"),
        ("sim-hf train --data '/home/ann/my photos' --x=../a/b", "sim-hf train --data 'my photos' --x=b"),
        ("sim-hf train --output_dir runs/mine --model ~/models/a", "sim-hf train --output_dir runs/mine --model a"),
        ("python train.py --token hf_abcdefghijklmnop", "python train.py --token '***'"),
    ],
)
def test_a_command_is_shared_without_the_machine(command, shared):
    assert shareable_command(command) == shared


GOOD = {"license": "mit", "library_name": "sim_hf", "pipeline_tag": "image-segmentation", "tags": ["a"]}
RESULT = {"task": {"type": "x"}, "dataset": {"type": "y", "name": "z"}, "metrics": [{"type": "m", "value": 0.5}]}


def index_with(**changes):
    return front_matter(**{"model-index": [{"name": "a", "results": [{**RESULT, **changes}]}]})


def front_matter(**changes):
    data = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    return f"---\n{json.dumps(data)}\n---\n# A\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# A", "begins without metadata"),
        ("---\na: [\n---\n", "not YAML"),
        ("---\n- a\n---\n", "no mapping"),
        *((front_matter(**{name: None}), f"{name} is missing") for name in GOOD),
        (front_matter(license="Apache License 2.0"), "license must be an identifier"),
        (front_matter(pipeline_tag=["a"]), "pipeline_tag must be an identifier"),
        (front_matter(tags="a"), "tags must be a list"),
        (front_matter(metrics=[1]), "metrics must be a list"),
        (front_matter(datasets=["/home/ann/photos"]), "datasets must be a list of Hub ids"),
        (front_matter(**{"model-index": [{"results": []}]}), "model-index must be a list of"),
        (index_with(task={}), "task needs type"),
        (
            front_matter(**{"model-index": [{"name": "a", "results": [{**RESULT, "dataset": {"type": "y"}}]}]}),
            "dataset needs type",
        ),
        (index_with(metrics=[{"value": 1}]), "needs its type"),
        (
            front_matter(**{"model-index": [{"name": "a", "results": [{**RESULT, "metrics": [{"type": "m", "value": "?"}]}]}]}),
            "no number",
        ),
    ],
)
def test_faults_of_a_card_are_found_without_the_hub(text, problem):
    assert any(problem in found for found in card_problems(text)), card_problems(text)
    with pytest.raises(CardError, match="the model card"):
        check_model_card(text)


def test_a_good_card_has_no_fault():
    assert card_problems(front_matter(**{"model-index": [{"name": "a", "results": [RESULT]}]})) == []
