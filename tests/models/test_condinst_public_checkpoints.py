"""Names and shapes of the public CondInst and BoxInst checkpoints, written here from their networks, into ours."""

import pytest
import torch

from sim_hf.models.condinst import public_checkpoints
from sim_hf.models.condinst.public_checkpoints import converted, load_public_checkpoint, our_name

DEPTHS = (1, 1, 6, 1)  # the third stage tells a ResNet-50; fewer blocks elsewhere keep the test small
WIDTHS = (64, 128, 256, 512)
FEATURES, MASK_FEATURES, NUM_CLASSES = 32, 16, 3


def norm(name, channels, *, running=True):
    names = ("weight", "bias", "running_mean", "running_var") if running else ("weight", "bias")
    return {f"{name}.{part}": (channels,) for part in names}


def convolution(name, out_channels, in_channels, size, *, bias=True):
    return {f"{name}.weight": (out_channels, in_channels, size, size), **({f"{name}.bias": (out_channels,)} if bias else {})}


def adelaidet(mask_channels, controls):
    shapes = {
        **convolution("backbone.bottom_up.stem.conv1", 64, 3, 7, bias=False),
        **norm("backbone.bottom_up.stem.conv1.norm", 64),
        "mask_head.sizes_of_interest": (5,),
        "mask_head._iter": (1,),
        **convolution("mask_branch.logits", NUM_CLASSES, 128, 1),
    }
    channels = 64
    for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True), start=2):
        for block in range(depth):
            name = f"backbone.bottom_up.res{stage}.{block}"
            if block == 0:
                shapes |= convolution(f"{name}.shortcut", 4 * width, channels, 1, bias=False)
                shapes |= norm(f"{name}.shortcut.norm", 4 * width)
            for index, (out, came, size) in enumerate([(width, channels, 1), (width, width, 3), (4 * width, width, 1)], start=1):
                shapes |= convolution(f"{name}.conv{index}", out, came, size, bias=False) | norm(f"{name}.conv{index}.norm", out)
            channels = 4 * width
    for level, width in zip((3, 4, 5), (512, 1024, 2048), strict=True):
        shapes |= convolution(f"backbone.fpn_lateral{level}", FEATURES, width, 1)
        shapes |= convolution(f"backbone.fpn_output{level}", FEATURES, FEATURES, 3)
        shapes |= convolution(f"mask_branch.refine.{level - 3}.0", MASK_FEATURES, FEATURES, 3, bias=False)
        shapes |= norm(f"mask_branch.refine.{level - 3}.1", MASK_FEATURES)
    for level in (6, 7):
        shapes |= convolution(f"backbone.top_block.p{level}", FEATURES, FEATURES, 3)
    head = "proposal_generator.fcos_head"
    for tower in ("cls_tower", "bbox_tower"):
        for layer in range(4):
            shapes |= convolution(f"{head}.{tower}.{3 * layer}", FEATURES, FEATURES, 3)
            shapes |= norm(f"{head}.{tower}.{3 * layer + 1}", FEATURES, running=False)
    for name, out in (("cls_logits", NUM_CLASSES), ("bbox_pred", 4), ("ctrness", 1)):
        shapes |= convolution(f"{head}.{name}", out, FEATURES, 3)
    shapes |= convolution("controller", controls, FEATURES, 3)
    shapes |= {f"{head}.scales.{level}.scale": (1,) for level in range(5)}
    for layer in range(4):
        shapes |= convolution(f"mask_branch.tower.{layer}.0", MASK_FEATURES, MASK_FEATURES, 3, bias=False)
        shapes |= norm(f"mask_branch.tower.{layer}.1", MASK_FEATURES)
    return shapes | convolution("mask_branch.tower.4", mask_channels, MASK_FEATURES, 1)


def mmdetection(mask_channels, controls):
    shapes = {**convolution("backbone.conv1", 64, 3, 7, bias=False), **norm("backbone.bn1", 64)}
    channels = 64
    for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True), start=1):
        for block in range(depth):
            name = f"backbone.layer{stage}.{block}"
            if block == 0:
                shapes |= convolution(f"{name}.downsample.0", 4 * width, channels, 1, bias=False)
                shapes |= norm(f"{name}.downsample.1", 4 * width)
            for index, (out, came, size) in enumerate([(width, channels, 1), (width, width, 3), (4 * width, width, 1)], start=1):
                shapes |= convolution(f"{name}.conv{index}", out, came, size, bias=False) | norm(f"{name}.bn{index}", out)
            channels = 4 * width
    mask = "mask_head.mask_feature_head"
    for level, width in enumerate((512, 1024, 2048)):
        shapes |= convolution(f"neck.lateral_convs.{level}.conv", FEATURES, width, 1)
        shapes |= convolution(f"{mask}.convs_all_levels.{level}.conv{level}.conv", MASK_FEATURES, FEATURES, 3, bias=False)
        shapes |= norm(f"{mask}.convs_all_levels.{level}.conv{level}.bn", MASK_FEATURES)
    for level in range(5):
        shapes |= convolution(f"neck.fpn_convs.{level}.conv", FEATURES, FEATURES, 3)
    for tower in ("cls_convs", "reg_convs"):
        for layer in range(4):
            shapes |= convolution(f"bbox_head.{tower}.{layer}.conv", FEATURES, FEATURES, 3)
            shapes |= norm(f"bbox_head.{tower}.{layer}.gn", FEATURES, running=False)
    predictors = (("conv_cls", NUM_CLASSES), ("conv_reg", 4), ("conv_centerness", 1), ("controller", controls))
    for name, out in predictors:
        shapes |= convolution(f"bbox_head.{name}", out, FEATURES, 3)
    shapes |= {f"bbox_head.scales.{level}.scale": () for level in range(5)}
    for layer in range(4):
        shapes |= convolution(f"{mask}.conv_branch.{layer}.conv", MASK_FEATURES, MASK_FEATURES, 3, bias=False)
        shapes |= norm(f"{mask}.conv_branch.{layer}.bn", MASK_FEATURES)
    return shapes | convolution(f"{mask}.conv_pred", mask_channels, MASK_FEATURES, 1)


def tensors_of(shapes):
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.fixture
def small_depths(monkeypatch):
    monkeypatch.setattr(public_checkpoints, "_DEPTHS", {6: list(DEPTHS)})


@pytest.mark.parametrize("project", [adelaidet, mmdetection])
@pytest.mark.parametrize(("channels", "controls"), [(8, 169), (16, 593)], ids=["condinst", "boxinst"])
def test_every_tensor_of_a_public_checkpoint_has_its_place(small_depths, project, channels, controls):
    tensors = tensors_of(project(channels, controls))
    model = load_public_checkpoint(tensors, caffe=project is adelaidet)
    state = model.state_dict()
    for name, tensor in tensors.items():
        ours = our_name(name)
        if ours is None or ours.startswith("scales.") or ours.endswith("embedder.convolution.weight"):
            continue
        assert torch.equal(state[ours], tensor), name
    prefix = "proposal_generator.fcos_head" if project is adelaidet else "bbox_head"
    assert state["head.scales"].tolist() == [tensors[f"{prefix}.scales.{level}.scale"].item() for level in range(5)]
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).class_logits.shape[-1] == NUM_CLASSES


def test_blue_comes_first_in_caffes_weights_and_the_stride_in_the_first_convolution(small_depths):
    tensors = tensors_of(adelaidet(8, 169))
    model = load_public_checkpoint(tensors, caffe=True)
    stem = model.get_submodule("model.pixel_level_module.encoder.embedder.embedder.convolution")
    assert torch.equal(stem.weight[:, 0], tensors["backbone.bottom_up.stem.conv1.weight"][:, 2])
    block = model.get_submodule("model.pixel_level_module.encoder.encoder.stages.1.layers.0.layer")
    assert [layer.convolution.stride for layer in block] == [(2, 2), (1, 1), (1, 1)]


def test_what_is_missing_left_over_or_unknown_is_said(small_depths):
    tensors = tensors_of(mmdetection(8, 169))
    del tensors["bbox_head.conv_reg.bias"]
    with pytest.raises(ValueError, match=r"missing: head\.box_predictor\.bias"):
        load_public_checkpoint(tensors)
    with pytest.raises(ValueError, match=r"'roi_head\.fc\.weight' is no tensor"):
        our_name("roi_head.fc.weight")
    with pytest.raises(ValueError, match=r"scales of levels \[0, 1, 2, 3, 4\]"):
        converted({})


def test_the_branch_that_only_helped_to_train_is_left_out():
    assert our_name("mask_branch.seg_head.0.0.weight") is None and our_name("mask_head._iter") is None
