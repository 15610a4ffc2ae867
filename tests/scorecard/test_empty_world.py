"""18 empty-world: batches that no photograph would make, in every supervision."""

import pytest
import torch

from factories import make_batch, make_step, prime, tiny_model


def boxes_of(kind, label):
    generator = torch.Generator().manual_seed(0)
    corners = {
        "one pixel": lambda: torch.tensor([[3.0, 4.0, 4.0, 5.0], [47.0, 47.0, 48.0, 48.0]]),
        "500 boxes": lambda: 30 * torch.rand(500, 2, generator=generator).repeat(1, 2) + torch.tensor([0, 0, 9.0, 9.0]),
        "the whole image": lambda: torch.tensor([[0.0, 0.0, *label["size"].flip(0).tolist()]] * 3),
    }[kind]()
    return {**label, "boxes": corners, "class_labels": torch.zeros(len(corners), dtype=torch.long)}  # one class of two


@pytest.mark.parametrize("kind", ["one pixel", "500 boxes", "the whole image"])
@pytest.mark.parametrize("supervision", ["boxinst", "sim"])
def test_18_hard_batches_train_every_parameter(kind, supervision):
    model = tiny_model().train()
    step = make_step(model, supervision)
    if supervision == "sim":
        prime(step)
    batch = make_batch(2)
    batch["labels"] = [boxes_of(kind, {k: v for k, v in label.items() if "mask" not in k}) for label in batch["labels"]]
    inputs = step.prepare(batch)
    output = step(model, inputs, step.normalizers([inputs]))
    output.total.backward()
    assert all(loss.isfinite() for loss in output.losses.values()) and output.losses["loss_cross_entropy"] > 0
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())] == []
    step.after_update(model)
    bank = step.prototype_bank
    assert bank is None or bank.prototypes_KLC.isfinite().all()
