"""The prototype bank: what it collects, how prototypes move, and that splits, ranks and casts change nothing."""

import copy
import math
import os
import time

import pytest
import references_mask_generation as reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sim_hf.mask_generation import PrototypeBank, prototype_bank
from sim_hf.mask_generation.prototype_bank import _pixel_keys, nearest_shares


def clustered_pixels(num_pixels, centers_LC, noise=0.05, generator=None):
    which_M = torch.arange(num_pixels) % len(centers_LC)
    pixels_MC = centers_LC[which_M] + noise * torch.randn(num_pixels, centers_LC.shape[1], generator=generator)
    return pixels_MC * torch.rand(num_pixels, 1, generator=generator).add(0.5)


def state_of(bank):
    return {name: value.clone() for name, value in bank.state_dict().items()}


def assert_same_state(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_new_bank_is_empty_and_holds_only_its_buffers():
    bank = PrototypeBank(3, 4, 5)
    assert not bank.is_ready_K.any() and bank.is_ready_K.shape == (3,)
    assert set(bank.state_dict()) == {"prototypes_KLC", "counts_KL", "usage_KL"}
    assert list(bank.parameters()) == []
    assert bank.diversity() == 0 and bank.usage_entropy() == 0


def test_observing_alone_changes_no_prototype():
    bank = PrototypeBank(2, 2, 3)
    before = state_of(bank)
    bank.observe(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    assert_same_state(state_of(bank), before)


def test_first_commit_sets_prototypes_to_the_cluster_means_by_hand():
    bank = PrototypeBank(2, 2, 2)
    pixels_MC = torch.tensor([[2.0, 0.0], [0.6, 0.8], [-5.0, 0.0], [-0.6, 0.8]])  # unit: 0 and 53 degrees, 180 and 127
    bank.observe(pixels_MC, torch.ones(4, dtype=torch.long))
    bank.commit()
    assert bank.is_ready_K.tolist() == [False, True]
    prototypes_LC = bank.prototypes_KLC[1][bank.prototypes_KLC[1, :, 0].argsort()]
    direction = torch.tensor([1.6, 0.8]) / math.hypot(1.6, 0.8)
    torch.testing.assert_close(prototypes_LC, torch.stack([direction * torch.tensor([-1.0, 1.0]), direction]))
    assert bank.counts_KL.tolist() == [[0, 0], [1, 1]] and bank.usage_KL.tolist() == [[0, 0], [0.5, 0.5]]
    assert (bank.prototypes_KLC[0] == 0).all()


def test_well_separated_clusters_get_one_prototype_each():
    centers_LC = torch.eye(8)[:5]
    bank = PrototypeBank(1, 5, 8)
    for _ in range(3):
        bank.observe(clustered_pixels(200, centers_LC), torch.zeros(200, dtype=torch.long))
        bank.commit()
    nearest = (bank.prototypes_KLC[0] @ centers_LC.T).max(-1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3, 4] and nearest.values.min() > 0.99
    assert bank.diversity().abs() < 0.05 and bank.usage_entropy() > 0.99


def test_prototype_without_pixels_keeps_its_value():
    bank = PrototypeBank(1, 2, 2)
    bank.prototypes_KLC.copy_(torch.eye(2)[None])
    bank.counts_KL.fill_(5)
    bank.observe(torch.tensor([[1.0, 0.1]]), torch.tensor([0]))
    bank.commit()
    assert sorted(bank.counts_KL[0].tolist()) == [5, 6]
    kept = int(bank.counts_KL[0].argmin())
    assert torch.equal(bank.prototypes_KLC[0, kept], torch.eye(2)[kept])


def test_second_update_is_the_running_mean():
    bank = PrototypeBank(1, 1, 2)
    for pixel in ([1.0, 0.0], [0.0, 3.0]):
        bank.observe(torch.tensor([pixel]), torch.tensor([0]))
        bank.commit()
    torch.testing.assert_close(bank.prototypes_KLC[0, 0], torch.tensor([math.sqrt(0.5), math.sqrt(0.5)]))


@pytest.mark.parametrize(("momentum", "dtype"), [(0.9, torch.float16), (0.999, torch.bfloat16)])
def test_thousand_updates_follow_the_float64_recursion_in_any_module_dtype(momentum, dtype):
    module = torch.nn.Sequential(PrototypeBank(1, 1, 3, momentum=momentum), torch.nn.Linear(2, 2)).to(dtype)
    bank = module[0]
    targets_MC = torch.nn.functional.normalize(torch.randn(1000, 3) + torch.tensor([2.0, 0.0, 0.0]), dim=-1)
    targets_MC[0] = torch.tensor([0.0, 1.0, 0.0])
    for target_C in targets_MC:
        bank.observe(target_C[None], torch.tensor([0]))
        bank.commit()
    expected = torch.from_numpy(reference.moving_direction([0, 1, 0], targets_MC.double().numpy(), momentum))
    torch.testing.assert_close(bank.prototypes_KLC[0, 0].double(), expected, rtol=0, atol=1e-6)
    assert module[1].weight.dtype == dtype


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_module_keeps_float32_values_exactly(cast):
    bank = PrototypeBank(2, 3, 4)
    bank.prototypes_KLC.copy_(torch.randn(2, 3, 4))
    before = state_of(bank)
    getattr(torch.nn.ModuleList([bank]), cast)()
    assert bank.prototypes_KLC.dtype == bank.usage_KL.dtype == torch.float32
    assert_same_state(state_of(bank), before)


def test_meta_device_then_empty_then_state_dict_restores():
    bank = PrototypeBank(1, 2, 2)
    bank.observe(torch.randn(6, 2), torch.zeros(6, dtype=torch.long))
    bank.commit()
    with torch.device("meta"):
        other = PrototypeBank(1, 2, 2)
    other = other.to(torch.bfloat16).to_empty(device="cpu")
    other.load_state_dict(bank.state_dict())
    assert_same_state(state_of(other), state_of(bank))
    other.observe(torch.randn(6, 2), torch.zeros(6, dtype=torch.long))
    other.commit()
    assert other.prototypes_KLC.isfinite().all()


def test_state_dict_round_trip_continues_bit_for_bit(tmp_path):
    bank = PrototypeBank(2, 3, 4)

    def step(target, seed):
        generator = torch.Generator().manual_seed(seed)
        target.observe(torch.randn(50, 4, generator=generator), torch.randint(0, 2, (50,), generator=generator))
        target.commit()

    step(bank, 1)
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    restored = PrototypeBank(2, 3, 4)
    restored.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for target in (bank, restored):
        step(target, 2)
    assert_same_state(state_of(restored), state_of(bank))


def test_skipped_step_leaves_no_trace():
    bank, clean = PrototypeBank(1, 2, 3), PrototypeBank(1, 2, 3)
    bank.observe(torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
    bank.reset_observations()
    pixels_MC = torch.randn(9, 3)
    for target in (bank, clean):
        target.observe(pixels_MC, torch.zeros(9, dtype=torch.long))
        target.commit()
    assert_same_state(state_of(bank), state_of(clean))


def test_commit_without_pixels_changes_nothing():
    bank = PrototypeBank(1, 2, 3)
    bank.observe(torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
    bank.commit()
    before = state_of(bank)
    bank.commit()
    bank.observe(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    bank.commit()
    assert_same_state(state_of(bank), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_pixels_without_a_direction_are_dropped(bad):
    bank, clean = PrototypeBank(1, 2, 3), PrototypeBank(1, 2, 3)
    pixels_MC, labels_M = torch.randn(9, 3), torch.zeros(9, dtype=torch.long)
    clean.observe(pixels_MC, labels_M)
    bank.observe(torch.cat([pixels_MC[:4], torch.full((1, 3), bad), pixels_MC[4:]]), torch.zeros(10, dtype=torch.long))
    for target in (bank, clean):
        target.commit()
    assert_same_state(state_of(bank), state_of(clean))


def test_opposite_pixels_have_no_mean_and_leave_the_prototype_finite():
    bank = PrototypeBank(1, 1, 2)
    bank.observe(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]))
    bank.commit()
    torch.testing.assert_close(bank.prototypes_KLC.norm(dim=-1), torch.ones(1, 1))


@pytest.mark.parametrize("num_pixels", [1, 2, 3])
def test_fewer_pixels_than_prototypes_still_makes_unit_prototypes_that_later_part(num_pixels):
    bank = PrototypeBank(1, 6, 4)
    bank.observe(torch.randn(num_pixels, 4), torch.zeros(num_pixels, dtype=torch.long))
    bank.commit()
    assert bank.is_ready_K.all()
    torch.testing.assert_close(bank.prototypes_KLC.norm(dim=-1), torch.ones(1, 6))
    for _ in range(6):
        bank.observe(torch.randn(120, 4), torch.zeros(120, dtype=torch.long))
        bank.commit()
    assert (bank.counts_KL > 0).all() and bank.diversity() < 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_feature_scale_gives_unit_prototypes(scale):
    bank = PrototypeBank(1, 2, 3)
    bank.observe(torch.randn(20, 3) * scale, torch.zeros(20, dtype=torch.long))
    bank.commit()
    torch.testing.assert_close(bank.prototypes_KLC.norm(dim=-1), torch.ones(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_and_autocast_equal_float32(dtype):
    pixels_MC, labels_M = torch.randn(60, 8).to(dtype), torch.randint(0, 2, (60,))
    bank, expected = PrototypeBank(2, 3, 8), PrototypeBank(2, 3, 8)
    expected.observe(pixels_MC.float(), labels_M)
    expected.commit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank.observe(pixels_MC, labels_M)
        bank.commit()
    assert_same_state(state_of(bank), state_of(expected))


@pytest.mark.parametrize("max_pixels", [10_000, 37], ids=["all pixels kept", "bound reached"])
@pytest.mark.parametrize("sizes", [[240], [30] * 8, [1, 100, 0, 139]])
def test_split_into_micro_batches_and_their_order_change_no_bit(sizes, max_pixels):
    pixels_MC, labels_M = torch.randn(240, 16), torch.randint(0, 3, (240,))
    whole = PrototypeBank(4, 5, 16, max_pixels_per_class=max_pixels)
    whole.observe(pixels_MC, labels_M)
    split = PrototypeBank(4, 5, 16, max_pixels_per_class=max_pixels)
    order = torch.randperm(240)
    for pixels, labels in zip(pixels_MC[order].split(sizes), labels_M[order].split(sizes), strict=True):
        split.observe(pixels, labels)
    for bank in (whole, split):
        bank.commit()
    assert_same_state(state_of(split), state_of(whole))


def test_key_of_a_pixel_does_not_depend_on_the_part_that_it_is_made_in():
    pixels_MC = torch.randn(2500, 3)
    keys_M = _pixel_keys(pixels_MC)
    one_by_one_M = torch.cat([_pixel_keys(pixel_1C) for pixel_1C in pixels_MC.split(1)])
    assert torch.equal(keys_M, one_by_one_M)


def test_collected_pixels_are_bounded_per_class():
    bank = PrototypeBank(3, 2, 4, max_pixels_per_class=20)
    for _ in range(5):
        bank.observe(torch.randn(100, 4), torch.tensor([0] * 90 + [1] * 7 + [2] * 3))
    assert bank._observed_pixels()[1].bincount().tolist() == [20, 20, 15]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("padded_at_a_time", [1, 60, 150])
def test_classes_in_parts_equal_all_classes_at_once(padded_at_a_time, balanced, monkeypatch):
    labels_M = torch.repeat_interleave(torch.tensor([0, 2, 3, 6]), torch.tensor([3, 70, 20, 25]))
    pixels_MC = torch.randn(len(labels_M), 8)
    banks = []
    for limit in (10**6, padded_at_a_time):
        monkeypatch.setattr(prototype_bank, "_PADDED_AT_A_TIME", limit)
        bank = PrototypeBank(7, 4, 8, balanced=balanced)
        for turn in range(3):
            bank.observe(pixels_MC.roll(turn, 1), labels_M)
            bank.commit()
        banks.append(bank)
    at_once, in_parts = banks
    torch.testing.assert_close(in_parts.prototypes_KLC, at_once.prototypes_KLC)
    torch.testing.assert_close(in_parts.usage_KL, at_once.usage_KL)
    assert torch.equal(in_parts.counts_KL, at_once.counts_KL)


def test_parts_hold_whole_classes_and_small_ones_share_theirs():
    labels_M = torch.repeat_interleave(torch.tensor([0, 1, 4, 5]), torch.tensor([1000, 1000, 5000, 100]))
    parts = prototype_bank._parts_of_whole_classes(labels_M)
    assert parts == [slice(0, 2000), slice(2000, 7000), slice(7000, 7100)]


def test_bounded_choice_is_as_good_as_random():
    """The kept sample must not lean to one side of the feature space."""
    pixels_MC = torch.randn(4000, 8)
    bank = PrototypeBank(1, 1, 8, max_pixels_per_class=1000)
    bank.observe(pixels_MC, torch.zeros(4000, dtype=torch.long))
    standard_error = 1 / math.sqrt(1000)
    assert bank._observed_pixels()[0].mean(0).abs().max() < 4 * standard_error
    assert (bank._observed_pixels()[0].var(0) - 1).abs().max() < 4 * math.sqrt(2) * standard_error


def test_soft_assignment_moves_every_prototype():
    bank = PrototypeBank(1, 4, 3, hard_assignment=False)
    bank.observe(torch.randn(30, 3), torch.zeros(30, dtype=torch.long))
    bank.commit()
    assert (bank.counts_KL == 1).all()
    torch.testing.assert_close(bank.usage_KL.sum(), torch.tensor(1.0))


def test_class_balanced_masses_are_half_the_share_of_nearest_pixels_by_hand():
    similarity_KML = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.6], [9.0, 0.0]]])
    valid_KM = torch.tensor([[True, True, True, True, False]])
    torch.testing.assert_close(nearest_shares(similarity_KML, valid_KM), torch.tensor([[0.625, 0.375]]))  # 3/4 and 1/4
    torch.testing.assert_close(nearest_shares(similarity_KML, ~valid_KM), torch.tensor([[0.75, 0.25]]))


def test_balanced_transport_leaves_the_crowd_together():
    """Twenty pixels alike and one apart: equal masses send some of the crowd to the other prototype, balanced ones fewer."""
    directions = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    pixels_MC = torch.cat([directions[:1].repeat(20, 1), directions[1:]])
    mass = {}
    for balanced in (False, True):
        bank = PrototypeBank(1, 2, 2, hard_assignment=False, balanced=balanced, num_iterations=50)
        bank.prototypes_KLC.copy_(directions[None])
        assignment_KML = bank._assign(torch.tensor([0]), pixels_MC[None], torch.ones(1, 21, dtype=torch.bool))
        mass[balanced] = assignment_KML[0].sum(0)
    # 10.5 each; and of all 21, half of 20 / 21 + 1 / 2.
    torch.testing.assert_close(mass[False], torch.tensor([10.5, 10.5]), atol=1e-3, rtol=0)
    torch.testing.assert_close(mass[True], torch.tensor([15.25, 5.75]), atol=1e-3, rtol=0)


def test_diversity_is_the_mean_pairwise_cosine_of_ready_classes():
    bank = PrototypeBank(3, 3, 2)
    bank.prototypes_KLC[0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # cosines 0, -1, 0
    bank.prototypes_KLC[1] = torch.tensor([[1.0, 0.0]] * 3)
    bank.counts_KL[:2] = 1
    torch.testing.assert_close(bank.diversity(), torch.tensor((-1 / 3 + 1) / 2))


def test_usage_entropy_is_one_when_even_and_zero_when_one_prototype_takes_all():
    bank = PrototypeBank(2, 4, 2)
    bank.counts_KL.fill_(1)
    bank.usage_KL.copy_(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]))
    torch.testing.assert_close(bank.usage_entropy(), torch.tensor(0.5))


def test_deepcopy_is_independent():
    bank = PrototypeBank(1, 2, 3)
    bank.observe(torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
    other = copy.deepcopy(bank)
    other.commit()
    assert other.is_ready_K.all() and not bank.is_ready_K.any()


def test_wrong_arguments_say_what_came():
    bank = PrototypeBank(2, 2, 3)
    with pytest.raises(ValueError, match=r"\(M, 3\), got \(5, 4\)"):
        bank.observe(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="expected 5 class labels"):
        bank.observe(torch.randn(5, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"0\.\.1, got \[0, 2\]"):
        bank.observe(torch.randn(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="momentum"):
        PrototypeBank(2, momentum=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        PrototypeBank(0)


# Two ranks, three steps: (pixels of rank 0, pixels of rank 1).
RANK_SIZES = [(40, 0), (35, 90), (0, 0), (0, 25)]


def _step_pixels(step):
    generator = torch.Generator().manual_seed(step)
    size = sum(RANK_SIZES[step])
    return torch.randn(size, 8, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def _run_rank(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    bank = PrototypeBank(4, 3, 8, max_pixels_per_class=30)
    for step, (size, _) in enumerate(RANK_SIZES):
        mine = slice(0, size) if rank == 0 else slice(size, None)
        pixels_MC, labels_M = _step_pixels(step)
        bank.observe(pixels_MC[mine], labels_M[mine])
        bank.commit()
    torch.save(bank.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_one_without_objects_equal_one_process_with_the_joint_pixels(tmp_path):
    context = mp.spawn(_run_rank, args=(str(tmp_path),), nprocs=2, join=False)
    try:
        deadline = time.monotonic() + 240  # for the imports of a busy machine
        while not context.join(timeout=1):  # False as long as one rank runs; raises what a rank raised
            assert time.monotonic() < deadline, "a rank hangs"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    alone = PrototypeBank(4, 3, 8, max_pixels_per_class=30)
    for step in range(len(RANK_SIZES)):
        alone.observe(*_step_pixels(step))
        alone.commit()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_state(ranks[0], ranks[1])
    assert_same_state(ranks[0], state_of(alone))
    assert alone.is_ready_K.tolist() == [True, True, True, False]
