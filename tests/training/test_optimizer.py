"""Parameter groups and learning rate schedules."""

from pathlib import Path

import pytest
import torch
from torch import nn

from factories import tiny_model
from sim_hf.training.arguments import RunArguments, parse_arguments, steps_of
from sim_hf.training.assembly import build_optimization
from sim_hf.training.optimizer import build_optimizer, build_scheduler

CONFIGS = Path(__file__).resolve().parents[2] / "scripts" / "configs"


def groups_by_name(model, **options):
    settings = {"learning_rate": 1e-3, "backbone_lr_multiplier": 0.1, "weight_decay": 0.05, **options}
    optimizer = build_optimizer(model, **settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found, "in two groups"
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_every_trainable_parameter_is_in_exactly_one_group(backbone):
    model = tiny_model(backbone)
    frozen = next(iter(model.named_parameters()))[0]
    model.get_parameter(frozen).requires_grad_(False)
    assert groups_by_name(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_only_the_backbone_learns_slower(backbone):
    for name, (rate, _) in groups_by_name(tiny_model(backbone)).items():
        assert rate == pytest.approx(1e-4 if "pixel_level_module.encoder" in name else 1e-3), name


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_norms_biases_and_embeddings_are_not_decayed(backbone):
    model = tiny_model(backbone)
    modules = dict(model.named_modules())
    for name, (_, decay) in groups_by_name(model).items():
        owner = modules[name.rpartition(".")[0]]
        is_matrix = name.endswith(("weight", "in_proj_weight")) and isinstance(
            owner, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
        )
        if is_matrix:
            assert decay == 0.05, name
        if name.endswith("bias") or isinstance(owner, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding)):
            assert decay == 0.0, name


def test_two_steps_of_sgd_by_hand():
    """Momentum sums gradients that already hold the decay: v = 0.9 v + g + decay w, w = w - rate v; a bias has no decay."""
    layer = nn.Linear(1, 1)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    optimizer = build_optimizer(layer, optimizer="sgd", learning_rate=0.1, backbone_lr_multiplier=1.0, weight_decay=0.5)
    for weight, bias in ((0.75, 0.8), (0.2875, 0.42)):  # v: 2 + 0.5, then 0.9 * 2.5 + 2 + 0.375; without decay 2, then 3.8
        layer.weight.grad, layer.bias.grad = torch.full((1, 1), 2.0), torch.full((1,), 2.0)
        optimizer.step()
        assert (layer.weight.item(), layer.bias.item()) == pytest.approx((weight, bias))


def test_sgd_has_the_groups_of_adamw():
    assert groups_by_name(tiny_model(), optimizer="sgd") == groups_by_name(tiny_model())


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="adamw, sgd, got 'lamb'"):
        groups_by_name(tiny_model(), optimizer="lamb")


def rates(schedule, warmup_steps, max_steps, restart_step=None, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_scheduler(
        optimizer, schedule=schedule, warmup_steps=warmup_steps, max_steps=max_steps, restart_step=restart_step, **options
    )
    found = []
    for _ in range(max_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_warmup_rises_in_equal_steps_and_never_starts_at_zero():
    assert rates("constant", 4, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_cosine_falls_from_the_whole_rate_to_one_percent():
    found = rates("cosine", 0, 100)
    assert found[0] == 2.0
    assert found[50] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert found[-1] == pytest.approx(0.02, rel=0.03)
    assert found == sorted(found, reverse=True)


def test_polynomial_decay_has_power_nine_tenths():
    assert rates("poly", 0, 10)[5] == pytest.approx(2.0 * 0.5**0.9)


def test_each_step_of_the_schedule_divides_the_rate_by_ten():
    found = rates("step", 2, 9, lr_steps=[6, 8])
    assert found == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.2, 0.2, 0.02])


def test_steps_of_the_schedule_are_shares_of_each_part_of_a_run_with_a_restart():
    assert rates("step", 0, 9, restart_step=3, lr_steps=[6]) == pytest.approx([2, 2, 0.2, 2, 2, 2, 2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("name", "kind", "highest", "drops", "steps"),
    [
        ("r50-1x", torch.optim.SGD, 0.01, (60_000, 80_000), 90_000),
        ("r101-3x", torch.optim.SGD, 0.01, (210_000, 250_000), 270_000),
        ("r101-dcn-bifpn-3x", torch.optim.SGD, 0.01, (210_000, 250_000), 270_000),
        ("swin-b-3x", torch.optim.AdamW, 1e-4, (210_000, 250_000), 270_000),
    ],
)
def test_the_configurations_of_the_papers_rows_have_its_schedules(name, kind, highest, drops, steps):
    *_, run = parse_arguments(["--config", str(CONFIGS / f"condinst-{name}.yaml"), "--data", "somewhere"])
    optimizer, scheduler = build_optimization(nn.Linear(2, 2), run)
    assert type(optimizer) is kind and run.max_steps == steps and run.backbone_lr_multiplier == 1
    if kind is torch.optim.SGD:
        assert [(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.9, 1e-4), (0.9, 0.0)]
        assert run.max_grad_norm == 0
    (factor, _) = scheduler.lr_lambdas
    first, second = drops
    at = (0, 999, first - 1, first, second - 1, second, steps - 1)
    expected = (highest / 1000, highest, highest, highest / 10, highest / 10, highest / 100, highest / 100)
    assert [run.learning_rate * factor(step) for step in at] == pytest.approx(expected)


def test_the_default_steps_are_the_papers_shares_of_a_run():
    assert [steps_of(length, 90_000) for length in RunArguments().lr_steps] == [60_000, 80_000]


def test_a_run_that_is_all_warmup_does_not_divide_by_zero():
    assert rates("cosine", 5, 5)[-1] == 2.0


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="cosine, poly, constant, step, got 'linear'"):
        rates("linear", 0, 1)


def test_a_restart_is_two_runs_one_after_the_other():
    assert rates("cosine", 2, 11, restart_step=5) == [*rates("cosine", 2, 5), *rates("cosine", 2, 6)]
