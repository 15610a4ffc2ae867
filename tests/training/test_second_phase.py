"""The second phase: the teacher's masks of the training images, and a run that goes on with them."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from factories import make_arguments, save_tiny_model, tiny_model, tiny_processor, write_shapes
from sim_hf.data import decode_segmentation, encode_rle
from sim_hf.labeling import network_labeller
from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.training.arguments import SupervisionArguments
from sim_hf.training.hf_trainer import SIMTrainer
from sim_hf.training.second_phase import NO_MASK, OPTIONS, LabelledRows, generate_masks, read_masks
from sim_hf.training.trainer import Trainer

SUPERVISION = {"supervision": "sim", "max_steps": 4, "second_phase": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), empty=(2,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(data, model, tmp_path_factory):
    return Trainer(make_arguments(data, model, tmp_path_factory.mktemp("rows"))).data.train


def labeller_of(model):
    network, processor = SIMForInstanceSegmentation.from_pretrained(model), SIMImageProcessor.from_pretrained(model)
    return network_labeller(network, processor, OPTIONS)


def rle(height=4, width=5):
    return json.dumps(encode_rle(np.eye(height, width, dtype=bool)))


def test_rows_bring_generated_masks_and_keep_their_real_ones():
    plain = [{"image_id": 7, "objects": {"bbox": [[0, 0, 2, 2], [1, 1, 2, 2]], "category": [0, 1]}}]
    assert LabelledRows(plain, [[rle(), NO_MASK]])[0]["objects"]["segmentation"] == [rle(), NO_MASK]
    assert "segmentation" not in plain[0]["objects"]
    real = [{"objects": {"bbox": [[0, 0, 2, 2]] * 2, "segmentation": ["real", ""]}}]
    assert LabelledRows(real, [[rle(), rle()]])[0]["objects"]["segmentation"] == ["real", rle()]


def test_masks_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="1 rows and masks of 2"):
        LabelledRows([{}], [[], []])
    with pytest.raises(ValueError, match="row 0 has 1 objects and generated masks of 2"):
        LabelledRows([{"objects": {"bbox": [[0, 0, 1, 1]]}}], [[rle(), rle()]])[0]


def test_every_usable_box_gets_a_mask_inside_it_whatever_the_number_of_processes(rows, model, tmp_path):
    labeller = labeller_of(model)
    whole = generate_masks(labeller, rows, tmp_path / "one", min_confidence=0.0)
    assert [len(masks) for masks in whole] == [len(row["objects"]["bbox"]) for row in rows]
    assert whole[2] == []  # the empty image
    for row, masks in zip(rows, whole, strict=True):
        for (x, y, w, h), mask in zip(row["objects"]["bbox"], masks, strict=True):
            inside = decode_segmentation(mask, row["height"], row["width"], annotation_id=0)
            columns, lines = inside.any(0).nonzero()[0], inside.any(1).nonzero()[0]
            assert x - 1 <= columns.min() and columns.max() <= x + w and y - 1 <= lines.min() and lines.max() <= y + h
    # The second process first; the first one joins the parts.
    with pytest.raises(FileNotFoundError):
        generate_masks(labeller, rows, tmp_path / "two", process_index=1, num_processes=2)
    generate_masks(labeller, rows, tmp_path / "two", process_index=0, num_processes=2)
    assert read_masks(tmp_path / "two", min_confidence=0.0) == whole
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["masks.jsonl"]


def test_doubtful_masks_crowds_and_boxes_without_area_stay_boxes(rows, model, tmp_path):
    labeller = labeller_of(model)
    row = dict(rows[0])
    objects = row["objects"]
    box = objects["bbox"][0]
    objects = {"bbox": [box, box, [*box[:3], 0.0]], "category": [0, 0, 0], "iscrowd": [False, True, False]}
    masks = generate_masks(labeller, [row | {"objects": objects}], tmp_path, min_confidence=0.0)
    assert [mask == NO_MASK for mask in masks[0]] == [False, True, True]
    assert read_masks(tmp_path, min_confidence=1.1) == [[NO_MASK] * 3]


def test_from_its_start_on_masks_are_trained_on_and_the_teacher_is_not_asked(data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, **SUPERVISION))
    seen = []
    prepare = trainer.step.prepare
    trainer.step.prepare = lambda batch: seen.append(batch) or prepare(batch)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert trainer.step.second_phase
    assert [("pseudo_trusted_share" in line) for line in lines] == [True, True, False, False]
    assert ["masks" in label for batch in seen[:2] for label in batch["labels"]] == [False] * 2 * len(seen[0]["labels"])
    kept = [mask != NO_MASK for row in read_masks(tmp_path / "second_phase") for mask in row]
    with_mask = [bool(label["has_mask"].any()) for batch in seen[2:] for label in batch["labels"]]
    assert any(kept) and any(with_mask)


@pytest.mark.parametrize("options", [{"second_phase": 1.0}, {"supervision": "boxinst"}, {"second_phase": 8}])
def test_never_for_the_paper_other_supervisions_or_a_start_behind_the_end(options, data, model, tmp_path):
    trainer = Trainer(make_arguments(data, model, tmp_path, **{**SUPERVISION, **options, "max_steps": 2}))
    trainer.train()
    assert not trainer.step.second_phase
    assert not (tmp_path / "second_phase").exists()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_goes_on_with_the_same_masks_and_the_same_bits(stop_after, data, model, tmp_path):
    options = {**SUPERVISION, "learning_rate": 1e-4}
    whole = Trainer(make_arguments(data, model, tmp_path / "whole", **options))
    whole.train()
    Trainer(make_arguments(data, model, tmp_path / "parts", stop_after=stop_after, **options)).train()
    AcceleratorState._reset_state(True)
    resumed = Trainer(make_arguments(data, model, tmp_path / "parts", resume="auto", **options))
    resumed.train()
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], tensor), name


def test_a_run_whose_masks_are_gone_says_which_file_is_missing(data, model, tmp_path):
    Trainer(make_arguments(data, model, tmp_path, stop_after=3, **SUPERVISION)).train()
    (tmp_path / "second_phase" / "masks.jsonl").unlink()
    AcceleratorState._reset_state(True)
    with pytest.raises(FileNotFoundError, match=r"second_phase.masks\.jsonl"):
        Trainer(make_arguments(data, model, tmp_path, resume="auto", **SUPERVISION)).train()


def test_a_trainer_of_transformers_has_none_and_says_so(rows, tmp_path):
    with pytest.raises(ValueError, match="only `sim-hf train` has a second phase"):
        SIMTrainer(
            model=tiny_model(),
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            supervision=SupervisionArguments(second_phase=0.5),
            image_processor=tiny_processor(),
            train_dataset=rows,
        )
