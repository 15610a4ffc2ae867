"""The bank keeps what pasting needs, exactly and within its bounds; steps, splits and ranks do not show."""

import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from sim_hf.mask_generation.memory_bank import BankInstance, MemoryBank
from sim_hf.structures import InstanceTargets, PseudoMasks, box_masks

STRIDE = 4


def make_pseudo(probabilities_GHW, scores):
    target_GHW = probabilities_GHW > 0.5
    return PseudoMasks(probabilities_GHW, target_GHW, target_GHW.clone(), torch.tensor(scores), torch.zeros(len(scores)))


def make_batch(boxes_per_image, *, size=(32, 32), scores=None):
    """Images of noise whose pseudo masks fill the boxes."""
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes_per_image]
    labels = [{"boxes": b, "class_labels": torch.arange(len(b))} for b in boxes]
    targets = InstanceTargets.from_labels(labels, size)
    probabilities = box_masks(targets.boxes_G4, size[0] // STRIDE, size[1] // STRIDE, STRIDE).float()
    pseudo = make_pseudo(probabilities, [0.9] * len(targets) if scores is None else scores)
    images = torch.randint(0, 256, (len(boxes), 3, *size), generator=torch.Generator().manual_seed(1)).float() / 255
    return images, targets, pseudo


def filled_bank(boxes_per_image, keys=None, **kwargs):
    bank = MemoryBank(**kwargs)
    images, targets, pseudo = make_batch(boxes_per_image)
    bank.remember(images, targets, pseudo, image_keys=keys or list(range(len(images))))
    bank.commit()
    return bank


def same_state(first, second):
    return first.keys() == second.keys() and all(
        a.dtype == second[key].dtype and torch.equal(a, second[key]) for key, a in first.items()
    )


def all_instances(bank):
    """Every instance, by drawing whole images often enough."""
    generator, found = torch.Generator().manual_seed(0), {}
    for _ in range(50):
        for instance in bank.draw(generator, share=1.0, max_instances=1000):
            found[(instance.left, instance.top, instance.class_label)] = instance
    return list(found.values())


def test_an_instance_is_stored_as_crop_and_mask_of_its_box():
    images, targets, pseudo = make_batch([[[8, 4, 24, 20]]])
    bank = MemoryBank()
    bank.remember(images, targets, pseudo, image_keys=[7])
    bank.commit()
    (instance,) = all_instances(bank)
    assert (instance.left, instance.top, instance.class_label) == (8, 4, 0)
    assert instance.score == pytest.approx(0.9)
    assert instance.mask_HW.shape == (16, 16) and instance.mask_HW.all()
    assert torch.equal(instance.pixels_3HW, (images[0, :, 4:20, 8:24] * 255).round().to(torch.uint8))
    assert bank.num_bytes == 3 * 16 * 16 + 16 * 16 // 8


@pytest.mark.parametrize(
    "box", [[5, 3, 47, 38], [0, 0, 56, 40], [11, 13, 15, 17], [50, 30, 56, 40], [6, 6, 8, 38], [1.6, 2.4, 13.6, 33.4]]
)
def test_mask_edges_are_those_of_the_upsampled_map_with_the_border_of_the_box_continued(box):
    size, generator = (40, 56), torch.Generator().manual_seed(3)
    targets = InstanceTargets(torch.tensor([box]).float(), torch.tensor([0]), torch.tensor([0]), size, 1)
    inside = box_masks(targets.boxes_G4, 10, 14, STRIDE)[0]
    probabilities = (0.3 + 0.7 * torch.rand(1, 10, 14, generator=generator)) * inside
    bank = MemoryBank(min_pixels=1)
    bank.remember(torch.rand(1, 3, *size), targets, make_pseudo(probabilities, [0.9]), image_keys=[0])
    bank.commit()
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    continued = probabilities[:, torch.arange(10).clamp(rows[0], rows[-1])][:, :, torch.arange(14).clamp(columns[0], columns[-1])]
    whole = F.interpolate(continued[None], size=size, mode="bilinear", align_corners=False)[0, 0] > 0.5
    x1, y1, x2, y2 = (round(side) for side in box)
    expected = torch.zeros(size, dtype=torch.bool)
    expected[y1:y2, x1:x2] = whole[y1:y2, x1:x2]
    (instance,) = all_instances(bank)
    height, width = instance.mask_HW.shape
    found = torch.zeros(size, dtype=torch.bool)
    found[instance.top : instance.top + height, instance.left : instance.left + width] = instance.mask_HW
    assert torch.equal(found, expected)


@pytest.mark.parametrize("box", [[0, 0, 32, 32], [0, 0, 9, 9], [23, 23, 32, 32], [-5, -5, 10, 10], [20, 20, 90, 90]])
def test_boxes_at_and_beyond_the_border_are_cut_there(box):
    (instance,) = all_instances(filled_bank([[box]]))
    height, width = instance.pixels_3HW.shape[1:]
    assert (instance.left, instance.top) == (max(box[0], 0), max(box[1], 0))
    assert (instance.left + width, instance.top + height) == (min(box[2], 32), min(box[3], 32))


def test_masks_do_not_reach_into_the_padding():
    images, targets, pseudo = make_batch([[[0, 0, 32, 32]]])
    pixel_mask = torch.zeros(1, 32, 32, dtype=torch.long)
    pixel_mask[:, :20, :24] = 1
    bank = MemoryBank()
    bank.remember(images, targets, pseudo, image_keys=[0], pixel_mask_BHW=pixel_mask)
    bank.commit()
    assert all_instances(bank)[0].mask_HW.shape == (20, 24)


def test_low_scores_small_masks_pasted_instances_and_empty_targets_are_not_stored():
    images, targets, pseudo = make_batch([[[0, 0, 16, 16]] * 4, [], [[0, 0, 4, 4]]], scores=[0.9, 0.3, 0.9, 0.9, 0.9])
    pseudo.probabilities_GHW[3] = 0
    targets.is_pasted_G[2] = True
    bank = MemoryBank(min_score=0.5, min_pixels=64)
    bank.remember(images, targets, pseudo, image_keys=[0, 1, 2])
    bank.commit()
    assert bank.image_keys == [0]
    assert [instance.class_label for instance in all_instances(bank)] == [0]


def test_batch_without_instances_is_a_normal_batch():
    images, targets, pseudo = make_batch([[], []])
    bank = MemoryBank()
    bank.remember(images, targets, pseudo, image_keys=[0, 1])
    bank.commit()
    assert len(bank) == 0 and bank.draw(torch.Generator()) == []


def test_real_masks_are_preferred_to_pseudo_masks():
    images, targets, pseudo = make_batch([[[0, 0, 16, 16], [16, 16, 32, 32]]], scores=[0.6, 0.6])
    targets.masks_GHW = torch.zeros(2, 32, 32, dtype=torch.bool)
    targets.masks_GHW[0, 2:12, 3:13] = True
    targets.has_mask_G = torch.tensor([True, False])
    bank = MemoryBank()
    bank.remember(images, targets, pseudo, image_keys=[0])
    bank.commit()
    real, made = sorted(all_instances(bank), key=lambda instance: instance.class_label)
    assert (real.left, real.top, tuple(real.mask_HW.shape), real.score) == (3, 2, (10, 10), 1.0)
    assert made.mask_HW.shape == (16, 16) and made.score == pytest.approx(0.6)


def test_real_masks_need_no_pseudo_masks():
    images, targets, _ = make_batch([[[0, 0, 16, 16], [16, 16, 32, 32]]])
    targets.masks_GHW = torch.ones(2, 32, 32, dtype=torch.bool)
    targets.has_mask_G = torch.tensor([True, False])
    bank = MemoryBank()
    bank.remember(images, targets, None, image_keys=[0])
    bank.commit()
    assert [instance.class_label for instance in all_instances(bank)] == [0]


def test_uint8_images_are_stored_as_they_are():
    images, targets, pseudo = make_batch([[[8, 4, 24, 20]]])
    bytes_images = (images * 255).round().to(torch.uint8)
    banks = [MemoryBank(), MemoryBank()]
    for bank, given in zip(banks, (images, bytes_images), strict=True):
        bank.remember(given, targets, pseudo, image_keys=[0])
        bank.commit()
    assert same_state(banks[0].state_dict(), banks[1].state_dict())


def test_entries_do_not_alias_the_batch():
    images, targets, pseudo = make_batch([[[0, 0, 32, 32]]])
    images = (images * 255).to(torch.uint8)
    bank = MemoryBank()
    bank.remember(images, targets, pseudo, image_keys=[0])
    bank.commit()
    before = bank.state_dict()
    images.zero_()
    assert before["pixels"].any() and same_state(bank.state_dict(), before)


def test_staged_images_are_invisible_until_commit_and_forgotten_by_discard():
    images, targets, pseudo = make_batch([[[0, 0, 16, 16]]])
    bank = MemoryBank()
    bank.remember(images, targets, pseudo, image_keys=[0])
    assert len(bank) == 0 and bank.draw(torch.Generator()) == []
    bank.discard()
    bank.commit()
    assert len(bank) == 0
    bank.remember(images, targets, pseudo, image_keys=[0])
    bank.commit()
    assert len(bank) == 1


def test_oldest_images_leave_first():
    bank = filled_bank([[[0, 0, 16, 16]]] * 5, keys=[10, 11, 12, 13, 14], capacity=3)
    assert bank.image_keys == [12, 13, 14]


def test_bytes_are_bounded_and_counted():
    one_image = 3 * 16 * 16 + 32
    bank = filled_bank([[[0, 0, 16, 16]]] * 5, max_bytes=2 * one_image + 5)
    assert bank.image_keys == [3, 4] and bank.num_bytes == 2 * one_image
    assert len(filled_bank([[[0, 0, 16, 16]]], max_bytes=one_image - 1)) == 0


def test_image_seen_again_replaces_its_older_entry():
    bank = filled_bank([[[0, 0, 16, 16]]] * 3, keys=[1, 2, 3])
    images, targets, pseudo = make_batch([[[0, 0, 32, 32]]])
    bank.remember(images, targets, pseudo, image_keys=[1])
    bank.commit()
    assert bank.image_keys == [2, 3, 1]
    assert bank.num_bytes == 2 * (3 * 256 + 32) + 3 * 1024 + 128


def test_split_into_micro_batches_does_not_show():
    boxes = [[[0, 0, 16, 16]], [[4, 4, 20, 20], [0, 0, 9, 9]], [], [[8, 8, 32, 32]]]
    images, targets, pseudo = make_batch(boxes)
    whole, split = MemoryBank(), MemoryBank()
    whole.remember(images, targets, pseudo, image_keys=[5, 3, 9, 1])
    for rows in ([3], [2], [0, 1]):  # another order too: ranks take turns in any order
        part_images, part_targets, part_pseudo = images[rows], *make_batch([boxes[i] for i in rows])[1:]
        split.remember(part_images, part_targets, part_pseudo, image_keys=[[5, 3, 9, 1][i] for i in rows])
    whole.commit()
    split.commit()
    assert same_state(whole.state_dict(), split.state_dict())


@pytest.mark.parametrize(("num_instances", "expected"), [(1, 1), (3, 1), (8, 2), (12, 3), (40, 3)])
def test_a_quarter_of_the_instances_is_drawn_but_one_to_three(num_instances, expected):
    bank = filled_bank([[[0, 0, 16, 16]] * num_instances])
    drawn = bank.draw(torch.Generator().manual_seed(0))
    assert len(drawn) == expected == len({instance.class_label for instance in drawn})


def test_instances_are_drawn_by_score():
    images, targets, pseudo = make_batch([[[0, 0, 16, 16]] * 2], scores=[0.9, 0.3])
    bank = MemoryBank(min_score=0.0)
    bank.remember(images, targets, pseudo, image_keys=[0])
    bank.commit()
    generator = torch.Generator().manual_seed(0)
    share = sum(bank.draw(generator)[0].class_label == 0 for _ in range(2000)) / 2000
    assert share == pytest.approx(0.75, abs=0.04)


def test_state_round_trip_is_exact():
    bank = filled_bank([[[0, 0, 16, 16], [3, 5, 20, 31]], [[8, 8, 32, 32]]], keys=[40, 2])
    state = bank.state_dict()
    restored = MemoryBank()
    restored.load_state_dict(state)
    assert all(type(value) is torch.Tensor for value in state.values())
    assert same_state(restored.state_dict(), state)
    assert restored.image_keys == bank.image_keys and restored.num_bytes == bank.num_bytes
    first, second = (b.draw(torch.Generator().manual_seed(5)) for b in (bank, restored))
    assert [i.class_label for i in first] == [i.class_label for i in second]
    assert all(torch.equal(a.mask_HW, b.mask_HW) for a, b in zip(first, second, strict=True))


def test_state_of_an_empty_bank_round_trips():
    bank = filled_bank([[[0, 0, 16, 16]]])
    bank.load_state_dict(MemoryBank().state_dict())
    assert len(bank) == 0 and bank.num_bytes == 0


def test_state_larger_than_the_bank_keeps_the_newest():
    bank = MemoryBank(capacity=2)
    bank.load_state_dict(filled_bank([[[0, 0, 16, 16]]] * 4).state_dict())
    assert bank.image_keys == [2, 3]


def test_broken_states_are_refused_and_change_nothing():
    bank = filled_bank([[[0, 0, 16, 16]]])
    before = bank.state_dict()
    with pytest.raises(ValueError, match="expected"):
        bank.load_state_dict({key: value for key, value in before.items() if key != "scores"})
    with pytest.raises(ValueError, match="pixels"):
        bank.load_state_dict({**before, "pixels": before["pixels"][:-1]})
    assert same_state(bank.state_dict(), before)


def test_mask_with_a_bit_count_that_is_no_multiple_of_eight_survives_packing():
    images, targets, pseudo = make_batch([[[1, 1, 12, 14]]])
    targets.masks_GHW = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask = torch.rand(13, 11, generator=torch.Generator().manual_seed(0)) > 0.3
    targets.masks_GHW[0, 1:14, 1:12] = mask
    targets.has_mask_G = torch.tensor([True])
    bank = MemoryBank()
    bank.remember(images, targets, pseudo, image_keys=[0])
    bank.commit()
    (instance,) = all_instances(bank)
    assert isinstance(instance, BankInstance) and torch.equal(instance.mask_HW, mask)


def test_wrong_arguments_say_what_came():
    images, targets, pseudo = make_batch([[[0, 0, 16, 16]]])
    with pytest.raises(ValueError, match="image keys"):
        MemoryBank().remember(images, targets, pseudo, image_keys=[])
    with pytest.raises(ValueError, match="int32"):
        MemoryBank().remember(images.int(), targets, pseudo, image_keys=[0])
    pseudo.probabilities_GHW = torch.ones(1, 7, 7)
    with pytest.raises(ValueError, match="stride"):
        MemoryBank().remember(images, targets, pseudo, image_keys=[0])
    with pytest.raises(ValueError, match="capacity"):
        MemoryBank(capacity=0)


def test_commit_takes_the_images_of_all_ranks_in_the_order_of_their_keys(monkeypatch):
    banks = [MemoryBank(), MemoryBank()]
    for bank, boxes, keys in ((banks[0], [[[0, 0, 16, 16]], [[8, 8, 32, 32]]], [4, 1]), (banks[1], [[[4, 4, 20, 20]]], [2])):
        bank.remember(*make_batch(boxes), image_keys=keys)
    staged = [pickle.dumps(bank._staged) for bank in banks]

    def all_gather_object(gathered, _mine):
        gathered[:] = [pickle.loads(of_rank) for of_rank in staged]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    for bank in banks:
        bank.commit()
    assert banks[0].image_keys == [1, 2, 4]
    assert same_state(banks[0].state_dict(), banks[1].state_dict())


def _commit_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    bank = MemoryBank()
    boxes, keys = ([[[0, 0, 16, 16]], [[8, 8, 32, 32]]], [4, 1]) if rank == 0 else ([[]], [2])
    images, targets, pseudo = make_batch(boxes)
    bank.remember(images, targets, pseudo, image_keys=keys)
    bank.commit()
    torch.save(bank.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.e2e  # two processes that import torch: half a minute on a busy machine
def test_ranks_hold_the_same_bank_also_when_one_staged_nothing(tmp_path):
    mp.spawn(_commit_on_a_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert same_state(first, second)
    assert first["image_keys"].tolist() == [1, 4]
