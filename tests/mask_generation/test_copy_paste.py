"""Copy-paste: pixels, masks and boxes by hand, and the same result whatever the split of the batch."""

import pytest
import torch

from sim_hf.mask_generation.copy_paste import _hide, _Paste, copy_paste
from sim_hf.mask_generation.memory_bank import MemoryBank
from sim_hf.structures import InstanceTargets, mask_boxes

SIZE = (40, 48)
PLAIN = {"probability": 1.0, "scale_range": (1.0, 1.0), "flip_probability": 0.0}


def make_targets(boxes_per_image, size=SIZE):
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes_per_image]
    return InstanceTargets.from_labels([{"boxes": b, "class_labels": torch.arange(len(b))} for b in boxes], size)


def make_bank(masks, *, class_label=7, pixels=None):
    """A bank of one image a mask; the mask's object has the colour 1.0 unless `pixels` (3, H, W) are given."""
    bank = MemoryBank(min_pixels=1)
    for key, mask_HW in enumerate(masks):
        size = tuple(mask_HW.shape)
        targets = InstanceTargets(
            boxes_G4=mask_boxes(mask_HW[None]),
            class_labels_G=torch.tensor([class_label]),
            image_ids_G=torch.tensor([0]),
            input_size=size,
            num_images=1,
            masks_GHW=mask_HW[None],
            has_mask_G=torch.tensor([True]),
        )
        image = mask_HW.float().expand(3, *size) if pixels is None else pixels
        bank.remember(image[None], targets, None, image_keys=[key])
    bank.commit()
    return bank


def square(side=8):
    return torch.ones(side, side, dtype=torch.bool)


def ell():
    mask = torch.zeros(10, 8, dtype=torch.bool)
    mask[:, :3] = True
    mask[7:, :] = True
    return mask


def empty_images(num_images, size=SIZE):
    return torch.zeros(num_images, 3, *size), torch.ones(num_images, *size, dtype=torch.long)


def paste_at(targets, image, mask_HW, left, top, min_visible=0.25):
    """What happens to the originals of an image below one object: boxes, masks, which stay."""
    paste = _Paste(torch.zeros(3, *mask_HW.shape), mask_HW, top, left, class_label=0)
    return _hide(targets, {image: [paste]}, min_visible)


def assert_same(first, second):
    for name in ("boxes_G4", "class_labels_G", "image_ids_G", "masks_GHW", "has_mask_G", "is_pasted_G"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_pasted_object_has_its_pixels_mask_box_class_and_flags():
    pixels = (torch.arange(3 * 80).reshape(3, 10, 8) + 1).float() / 255
    images, valid = empty_images(1)
    pasted, targets = copy_paste(
        images, valid, make_targets([[]]), make_bank([ell()], pixels=pixels), seed=0, step=0, image_keys=[3], **PLAIN
    )
    assert len(targets) == 1 and targets.class_labels_G.tolist() == [7] and targets.image_ids_G.tolist() == [0]
    assert targets.is_pasted_G.tolist() == [True] and targets.has_mask_G.tolist() == [False]
    x1, y1, x2, y2 = (int(side) for side in targets.boxes_G4[0])
    assert (x2 - x1, y2 - y1) == (8, 10)
    assert torch.equal(targets.masks_GHW[0, y1:y2, x1:x2], ell()) and targets.masks_GHW.sum() == ell().sum()
    torch.testing.assert_close(pasted[0, :, y1:y2, x1:x2], pixels * ell(), rtol=0, atol=1e-7)
    assert torch.equal(pasted[0].any(0), targets.masks_GHW[0])


def test_empty_bank_returns_the_same_objects():
    images, valid = empty_images(2)
    targets = make_targets([[], [[0, 0, 9, 9]]])
    result = copy_paste(images, valid, targets, MemoryBank(), seed=0, step=0, image_keys=[0, 1], **PLAIN)
    assert result[0] is images and result[1] is targets


def test_probability_zero_returns_the_same_objects_and_is_kept_to_on_average():
    images, valid = empty_images(2)
    targets, bank = make_targets([[], []]), make_bank([square()])
    result = copy_paste(images, valid, targets, bank, seed=0, step=0, image_keys=[0, 1], probability=0.0)
    assert result[0] is images and result[1] is targets
    counts = [
        len(copy_paste(images, valid, targets, bank, seed=0, step=step, image_keys=[0, 1], probability=0.3)[1])
        for step in range(300)
    ]
    assert sum(counts) / 600 == pytest.approx(0.3, abs=0.06)


def test_inputs_are_not_modified():
    images, valid = torch.rand(2, 3, *SIZE), torch.ones(2, *SIZE, dtype=torch.long)
    targets = make_targets([[[0, 0, 40, 40]], [[0, 0, 48, 40]]])
    targets.masks_GHW = torch.ones(2, *SIZE, dtype=torch.bool)
    targets.has_mask_G = torch.tensor([True, False])
    given = [images, valid, targets.boxes_G4, targets.masks_GHW, targets.has_mask_G, targets.is_pasted_G]
    before = [tensor.clone() for tensor in given]
    bank = make_bank([square(20)])
    state = bank.state_dict()
    pasted, changed = copy_paste(images, valid, targets, bank, seed=0, step=0, image_keys=[0, 1], probability=1.0)
    assert not torch.equal(pasted, images) and not torch.equal(changed.masks_GHW[0], before[3][0])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in bank.state_dict().items())


def test_images_without_a_paste_stay_bit_for_bit_and_keep_their_targets():
    images, valid = torch.rand(8, 3, *SIZE), torch.ones(8, *SIZE, dtype=torch.long)
    targets = make_targets([[[1.25, 2.5, 30.75, 31]]] * 8)
    pasted, changed = copy_paste(images, valid, targets, make_bank([square()]), seed=1, step=0, image_keys=list(range(8)))
    untouched = [i for i in range(8) if not (changed.is_pasted_G & (changed.image_ids_G == i)).any()]
    assert 0 < len(untouched) < 8
    for i in untouched:
        assert torch.equal(pasted[i], images[i])
        assert changed.boxes_G4[changed.image_ids_G == i].tolist() == [[1.25, 2.5, 30.75, 31]]


def test_split_and_order_of_the_batch_do_not_show():
    boxes = [[[0, 0, 20, 20]], [], [[5, 5, 45, 35], [0, 0, 8, 8]], [[10, 10, 30, 30]]]
    images, valid, keys = torch.rand(4, 3, *SIZE), torch.ones(4, *SIZE, dtype=torch.long), [90, 5, 17, 2]
    bank = make_bank([square(12), ell(), square(5)])
    whole = copy_paste(images, valid, make_targets(boxes), bank, seed=3, step=11, image_keys=keys, probability=0.9)
    for rows in ([0, 1], [2, 3], [3, 1], [2]):
        part = copy_paste(
            images[rows],
            valid[rows],
            make_targets([boxes[i] for i in rows]),
            bank,
            seed=3,
            step=11,
            image_keys=[keys[i] for i in rows],
            probability=0.9,
        )
        assert torch.equal(part[0], whole[0][rows])
        for place, i in enumerate(rows):
            mine, theirs = part[1].select(part[1].image_ids_G == place), whole[1].select(whole[1].image_ids_G == i)
            mine.image_ids_G = theirs.image_ids_G
            if mine.masks_GHW is None:  # a part where nothing was pasted
                assert not theirs.masks_GHW.any()
                mine.masks_GHW = theirs.masks_GHW
            assert_same(mine, theirs)


def test_seed_step_and_key_each_change_the_result_and_the_global_generator_does_not():
    images, valid = empty_images(1)
    targets, bank = make_targets([[]]), make_bank([square(6)])

    def place(seed, step, key):
        torch.rand(5)
        return tuple(
            copy_paste(images, valid, targets, bank, seed=seed, step=step, image_keys=[key], **PLAIN)[1].boxes_G4[0].tolist()
        )

    assert place(0, 0, 0) == place(0, 0, 0)
    assert len({place(0, 0, 0), place(1, 0, 0), place(0, 1, 0), place(0, 0, 1)}) == 4


def test_pasting_leaves_the_global_generator_alone():
    images, valid = empty_images(1)
    state = torch.get_rng_state()
    copy_paste(images, valid, make_targets([[]]), make_bank([square()]), seed=0, step=0, image_keys=[0], **PLAIN)
    assert torch.equal(torch.get_rng_state(), state)


def test_objects_stay_inside_the_valid_area_and_touch_all_its_borders():
    images, valid = empty_images(1)
    valid[:, 25:] = 0
    valid[:, :, 20:] = 0
    bank = make_bank([square(9), ell()])
    boxes = torch.cat(
        [
            copy_paste(images, valid, make_targets([[]]), bank, seed=0, step=s, image_keys=[0], probability=1.0)[1].boxes_G4
            for s in range(300)
        ]
    )
    assert boxes[:, :2].amin(0).tolist() == [0, 0]
    assert boxes[:, 2:].amax(0).tolist() == [20, 25]


@pytest.mark.parametrize("area", [(6, 48), (40, 3), (1, 1)])
def test_object_larger_than_the_valid_area_is_shrunk_into_it(area):
    images, valid = empty_images(1)
    valid[:] = 0
    valid[:, : area[0], : area[1]] = 1
    pasted, targets = copy_paste(
        images, valid, make_targets([[]]), make_bank([square(20)]), seed=0, step=0, image_keys=[0], **PLAIN
    )
    side = float(min(area))
    assert (targets.boxes_G4[:, 2:] - targets.boxes_G4[:, :2]).tolist() == [[side, side]]
    assert not (pasted[0].any(0) & ~valid[0].bool()).any()


def test_image_that_is_all_padding_receives_nothing():
    images, valid = empty_images(1)
    targets = make_targets([[]])
    result = copy_paste(images, torch.zeros_like(valid), targets, make_bank([square()]), seed=0, step=0, image_keys=[0], **PLAIN)
    assert result[0] is images and result[1] is targets


def test_scale_and_flip_change_size_and_side():
    images, valid = empty_images(1)

    def paste(**kwargs):
        return copy_paste(
            images, valid, make_targets([[]]), make_bank([ell()]), seed=0, step=0, image_keys=[0], **{**PLAIN, **kwargs}
        )[1]

    doubled = paste(scale_range=(2.0, 2.0))
    assert (doubled.boxes_G4[:, 2:] - doubled.boxes_G4[:, :2]).tolist() == [[16, 20]]
    flipped = paste(flip_probability=1.0)
    x1, y1, x2, y2 = (int(side) for side in flipped.boxes_G4[0])
    assert torch.equal(flipped.masks_GHW[0, y1:y2, x1:x2], ell().flip(-1))


def test_box_only_object_that_is_hidden_in_the_middle_keeps_its_box():
    targets = make_targets([[[4.5, 4.5, 30.5, 30.5]]])
    boxes, masks, keep = paste_at(targets, 0, square(10), left=10, top=10)
    assert boxes.tolist() == [[4.5, 4.5, 30.5, 30.5]] and masks is None and keep.tolist() == [True]


def test_box_only_object_is_cut_on_the_side_that_is_hidden_and_keeps_fractions_elsewhere():
    targets = make_targets([[[4.25, 4.25, 24.25, 14.25]]])
    boxes, _, keep = paste_at(targets, 0, square(12), left=18, top=3)
    assert boxes.tolist() == [[4.25, 4.25, 18.0, 14.25]] and keep.tolist() == [True]


@pytest.mark.parametrize(("min_visible", "kept"), [(0.3, True), (0.31, False), (0.0, True)])
def test_box_only_object_is_dropped_when_too_little_of_it_is_left(min_visible, kept):
    targets = make_targets([[[0, 0, 10, 10]]])
    mask = torch.ones(10, 7, dtype=torch.bool)
    boxes, _, keep = paste_at(targets, 0, mask, left=0, top=0, min_visible=min_visible)
    assert keep.tolist() == [kept] and (not kept or boxes.tolist() == [[7, 0, 10, 10]])


def test_fully_hidden_objects_are_dropped_with_and_without_mask():
    targets = make_targets([[[2, 2, 6, 6], [2, 2, 6, 6], [20, 20, 30, 30]]])
    targets.masks_GHW = torch.zeros(3, *SIZE, dtype=torch.bool)
    targets.masks_GHW[1, 3:5, 3:5] = True
    targets.has_mask_G = torch.tensor([False, True, False])
    _, _, keep = paste_at(targets, 0, square(8), left=1, top=1, min_visible=0.0)
    assert keep.tolist() == [False, False, True]


def test_partly_hidden_mask_is_reduced_and_its_box_follows():
    targets = make_targets([[[2.4, 2.4, 11.6, 11.6], [30.4, 30.4, 39.6, 39.6]]])
    targets.masks_GHW = torch.zeros(2, *SIZE, dtype=torch.bool)
    targets.masks_GHW[0, 3:11, 3:11] = True
    targets.masks_GHW[1, 31:39, 31:39] = True
    targets.has_mask_G = torch.tensor([True, True])
    boxes, masks, keep = paste_at(targets, 0, square(8), left=6, top=0)
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[3:11, 3:11] = True
    expected[0:8, 6:14] = False
    assert torch.equal(masks[0], expected) and boxes[0].tolist() == [3, 3, 11, 11]
    assert boxes[1].tolist() == pytest.approx([30.4, 30.4, 39.6, 39.6])  # untouched: the annotated box stays
    assert keep.tolist() == [True, True]


def test_objects_of_other_images_are_not_hidden():
    targets = make_targets([[[2, 2, 6, 6]], [[2, 2, 6, 6]]])
    _, _, keep = paste_at(targets, 1, square(20), left=0, top=0)
    assert keep.tolist() == [True, False]


def test_dropped_objects_leave_and_instances_of_an_image_stay_together():
    images, valid = empty_images(3)
    targets = make_targets([[[0, 0, 48, 40]], [[0, 0, 5, 5]], [[0, 0, 48, 40]]])
    everything = torch.ones(SIZE, dtype=torch.bool)
    _, changed = copy_paste(images, valid, targets, make_bank([everything]), seed=0, step=0, image_keys=[0, 1, 2], **PLAIN)
    assert changed.image_ids_G.tolist() == [0, 1, 2] and changed.is_pasted_G.all()
    _, changed = copy_paste(images, valid, targets, make_bank([square(3)]), seed=0, step=0, image_keys=[0, 1, 2], **PLAIN)
    assert changed.image_ids_G.tolist() == [0, 0, 1, 1, 2, 2]
    assert changed.is_pasted_G.tolist() == [False, True] * 3
    assert not changed.masks_GHW[::2].any() and changed.masks_GHW[1::2].flatten(1).sum(1).tolist() == [9, 9, 9]


def test_visible_masks_of_pasted_objects_never_overlap_and_match_the_pixels():
    bank = MemoryBank(min_pixels=1)
    masks = torch.zeros(12, *SIZE, dtype=torch.bool)
    masks[:, 5:30, 5:30] = True
    image = torch.full((1, 3, *SIZE), 1.0)
    ids = torch.zeros(12, dtype=torch.long)
    flags = torch.ones(12, dtype=torch.bool)
    bank.remember(image, InstanceTargets(mask_boxes(masks), torch.arange(12), ids, SIZE, 1, masks, flags), None, image_keys=[0])
    bank.commit()
    images, valid = empty_images(1)
    counts = set()
    for step in range(40):
        pasted, targets = copy_paste(images, valid, make_targets([[]]), bank, seed=0, step=step, image_keys=[0], probability=1.0)
        assert targets.masks_GHW.sum(0).max() == 1
        assert torch.equal(targets.masks_GHW.any(0), pasted[0].any(0))
        assert torch.equal(targets.boxes_G4, mask_boxes(targets.masks_GHW))
        counts.add(len(targets))
    assert 3 in counts and len(counts) > 1  # some are too hidden below others to be pasted


def test_batch_without_any_instance_receives_objects():
    images, valid = empty_images(2)
    _, changed = copy_paste(
        images, valid, make_targets([[], []]), make_bank([square()]), seed=0, step=0, image_keys=[0, 1], **PLAIN
    )
    assert changed.image_ids_G.tolist() == [0, 1] and changed.num_images == 2 and changed.masks_GHW.shape == (2, *SIZE)


def test_objects_pasted_before_lose_what_is_pasted_over_them():
    images, valid = empty_images(1)
    targets, bank = make_targets([[]]), make_bank([torch.ones(20, 24, dtype=torch.bool)])
    for step in range(6):
        images, targets = copy_paste(images, valid, targets, bank, seed=0, step=step, image_keys=[0], **PLAIN)
        assert targets.masks_GHW.sum(0).max() == 1 and targets.is_pasted_G.all()
        assert torch.equal(targets.boxes_G4, mask_boxes(targets.masks_GHW))
    assert 1 < len(targets) <= 6


def test_half_precision_images_keep_their_dtype():
    images, valid = empty_images(1)
    pasted, _ = copy_paste(
        images.bfloat16(), valid, make_targets([[]]), make_bank([square()]), seed=0, step=0, image_keys=[0], **PLAIN
    )
    assert pasted.dtype == torch.bfloat16 and pasted.sum() == 3 * 64


def test_wrong_arguments_say_what_came():
    images, valid = empty_images(1)
    bank = make_bank([square()])
    with pytest.raises(ValueError, match="expected 1 images"):
        copy_paste(images, valid, make_targets([[]]), bank, seed=0, step=0, image_keys=[0, 1])
    with pytest.raises(ValueError, match="uint8"):
        copy_paste(images.to(torch.uint8), valid, make_targets([[]]), bank, seed=0, step=0, image_keys=[0])
