"""Strong colours for the student: the teacher's image stays, padding and batch mates do not matter."""

import torch

from sim_hf.training.strong_augmentation import strongly_augmented

OPTIONS = {"seed": 3, "step": 7}


def images_of(count, size=(40, 32)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)), torch.ones(count, *size, dtype=torch.int64)


def test_every_image_changes_at_probability_1_and_none_at_0():
    images, mask = images_of(4)
    strong, changed = strongly_augmented(images, mask, probability=1.0, image_keys=[1, 2, 3, 4], **OPTIONS)
    assert changed.all() and all(not torch.equal(a, b) for a, b in zip(images, strong, strict=True))
    assert strong.min() >= 0 and strong.max() <= 1
    same, changed = strongly_augmented(images, mask, probability=0.0, image_keys=[1, 2, 3, 4], **OPTIONS)
    assert torch.equal(images, same) and not changed.any()


def test_what_happens_to_an_image_is_its_own():
    """The same pixels whatever stands beside it and however far the batch is padded."""
    images, mask = images_of(2, (24, 20))
    wide, wide_mask = torch.zeros(2, 3, 40, 32), torch.zeros(2, 40, 32, dtype=torch.int64)
    wide[:, :, :24, :20], wide_mask[:, :24, :20] = images, 1
    alone, _ = strongly_augmented(images[1:], mask[1:], probability=1.0, image_keys=[9], **OPTIONS)
    padded, changed = strongly_augmented(wide, wide_mask, probability=1.0, image_keys=[5, 9], **OPTIONS)
    torch.testing.assert_close(padded[1, :, :24, :20], alone[0])
    assert not padded[:, :, 24:].any() and torch.equal(changed[:, 0], wide_mask.bool())


def test_an_image_of_a_few_pixels():
    images, mask = images_of(8, (3, 2))
    strong, _ = strongly_augmented(images, mask, probability=1.0, image_keys=list(range(8)), **OPTIONS)
    assert torch.isfinite(strong).all()


def test_another_step_gives_other_colours():
    images, mask = images_of(1)
    first, second = (strongly_augmented(images, mask, probability=1.0, image_keys=[1], seed=0, step=step)[0] for step in (0, 1))
    assert not torch.equal(first, second)
