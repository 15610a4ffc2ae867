import pytest
import torch

from sim_hf.data.collator import DetectionCollator, denormalize, normalize, normalized
from sim_hf.structures import InstanceTargets

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _sample(height, width, num_objects=1, *, with_masks=False, image_id=3):
    sample = {
        "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8),
        "boxes": torch.tensor([[1.0, 2.0, 5.0, 6.0]]).repeat(num_objects, 1),
        "class_labels": torch.arange(num_objects),
        "has_mask": torch.full((num_objects,), with_masks),
        "image_id": image_id,
        "orig_size": (2 * height, 2 * width),
    }
    return sample | {"masks": torch.ones(num_objects, height, width, dtype=torch.bool)} if with_masks else sample


def test_batch_is_padded_to_the_largest_image_rounded_up():
    batch = DetectionCollator(MEAN, STD)([_sample(40, 33), _sample(20, 64)])
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_mask"].dtype == torch.int64
    assert batch["pixel_mask"][0].sum() == 40 * 33 and batch["pixel_mask"][0, :40, :33].all()
    assert batch["pixel_mask"][1].sum() == 20 * 64


def test_image_of_exact_size_gets_no_padding():
    assert DetectionCollator(MEAN, STD)([_sample(32, 64)])["pixel_values"].shape == (1, 3, 32, 64)


def test_padding_is_zero_after_normalisation():
    batch = DetectionCollator(MEAN, STD)([_sample(40, 33), _sample(20, 64)])
    padding = batch["pixel_mask"][:, None].expand(-1, 3, -1, -1) == 0
    assert (batch["pixel_values"][padding] == 0).all()


def test_normalisation_matches_the_formula_and_is_undone():
    image = torch.randint(0, 256, (3, 16, 12), dtype=torch.uint8)
    expected = (image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    values = normalize(image, MEAN, STD)
    assert torch.allclose(values, expected, atol=1e-6)
    assert torch.equal((denormalize(values, MEAN, STD) * 255).round().to(torch.uint8), image)
    batch = DetectionCollator(MEAN, STD)([_sample(16, 12) | {"image": image}])
    assert torch.equal(batch["pixel_values"][0, :, :16, :12], values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
def test_images_are_written_into_the_batch_bit_for_bit_as_in_steps(dtype):
    samples = [_sample(40, 33), _sample(20, 64), _sample(64, 64), _sample(1, 1)]
    for sample in samples:
        sample["image"] = sample["image"].to(dtype)
    samples[1]["image"] = samples[1]["image"].mT.contiguous().mT  # other strides, as after a crop or a flip
    mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = torch.zeros(4, 3, 96, 96)
    for k, sample in enumerate(samples):
        h, w = sample["image"].shape[-2:]
        expected[k, :, :h, :w] = sample["image"].to(torch.float32).mul(1 / (255 * std_311)).sub(mean_311 / std_311)
    torch.empty(4, 3, 96, 96).fill_(float("nan"))  # its memory is likely the batch's
    pixel_values = DetectionCollator(MEAN, STD, pad_to=96)(samples)["pixel_values"]
    assert torch.equal(pixel_values, expected) and pixel_values.is_contiguous()


def test_normalize_leaves_its_input_alone():
    image = torch.rand(3, 4, 4)
    before = image.clone()
    normalize(image, MEAN, STD)
    assert torch.equal(image, before)


def test_labels_carry_sizes_and_ids():
    label = DetectionCollator(MEAN, STD)([_sample(40, 33, 2)])["labels"][0]
    assert label["boxes"].tolist() == [[1, 2, 5, 6]] * 2, "boxes are pixels, padding at the bottom and right moves none"
    assert label["image_id"].tolist() == [3] and label["size"].tolist() == [40, 33]
    assert label["orig_size"].tolist() == [80, 66] and set(label) == {
        "boxes", "class_labels", "image_id", "orig_size", "size"
    }  # fmt: skip


def test_masks_are_padded_to_the_input_size():
    label = DetectionCollator(MEAN, STD)([_sample(40, 33, 2, with_masks=True), _sample(64, 64)])["labels"][0]
    assert label["masks"].shape == (2, 64, 64) and label["masks"].dtype == torch.bool
    assert label["masks"].sum() == 2 * 40 * 33 and label["has_mask"].tolist() == [True, True]


def test_fixed_size_is_kept_and_larger_images_are_refused():
    collator = DetectionCollator(MEAN, STD, pad_to=(48, 80))
    assert collator([_sample(40, 33)])["pixel_values"].shape == (1, 3, 48, 80)
    assert DetectionCollator(MEAN, STD, pad_to=50)([_sample(40, 33)])["pixel_values"].shape == (1, 3, 50, 50)
    with pytest.raises(ValueError, match=r"49 x 10 .*pad_to"):
        collator([_sample(49, 10)])


def test_batch_without_any_object_becomes_empty_targets():
    batch = DetectionCollator(MEAN, STD)([_sample(32, 32, 0), _sample(20, 20, 0, with_masks=True)])
    targets = InstanceTargets.from_labels(batch["labels"], tuple(batch["pixel_values"].shape[-2:]))
    assert len(targets) == 0 and targets.num_images == 2


def test_wrong_settings_and_empty_batches_are_refused():
    for arguments in (((0.5,), (0.5,)), ((0.5,) * 3, (0.2, 0.0, 0.2))):
        with pytest.raises(ValueError, match="three means"):
            DetectionCollator(*arguments)
    with pytest.raises(ValueError, match="size_divisor"):
        DetectionCollator(MEAN, STD, size_divisor=0)
    with pytest.raises(ValueError, match="at least one"):
        DetectionCollator(MEAN, STD)([])


def test_an_image_of_one_channel_is_refused():
    with pytest.raises(ValueError, match=r"expected an image of shape \(3, 5, 4\), got \(1, 5, 4\)"):
        normalize(torch.zeros(1, 5, 4, dtype=torch.uint8), (0.5,) * 3, (0.2,) * 3, out=torch.empty(3, 5, 4))


@pytest.mark.parametrize("pad_to", [None, (96, 128)])
def test_a_batch_of_bytes_becomes_the_batch_bit_for_bit(pad_to):
    samples = [_sample(40, 33), _sample(20, 64, with_masks=True), _sample(64, 64, num_objects=0), _sample(1, 1)]
    samples[1]["image"] = samples[1]["image"].mT.contiguous().mT
    expected = DetectionCollator(MEAN, STD, pad_to=pad_to)(samples)
    small = DetectionCollator(MEAN, STD, pad_to=pad_to, as_bytes=True)(samples)
    assert small["pixel_values"].dtype == torch.uint8 and small["pixel_mask"].dtype == torch.bool
    batch = normalized(small, MEAN, STD)
    assert batch.keys() == expected.keys()
    for name in ("pixel_values", "pixel_mask"):
        assert batch[name].dtype == expected[name].dtype and torch.equal(batch[name], expected[name])
        assert batch[name].is_contiguous()
    zeros = (batch["pixel_values"] == 0) & ~small["pixel_mask"][:, None]
    assert not torch.signbit(batch["pixel_values"])[zeros].any()  # the padding is +0, as without bytes
    for ours, theirs in zip(batch["labels"], expected["labels"], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bytes_are_made_of_bytes_only():
    collate = DetectionCollator(MEAN, STD, as_bytes=True)
    with pytest.raises(ValueError, match="expected a uint8 image"):
        collate([_sample(8, 8) | {"image": torch.rand(3, 8, 8)}])
    with pytest.raises(ValueError, match="expected a uint8 image"):
        collate([_sample(8, 8) | {"image": torch.zeros(1, 8, 8, dtype=torch.uint8)}])
