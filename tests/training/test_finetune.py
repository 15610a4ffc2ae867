"""From a stock Mask2Former checkpoint of transformers (masks, its own classes) to boxes only, on other classes."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from factories import NAMES, SIZE, tiny_config, write_shapes
from sim_hf.cli import main
from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.training.arguments import ModelArguments, RunArguments, read_config, steps_of
from sim_hf.training.assembly import build_model
from sim_hf.training.optimizer import build_optimizer

PRESET = Path(__file__).parents[2] / "scripts" / "configs" / "finetune-coco.yaml"
STOCK_NAMES = ["kite", "Ellipse", "person"]  # one class is ours, too


def save_stock(folder, backbone="resnet", size=None):
    """What `save_pretrained` of transformers' own classes leaves."""
    fields = tiny_config(backbone).to_dict()
    for name in ("model_type", "freeze_batch_norm", "category_ids", "box_prompts"):
        fields.pop(name)
    fields |= {"id2label": dict(enumerate(STOCK_NAMES)), "label2id": {name: i for i, name in enumerate(STOCK_NAMES)}}
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**fields))
    model.save_pretrained(folder)
    size = size or {"height": SIZE, "width": SIZE}  # as the checkpoints of the Hub have it, there 384 x 384
    Mask2FormerImageProcessor(size=size, ignore_index=255).save_pretrained(folder)
    return model


def build(folder, **options):
    image_size = options.pop("image_size", None)
    names, ids = list(NAMES), [3, 8]
    return build_model(ModelArguments(model=str(folder), **options), names=names, category_ids=ids, image_size=image_size)


def test_heads_are_joined_by_name_and_everything_else_is_kept(tmp_path):
    stock = save_stock(tmp_path)
    network, _, report = build(tmp_path)
    assert "1 transferred (ellipse), 1 fresh (rectangle)" in report[0]
    head, old = network.class_predictor, stock.class_predictor
    assert torch.equal(head.weight[[0, 2]], old.weight[[1, 3]]) and head.out_features == 3
    kept = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("class_predictor")}
    theirs = stock.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in kept.items()) and len(kept) > 100
    assert network.config.category_ids == [3, 8] and not network.config.box_prompts
    assert build(tmp_path, box_prompts=True)[0].config.box_prompts


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [
        ({"height": 64, "width": 96}, None, (96, None)),
        ({"height": 64, "width": 96}, 128, (128, None)),
        ({"shortest_edge": 48, "longest_edge": 64}, None, (64, 48)),
        ({"shortest_edge": 48, "longest_edge": 64}, 128, (128, 48)),
    ],
)
def test_images_keep_their_aspect_ratio_whatever_the_checkpoint_did(tmp_path, size, image_size, expected):
    save_stock(tmp_path, size=size)
    _, processor, report = build(tmp_path, image_size=image_size)
    assert (processor.size.longest_edge, processor.size.shortest_edge) == expected
    assert processor.size.height is None
    assert any("keep their aspect ratio" in line for line in report) is ("height" in size and image_size is None)


def test_a_checkpoint_without_a_longest_side_needs_a_size(tmp_path):
    save_stock(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"shortest_edge": 48}}))
    with pytest.raises(ValueError, match="give --image_size"):
        build(tmp_path)
    assert build(tmp_path, image_size=64)[1].size.longest_edge == 64


def test_the_preset_knows_only_options_and_starts_its_losses_early():
    options = read_config(PRESET)
    steps = options["max_steps"]
    assert steps_of(options["pseudo_start"], steps) < steps / 20 and steps_of(options["pairwise_warmup"], steps) < steps / 20
    assert options["learning_rate"] < RunArguments().learning_rate and options["box_prompts"]


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_a_backbone_without_a_learning_rate_is_frozen(tmp_path, backbone):
    """Not only left alone: no gradients are computed for it."""
    save_stock(tmp_path, backbone)
    network, _, _ = build(tmp_path)
    optimizer = build_optimizer(network, learning_rate=1e-3, backbone_lr_multiplier=0.0, weight_decay=0.05)
    encoder = network.model.pixel_level_module.encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    network.train()
    outputs = network(torch.randn(1, 3, SIZE, SIZE))
    (outputs.masks_queries_logits.sum() + outputs.class_queries_logits.sum()).backward()
    optimizer.step()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}


def test_the_command_trains_from_a_stock_checkpoint(tmp_path, capsys):
    """The preset with its sizes made small: boxes only, finite and falling losses, and a model that loads back."""
    shapes = write_shapes(tmp_path / "shapes", num_train=6, num_val=2)
    document = json.loads((shapes / "instances_train.json").read_text())
    for annotation in document["annotations"]:
        del annotation["segmentation"]  # there is no mask to look at
    (shapes / "instances_train.json").write_text(json.dumps(document))
    stock = save_stock(tmp_path / "stock")
    output = tmp_path / "run"
    small = [
        "--max_steps",
        10,
        "--batch_size",
        4,
        "--image_size",
        SIZE,
        "--eval_every",
        0,
        "--checkpoint_every",
        0,
        "--log_every",
        1,
    ]
    still = [
        "--num_workers",
        0,
        "--mixed_precision",
        "no",
        "--report_to",
        "none",
        "--scale_min",
        1,
        "--scale_max",
        1,
        "--flip",
        0,
    ]
    sources = ["--config", PRESET, "--model", tmp_path / "stock", "--data", shapes, "--output_dir", output]
    faster = ["--learning_rate", 2e-3, "--lr_warmup", 0, "--color_jitter", 0]
    assert main(["train", *map(str, [*sources, *small, *still, *faster])]) == 0
    AcceleratorState._reset_state(True)
    assert "1 transferred (ellipse), 1 fresh (rectangle)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 10 and all(0 < loss < 1e4 for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert any(line.get("loss_pseudo_mask", 0) > 0 for line in lines)
    assert all(line.get("loss_mask", 0) == line.get("loss_dice", 0) == 0 for line in lines)
    trained = SIMForInstanceSegmentation.from_pretrained(output / "model")
    assert trained.config.id2label == dict(enumerate(NAMES)) and trained.config.category_ids == [3, 8]
    assert trained.config.box_prompts and SIMImageProcessor.from_pretrained(output / "model").size.longest_edge == SIZE
    weights, theirs = trained.state_dict(), stock.state_dict()
    moved = {name for name, tensor in weights.items() if name in theirs and not torch.equal(tensor, theirs[name])}
    assert all(any(part in name for name in moved) for part in (".pixel_level_module.encoder.", ".transformer_module."))
