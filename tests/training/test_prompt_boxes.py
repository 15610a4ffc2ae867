"""The boxes that a network is prompted with: in order, padded, jittered by each image alone."""

import torch

from sim_hf.structures import InstanceTargets
from sim_hf.training.box_prompts import MAX_PROMPTS, jittered_boxes, prompt_boxes


def make_targets(image_ids, num_images):
    count = len(image_ids)
    corners = torch.arange(count, dtype=torch.float32)[:, None] + torch.tensor([0.0, 10.0])
    return InstanceTargets(
        boxes_G4=torch.cat([corners, corners + 20], dim=1).reshape(count, 4),
        class_labels_G=torch.zeros(count, dtype=torch.int64),
        image_ids_G=torch.tensor(image_ids, dtype=torch.int64),
        input_size=(64, 64),
        num_images=num_images,
    )


def test_a_prompt_is_the_instance_of_the_same_rank_in_its_image():
    targets = make_targets([0, 2, 0, 2, 2], num_images=3)
    assert targets.rank_in_image().tolist() == [0, 0, 1, 1, 2]
    prompts = prompt_boxes(targets.boxes_G4, targets)
    assert prompts.shape == (3, 3, 4)
    boxes = targets.boxes_G4
    assert torch.equal(prompts[0], torch.stack([boxes[0], boxes[2], torch.zeros(4)]))
    assert torch.equal(prompts[1], torch.zeros(3, 4))
    assert torch.equal(prompts[2], boxes[[1, 3, 4]])


def test_without_an_instance_in_the_batch_there_is_one_prompt_of_zeros():
    targets = make_targets([], num_images=2)
    assert torch.equal(prompt_boxes(targets.boxes_G4, targets), torch.zeros(2, 1, 4))
    assert jittered_boxes(targets, amount=0.1, seed=0, step=0, image_keys=[4, 5]).shape == (0, 4)


def test_a_crowded_image_is_prompted_with_its_first_instances():
    targets = make_targets([0] * (MAX_PROMPTS + 3), num_images=1)
    assert torch.equal(prompt_boxes(targets.boxes_G4, targets)[0], targets.boxes_G4[:MAX_PROMPTS])


def test_jitter_moves_sides_within_its_amount_and_differs_between_them():
    targets = make_targets([0, 0], num_images=1)
    moved = jittered_boxes(targets, amount=0.1, seed=0, step=7, image_keys=[3]) - targets.boxes_G4
    assert (moved.abs() <= 0.1 * 20).all() and len(moved.unique()) == 8
    assert torch.equal(jittered_boxes(targets, amount=0.0, seed=0, step=7, image_keys=[3]), targets.boxes_G4)


def test_jitter_depends_on_seed_step_and_image_but_not_on_the_batch():
    def moved(image_ids, num_images, keys, *, seed=0, step=7):
        targets = make_targets(image_ids, num_images)
        return (jittered_boxes(targets, amount=0.1, seed=seed, step=step, image_keys=keys) - targets.boxes_G4)[-1]

    alone = moved([0], 1, [9])
    torch.testing.assert_close(moved([0, 1], 2, [3, 9]), alone, rtol=0, atol=1e-5)
    for other in (moved([0], 1, [8]), moved([0], 1, [9], seed=1), moved([0], 1, [9], step=8)):
        assert not torch.allclose(other, alone, atol=1e-3)
