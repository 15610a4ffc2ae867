"""SIM: BoxInst and what pseudo masks and pasted instances add."""

import pytest
import torch
from synthetic_outputs import (
    GRID,
    INPUT,
    STRIDE,
    ellipses,
    gradients,
    leaves_of,
    make_output,
    make_set_criterion,
    make_sim,
    make_targets,
    price,
)

from sim_hf.criteria.base import known_mask_losses, masks_on_grid
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.level_set import LevelSetCriterion
from sim_hf.criteria.sim import _sureness
from sim_hf.losses import masked_bce_loss, masked_dice_loss
from sim_hf.structures import MaskPredictions, PseudoMasks, box_masks

KEYS = [
    "loss_cross_entropy",
    "loss_projection",
    "loss_pairwise",
    "loss_mask",
    "loss_dice",
    "loss_pseudo_mask",
    "loss_paste",
]


def make_teacher(targets, *, num_layers=3, seed=1):
    """A teacher that shows an ellipse for every instance (query g of an image its instance g), the same in all layers."""
    output = make_output(num_layers=num_layers, seed=seed, scale=0.3)
    masks_GHW = torch.nn.functional.adaptive_avg_pool2d(ellipses(targets).float()[:, None], GRID)[:, 0]
    layers = [*output.auxiliary_logits, vars(output)]
    with torch.no_grad():
        for layer in layers:
            layer["masks_queries_logits"] -= 4
            for image in range(targets.num_images):
                for query, row in enumerate((targets.image_ids_G == image).nonzero()[:, 0].tolist()):
                    layer["masks_queries_logits"][image, query] += 9 * masks_GHW[row]
                    layer["class_queries_logits"][image, query, targets.class_labels_G[row]] += 3
    return output


def price_sim(mask_criterion, output, targets, *, teacher="made", **options):
    teacher = make_teacher(targets) if teacher == "made" else teacher
    return price(make_set_criterion(mask_criterion), output, targets, teacher=teacher, **options)


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_without_pseudo_weight_and_pasting_it_is_boxinst_bit_for_bit(with_teacher, mixed):
    targets, output = make_targets(), make_output()
    if mixed:
        targets.masks_GHW, targets.has_mask_G = ellipses(targets), torch.tensor([False, True, False])
    options = {"projection_weight": 3.0, "pairwise_weight": 1.5, "pairwise_warmup_steps": 100}
    boxinst = price(make_set_criterion(BoxInstCriterion(**options)), output, targets, step=40)
    sim = price_sim(
        make_sim(boxinst=options, pseudo_weight=0.0), output, targets, teacher="made" if with_teacher else None, step=40
    )
    assert list(boxinst.losses) == KEYS[:5]
    for name, loss in boxinst.losses.items():
        assert torch.equal(loss, sim.losses[name]), name
    assert sim.losses["loss_pseudo_mask"].item() == sim.losses["loss_paste"].item() == 0
    assert torch.equal(boxinst.total, sim.total)
    for mine, theirs in zip(gradients(output, sim.total), gradients(output, boxinst.total), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("small_ellipses", [False, True])
def test_pseudo_loss_is_half_of_bce_plus_dice_on_the_trusted_pixels_over_all_layers(small_ellipses):
    """And 4 times both, against the shares of the cells, for the objects of few cells."""
    targets, output = make_targets(), make_output()
    mask_criterion = make_sim(pseudo_weight=0.5, small_weight=4.0, small_ellipses=small_ellipses)
    seen = []
    call = mask_criterion.box_criterion.__class__.__call__

    class Spy(BoxInstCriterion):
        def __call__(self, students, *args, **options):
            seen.append(students)
            return call(self, students, *args, **options)

    mask_criterion.box_criterion = Spy()
    result = price_sim(mask_criterion, output, targets)
    pseudo, expected = result.pseudo_masks, 0.0
    for student in seen[0]:
        for logits_HW, g in zip(student.mask_logits_NHW, student.instance_ids_N, strict=True):
            small = pseudo.smallness_G[g].item()
            target_HW, trusted_HW = pseudo.target_GHW[g].float(), pseudo.trusted_GHW[g]
            if small > 0:
                target_HW, trusted_HW = pseudo.probabilities_GHW[g], trusted_HW | (pseudo.probabilities_GHW[g] > 0)
            maps = (logits_HW[None], target_HW[None], trusted_HW[None])
            expected += (0.5 * (1 - small) + 4.0 * small) * (masked_bce_loss(*maps) + masked_dice_loss(*maps)).item()
    assert expected > 0 and bool((pseudo.smallness_G > 0).any()) is small_ellipses
    assert result.losses["loss_pseudo_mask"].item() == pytest.approx(expected / 3, rel=1e-5)


def test_sureness_weighs_the_pseudo_loss_of_an_instance():
    """BoxTeacher's weight by hand: sqrt(sqrt(0.81) * 0.4) = 0.6; the best positive of an instance counts."""
    targets, output = make_targets(), make_output()
    plain, weighed = (
        price_sim(make_sim(pseudo_quality_weight=weigh), output, targets).losses["loss_pseudo_mask"] for weigh in (False, True)
    )
    assert 0 < weighed < plain
    teacher = MaskPredictions(torch.zeros(2, *GRID), torch.tensor([0, 0]), torch.tensor([0.2, 0.81]), torch.zeros(1, 2, *GRID))
    pseudo = PseudoMasks(*(torch.zeros(2, *GRID) for _ in range(3)), torch.tensor([0.4, 0.9]), torch.zeros(2))
    torch.testing.assert_close(_sureness(teacher, pseudo), torch.tensor([0.6, 0.0]))


def test_level_set_on_top_adds_its_two_terms_times_the_weight():
    targets, output = make_targets(), make_output()
    alone = price(make_set_criterion(LevelSetCriterion()), output, targets).losses
    plain, both = (
        price_sim(make_sim(level_set=LevelSetCriterion() if weight else None, level_set_weight=weight), output, targets).losses
        for weight in (0.0, 0.5)
    )
    assert set(both) - set(plain) == {"loss_level_set", "loss_local_consistency"}
    for name in ("loss_level_set", "loss_local_consistency"):
        torch.testing.assert_close(both[name], 0.5 * alone[name])
    assert all(torch.equal(both[name], loss) for name, loss in plain.items())


def test_pseudo_masks_are_made_once_and_shared_by_the_layers():
    targets, mask_criterion = make_targets(), make_sim()
    calls = []
    generator = mask_criterion.generator

    class Counting:
        def __call__(self, *args, **options):
            calls.append(generator(*args, **options))
            return calls[-1]

        def diagnostics(self, *args):
            return generator.diagnostics(*args)

    mask_criterion.generator = Counting()
    result = price_sim(mask_criterion, make_output(num_layers=4), targets)
    assert len(calls) == 1 and result.pseudo_masks is calls[0]


def test_pseudo_masks_of_a_good_teacher_lie_in_the_boxes():
    targets = make_targets()
    pseudo = price_sim(make_sim(), make_output(), targets).pseudo_masks
    assert pseudo.target_GHW.flatten(1).any(1).all()
    assert not (pseudo.target_GHW & ~box_masks(targets.boxes_G4, *GRID, STRIDE)).any()


def pasted_targets(**options):
    """Instance 1 was pasted, with the mask of an ellipse."""
    targets = make_targets(is_pasted=[False, True, False], **options)
    targets.masks_GHW = ellipses(targets) & targets.is_pasted_G[:, None, None]
    return targets


def instances_with_gradient(output, loss, positives):
    """Instances whose prediction of the final layer the loss moves."""
    moved_BQ = gradients(output, loss)[-1].flatten(2).any(2)
    maps_BQHW = output.masks_queries_logits
    moved = set()
    for logits_HW, g in zip(positives.mask_logits_NHW, positives.instance_ids_N.tolist(), strict=True):
        if moved_BQ[(maps_BQHW == logits_HW).flatten(2).all(2)].any():
            moved.add(g)
    return moved


def test_pasted_instances_take_the_paste_loss_and_no_pseudo_loss():
    targets, output = pasted_targets(), make_output()
    result = price_sim(make_sim(), output, targets)
    assert instances_with_gradient(output, result.losses["loss_paste"], result.positives) == {1}
    assert instances_with_gradient(output, result.losses["loss_pseudo_mask"], result.positives) == {0, 2}
    assert instances_with_gradient(output, result.losses["loss_mask"], result.positives) == set()


def test_instances_with_a_real_mask_take_neither_pseudo_nor_paste_loss():
    targets, output = make_targets(has_mask=[True, False, False]), make_output()
    targets.masks_GHW = ellipses(targets)
    result = price_sim(make_sim(), output, targets)
    assert instances_with_gradient(output, result.losses["loss_mask"], result.positives) == {0}
    assert instances_with_gradient(output, result.losses["loss_pseudo_mask"], result.positives) == {1, 2}
    assert result.losses["loss_paste"].item() == 0


def test_paste_loss_is_bce_plus_dice_on_the_share_of_each_cell():
    targets, output = pasted_targets(), make_output(num_layers=1)
    result = price_sim(make_sim(paste_weight=2.0), output, targets, teacher=None)
    cells_GHW = masks_on_grid(targets, targets.is_pasted_G, *GRID)
    row = result.positives.instance_ids_N.tolist().index(1)
    maps = (result.positives.mask_logits_NHW[row : row + 1], cells_GHW[1:2])
    expected = 2 * (masked_bce_loss(*maps) + masked_dice_loss(*maps)).item() / 3
    assert result.losses["loss_paste"].item() == pytest.approx(expected, rel=1e-5)


def test_masks_on_grid_are_cell_shares_of_the_chosen_and_zero_for_the_others():
    targets = make_targets([[0, 0, 8, 8]] * 2, [0, 0], [0, 0], num_images=1)
    targets.masks_GHW = torch.zeros(2, *INPUT, dtype=torch.bool)
    targets.masks_GHW[:, :2, :3] = True  # 6 of the 16 pixels of the first cell
    cells_GHW = masks_on_grid(targets, torch.tensor([False, True]), *GRID)
    assert cells_GHW[1, 0, 0].item() == 6 / 16 and cells_GHW.sum().item() == 6 / 16


@pytest.mark.parametrize(
    ("step", "share"), [(98, None), (99, None), (100, 0.0), (299, 0.0), (300, 0.25), (301, 0.5), (303, 1.0), (999, 1.0)]
)
def test_prototypes_start_first_then_the_pseudo_loss_ramps_up(step, share):
    targets, output = make_targets(), make_output()
    mask_criterion = make_sim(pseudo_start_step=300, pseudo_ramp_steps=4, prototype_start_step=100)
    result = price_sim(mask_criterion, output, targets, step=step)
    assert mask_criterion.needs_teacher(step) == (share is not None)
    assert (result.pseudo_masks is None) == (share is None)
    mask_criterion.bank.commit()
    assert mask_criterion.bank.is_ready_K.any() == (share is not None)
    full = price_sim(make_sim(), output, targets).losses["loss_pseudo_mask"]
    assert result.losses["loss_pseudo_mask"].item() == pytest.approx((share or 0.0) * full.item(), rel=1e-5)


def test_prototypes_start_at_the_latest_with_the_pseudo_loss():
    assert make_sim(pseudo_start_step=50, prototype_start_step=80).prototype_start_step == 50


@pytest.mark.parametrize("training", [True, False])
def test_prototypes_learn_in_training_only(training):
    mask_criterion = make_sim().train(training)
    price_sim(mask_criterion, make_output(), make_targets())
    mask_criterion.bank.commit()
    assert mask_criterion.bank.is_ready_K.all() == training
    assert mask_criterion.bank.is_ready_K.any() == training


def test_prototypes_move_at_commit_and_not_in_a_micro_batch():
    mask_criterion, targets, output = make_sim(), make_targets(), make_output()
    before = mask_criterion.bank.prototypes_KLC.clone()
    first, second = (price_sim(mask_criterion, output, targets) for _ in range(2))
    assert torch.equal(mask_criterion.bank.prototypes_KLC, before)
    assert torch.equal(first.total, second.total)
    mask_criterion.bank.commit()
    assert not torch.equal(mask_criterion.bank.prototypes_KLC, before)
    after = price_sim(mask_criterion, output, targets)
    assert not torch.equal(first.pseudo_masks.probabilities_GHW, after.pseudo_masks.probabilities_GHW)


def test_pasting_alone_needs_the_teacher_too():
    assert make_sim(pseudo_weight=0.0, paste_weight=1.0).needs_teacher(0)
    assert not make_sim(pseudo_weight=0.0, paste_weight=0.0).needs_teacher(0)


@pytest.mark.parametrize("targets", [make_targets(), pasted_targets(), make_targets([], num_images=2)], ids=len)
@pytest.mark.parametrize("step", [0, 50, 5000])
def test_names_of_the_losses_do_not_depend_on_step_or_batch(targets, step):
    mask_criterion = make_sim(pseudo_start_step=100, prototype_start_step=40)
    teacher = "made" if mask_criterion.needs_teacher(step) else None
    assert list(price_sim(mask_criterion, make_output(), targets, teacher=teacher, step=step).losses) == KEYS


def test_a_batch_without_instances_reaches_every_output_and_leaves_the_prototypes():
    targets, output, mask_criterion = make_targets([], num_images=2), make_output(), make_sim()
    result = price_sim(mask_criterion, output, targets)
    for gradient in gradients(output, result.total):
        assert gradient is not None and gradient.isfinite().all()
    for name in KEYS[1:]:
        assert result.losses[name].requires_grad and result.losses[name].item() == 0
    mask_criterion.bank.commit()
    assert not mask_criterion.bank.is_ready_K.any()
    assert result.pseudo_masks.target_GHW.shape == (0, *GRID)


def test_the_teacher_gets_no_gradient():
    targets, teacher = make_targets(), make_teacher(make_targets())
    total = price_sim(make_sim(), make_output(), targets, teacher=teacher).total
    assert all(gradient is None for gradient in gradients(teacher, total))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 2.0), (torch.float16, 2.0), (torch.float16, 3e4), (torch.float32, 1e30)]
)
def test_half_precision_and_huge_logits_stay_finite(dtype, scale):
    targets, output, teacher = pasted_targets(), make_output(dtype=dtype), make_output(seed=8, dtype=dtype)
    with torch.no_grad():
        for logits in [*leaves_of(output)[1::2], *leaves_of(teacher)[1::2]]:
            logits.copy_((logits.float() * scale / 2).clamp(-6e4, 6e4) if dtype == torch.float16 else logits * scale / 2)
    result = price_sim(make_sim(), output, targets, teacher=teacher)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in result.losses.values()), result.losses
    assert all(gradient.isfinite().all() for gradient in gradients(output, result.total))


def test_diagnostics_are_detached_scalars():
    diagnostics = price_sim(make_sim(), make_output(), make_targets()).diagnostics
    assert {"pseudo_trusted_share", "prototype_diversity"} <= set(diagnostics)
    assert all(value.numel() == 1 and not value.requires_grad for value in diagnostics.values())


def test_state_holds_the_prototypes_once():
    assert set(make_set_criterion(make_sim()).state_dict()) == {
        f"mask_criterion.bank.{name}" for name in ("prototypes_KLC", "counts_KL", "usage_KL")
    }


def test_known_masks_that_apply_to_nobody_price_nothing_with_a_gradient_path():
    targets, output = make_targets(), make_output(num_layers=1)
    result = price_sim(make_sim(), output, targets, teacher=None)
    bce, dice = known_mask_losses([result.positives], torch.zeros(3, *GRID), torch.zeros(3, dtype=torch.bool))
    assert bce[0].shape == dice[0].shape == (0,)
    assert bce[0].sum().requires_grad
