"""One optimiser step: independent of how the batch is split, ticking once, safe without instances."""

import copy

import pytest
import torch

from factories import make_batch, make_step, prime, split_batch, tiny_model

SUPERVISIONS = ("full", "boxinst", "sim")


def backward_all(step, model, batches):
    """Forward and backward of one optimiser step -> summed losses, prepared inputs."""
    inputs = [step.prepare(batch) for batch in batches]
    normalizers = step.normalizers(inputs)
    sums = {}
    for micro in inputs:
        output = step(model, micro, normalizers)
        output.total.backward()
        for name, loss in output.losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach())
    return sums, inputs


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def step_in_float64(supervision):
    model = tiny_model().double().train()
    step = make_step(model, supervision, **({} if supervision == "full" else {"pairwise_warmup": 0.0}))
    step.teacher.model.double()
    if supervision == "sim":
        prime(step)
    return model, step


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_gradient_does_not_depend_on_the_split_into_micro_batches(supervision):
    batch = make_batch(8, with_masks=supervision == "full", empty=(5,))
    found, losses, states = {}, {}, {}
    for size in (8, 4, 1):
        model, step = step_in_float64(supervision)
        losses[size], inputs = backward_all(step, model, split_batch(batch, size))
        found[size] = gradients(model)
        if supervision == "sim":
            assert losses[size]["loss_pseudo_mask"] > 0 and losses[size]["loss_paste"] > 0
            assert sum(int(x.targets.is_pasted_G.sum()) for x in inputs) > 0
        step.after_update(model)
        states[size] = step.training_state()
    for size in (4, 1):
        assert losses[size] == pytest.approx(losses[8], rel=1e-6)
        for name, gradient in found[8].items():
            torch.testing.assert_close(found[size][name], gradient, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
        for name, tensor in states[8]["criterion"].items():
            torch.testing.assert_close(states[size]["criterion"][name], tensor, rtol=0, atol=1e-6)
        if supervision == "sim":
            for name, tensor in states[8]["memory_bank"].items():
                assert torch.equal(states[size]["memory_bank"][name], tensor), name


@pytest.mark.parametrize("micro_size", [8, 2])
def test_everything_ticks_once_per_optimizer_step(micro_size):
    model = tiny_model().train()
    step = prime(make_step(model, alpha=0.5))  # of an untrained network few masks are usable otherwise
    counts_KL, images = step.prototype_bank.counts_KL.clone(), len(step.memory_bank)
    backward_all(step, model, split_batch(make_batch(8), micro_size))
    assert len(step.memory_bank) == images  # staged, not yet to be drawn
    staged = len(step.memory_bank._staged)
    assert staged >= 6  # of a fresh network, not every image has a usable mask
    step.after_update(model)
    assert step.global_step == 1
    assert step.teacher.num_ticks == 1
    assert len(step.memory_bank) == images + staged
    moved_KL = step.prototype_bank.counts_KL - counts_KL
    assert moved_KL.max() == 1


def test_a_skipped_step_leaves_no_trace():
    model = tiny_model().train()
    step = prime(make_step(model))
    before = copy.deepcopy(step.training_state())
    backward_all(step, model, split_batch(make_batch(4), 2))
    step.after_skipped_update()
    step.prototype_bank.commit()
    step.memory_bank.commit()
    after = step.training_state()
    assert after["global_step"] == before["global_step"]
    for part in ("criterion", "teacher", "memory_bank"):
        for name, tensor in before[part].items():
            assert torch.equal(after[part][name], tensor), name


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("empty", [(1,), (0, 1)], ids=["one image", "whole batch"])
def test_images_without_instances_train_the_classes_and_reach_every_parameter(supervision, empty):
    model = tiny_model().train()
    step = make_step(model, supervision)
    if supervision == "sim":
        prime(step)
        step.paste_probability = 0.0
    losses, _ = backward_all(step, model, [make_batch(2, with_masks=supervision == "full", empty=empty)])
    assert all(torch.tensor(list(losses.values())).isfinite())
    assert losses["loss_cross_entropy"] > 0
    if len(empty) == 2:
        assert [name for name, loss in losses.items() if loss] == ["loss_cross_entropy"]
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    step.after_update(model)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_all_batches_have_the_same_loss_names(supervision):
    """Ranks reduce by name: a name that is missing on one of them would hang."""
    model = tiny_model().train()
    step = make_step(model, supervision)
    batches = [make_batch(2), make_batch(2, with_masks=True), make_batch(2, empty=(0, 1))]
    names = {tuple(sorted(backward_all(step, model, [batch])[0])) for batch in batches}
    assert len(names) == 1


def test_copy_paste_changes_the_pixels_of_pasted_images_only():
    model = tiny_model().train()
    step = prime(make_step(model, paste_probability=0.5))
    batch = make_batch(8)
    inputs = step.prepare(batch)
    pasted = set(inputs.targets.image_ids_G[inputs.targets.is_pasted_G].tolist())
    assert 0 < len(pasted) < 8
    for image in range(8):
        is_same = torch.equal(inputs.pixel_values_BCHW[image], batch["pixel_values"][image])
        assert is_same == (image not in pasted), image
    padding_BHW = batch["pixel_mask"] == 0
    assert inputs.pixel_values_BCHW.permute(0, 2, 3, 1)[padding_BHW].abs().max() == 0


def test_strong_colours_reach_the_student_and_not_the_teacher():
    model = tiny_model().train()
    step = make_step(model)
    step.strong_augmentation = 1.0
    batch = make_batch(2)
    inputs = step.prepare(batch)
    assert torch.equal(inputs.network_inputs(None)["pixel_values"], batch["pixel_values"])
    seen = inputs.student_inputs()["pixel_values"]
    assert (seen != batch["pixel_values"]).flatten(1).any(1).all()
    assert seen.permute(0, 2, 3, 1)[batch["pixel_mask"] == 0].abs().max() == 0
    assert step.eval().prepare(batch).student_values_BCHW is None


def test_nothing_is_pasted_before_the_start_step_or_in_evaluation():
    model = tiny_model()
    step = prime(make_step(model, paste_probability=1.0))
    batch = make_batch(2)
    assert step.prepare(batch).targets.is_pasted_G.any()
    step.paste_start_step = 1
    assert not step.prepare(batch).targets.is_pasted_G.any()
    step.paste_start_step = 0
    step.eval()
    assert not step.prepare(batch).targets.is_pasted_G.any()


def test_activation_checkpointing_gives_the_same_gradients():
    found = []
    for is_checkpointed in (False, True):
        model = tiny_model("swin").train()
        for module in model.modules():  # stochastic depth draws anew in the second forward unless its state is restored
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = prime(make_step(model))
        torch.manual_seed(0)
        backward_all(step, model, [make_batch(2)])
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_bfloat16_autocast_is_finite_and_keeps_losses_in_float32(supervision):
    model = tiny_model().train()
    step = make_step(model, supervision)
    if supervision == "sim":
        prime(step)
    inputs = step.prepare(make_batch(2, with_masks=supervision == "full"))
    normalizers = step.normalizers([inputs])
    with torch.autocast("cpu", torch.bfloat16):
        output = step(model, inputs, normalizers)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in output.losses.values())
    output.total.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_ten_steps_on_one_batch_lower_the_losses(supervision):
    model = tiny_model(contrast=30.0).train()
    step = make_step(model, supervision, max_steps=20, paste_probability=0.0, pairwise_warmup=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = make_batch(2, with_masks=supervision == "full")
    history = []
    for _ in range(10):
        losses, _ = backward_all(step, model, [batch])
        history.append(losses)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step.after_update(model)
    falling = {"full": ("loss_mask", "loss_dice"), "boxinst": ("loss_projection",), "sim": ("loss_projection",)}[supervision]
    for name in ("loss_cross_entropy", *falling):
        assert history[-1][name] < 0.95 * history[0][name], (name, [round(h[name], 3) for h in history])


def test_training_state_goes_into_another_step_and_back():
    model = tiny_model().train()
    step = prime(make_step(model))
    backward_all(step, model, [make_batch(2)])
    step.after_update(model)
    other = make_step(tiny_model(seed=1))
    other.load_training_state(copy.deepcopy(step.training_state()))
    mine, theirs = step.training_state(), other.training_state()
    assert mine["global_step"] == theirs["global_step"] == 1
    for part in ("criterion", "teacher", "memory_bank"):
        for name, tensor in mine[part].items():
            assert torch.equal(theirs[part][name], tensor), name


def test_training_state_of_another_supervision_is_refused():
    model = tiny_model()
    with pytest.raises((ValueError, RuntimeError)):
        make_step(model, "sim").load_training_state(make_step(model, "boxinst").training_state())
