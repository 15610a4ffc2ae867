"""Parameter groups and learning rate schedules."""

import pytest
import torch
from torch import nn

from factories import tiny_model
from sim_hf.training.optimizer import build_optimizer, build_scheduler


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


def rates(schedule, warmup_steps, max_steps, restart_step=None):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_scheduler(
        optimizer, schedule=schedule, warmup_steps=warmup_steps, max_steps=max_steps, restart_step=restart_step
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


def test_a_run_that_is_all_warmup_does_not_divide_by_zero():
    assert rates("cosine", 5, 5)[-1] == 2.0


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="cosine, poly, constant, got 'linear'"):
        rates("linear", 0, 1)


def test_a_restart_is_two_runs_one_after_the_other():
    assert rates("cosine", 2, 11, restart_step=5) == [*rates("cosine", 2, 5), *rates("cosine", 2, 6)]
