"""CondInst in the training step: every supervision lowers its losses, however the batch is split."""

import pytest
import torch

from factories import make_batch, make_step, prime, split_batch, tiny_condinst
from sim_hf.criteria.build import MASK_CRITERIA

OF_FCOS = ("loss_focal", "loss_giou")
FALLING = {
    "full": ("loss_mask", "loss_dice"),
    "boxinst": ("loss_projection",),
    "level_set": ("loss_projection", "loss_level_set"),
    "bbtp": ("loss_tightness",),
    "sim": ("loss_projection", "loss_pseudo_mask"),
}


def backward_all(step, model, batches):
    """Forward and backward of one optimiser step -> summed losses."""
    inputs = [step.prepare(batch) for batch in batches]
    normalizers = step.normalizers(inputs)
    sums = {}
    for micro in inputs:
        output = step(model, micro, normalizers)
        output.total.backward()
        for name, loss in output.losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach())
    return sums


@pytest.mark.parametrize("supervision", sorted(MASK_CRITERIA))
def test_some_steps_on_one_batch_lower_the_losses(supervision):
    model = tiny_condinst().train()
    step = make_step(model, supervision, max_steps=20, paste_probability=0.0, pairwise_warmup=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = make_batch(2, with_masks=supervision == "full")
    history = []
    for _ in range(15):
        history.append(backward_all(step, model, [batch]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step.after_update(model)
    for name in (*OF_FCOS, *FALLING[supervision]):
        values = [losses[name] for losses in history if losses[name] > 0]  # pseudo masks begin when the teacher is sure enough
        assert values[-1] < 0.95 * max(values[:3]), (name, [round(value, 3) for value in values])


@pytest.mark.parametrize("supervision", ["full", "sim"])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(supervision):
    batch = make_batch(4, with_masks=supervision == "full", empty=(2,))
    found, losses = [], []
    for size in (4, 1):
        model = tiny_condinst().double().train()
        step = make_step(model, supervision, paste_probability=1.0)
        step.teacher.model.double()
        if supervision == "sim":
            prime(step)
        losses.append(backward_all(step, model, split_batch(batch, size)))
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    if supervision == "sim":
        assert losses[0]["loss_paste"] > 0
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
