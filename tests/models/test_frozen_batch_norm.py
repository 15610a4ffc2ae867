"""Frozen norms inside their convolutions, against the same backbone that was left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoBackbone

from sim_hf.models.sim.backbone_config import resolve_backbone_config
from sim_hf.models.sim.frozen_batch_norm import FoldingConv2d, _ReLU6, fold_batch_norms

PAIRS = {"timm:mobilenetv2_100": 51, "timm:resnet18": 20, "resnet": 53, "timm:efficientnet_b0": 48}


def backbone_with_statistics(name):
    """Norms as after training: no scale is 1, no mean is 0."""
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(resolve_backbone_config(name)).double()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return backbone.eval()


def maps_and_gradients(backbone, images):
    maps = backbone(images).feature_maps
    sum(x.square().mean() for x in maps).backward()
    return maps, {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", PAIRS)
def test_folded_backbone_has_the_same_maps_and_gradients(name):
    plain = backbone_with_statistics(name)
    folded = copy.deepcopy(plain)
    assert fold_batch_norms(folded) == PAIRS[name]
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(maps_and_gradients(folded, images), maps_and_gradients(plain, images))


def test_relu6_in_place_has_the_value_and_gradient_of_the_plain_one_also_at_its_corners():
    x = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0, float("nan")], requires_grad=True)
    results = []
    for activation in (nn.ReLU6(), _ReLU6.apply):
        value = activation(x * 1)
        results.append((value.detach(), *torch.autograd.grad(value, x, torch.full_like(x, 3))))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_names_of_the_weights_stay():
    plain = AutoBackbone.from_config(resolve_backbone_config("timm:resnet18"))
    folded = copy.deepcopy(plain)
    fold_batch_norms(folded)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in plain.named_modules()]


def test_in_training_mode_the_norm_normalises_and_learns_its_statistics():
    plain = backbone_with_statistics("timm:resnet18").train()
    folded = copy.deepcopy(plain)
    fold_batch_norms(folded)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(folded(images).feature_maps, plain(images).feature_maps)
    torch.testing.assert_close(folded.state_dict(), plain.state_dict())


def test_a_copy_folds_with_its_own_norms():
    original = backbone_with_statistics("timm:resnet18")
    fold_batch_norms(original)
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):  # made on this line
        norms = set(copied.modules())
        convolutions = [module for module in copied.modules() if isinstance(module, FoldingConv2d)]
        assert len(convolutions) == 20 and all(module.following_norm in norms for module in convolutions)


class Odd(nn.Module):
    """Convolutions whose output somebody else reads too, and norms without a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.bn1, self.bn2, self.bn3, self.before = (nn.BatchNorm2d(3) for _ in range(4))
        self.plain = nn.BatchNorm2d(3, affine=False)

    def forward(self, x):
        y = self.first(self.before(x))
        y = self.bn1(y) + y
        y = self.bn2(self.second(y).relu_())
        return self.plain(self.bn3(self.third(y)))


def test_only_a_norm_that_reads_the_convolution_alone_is_folded():
    model = Odd().eval()
    for name in ("before", "bn1", "bn2", "bn3", "plain"):
        getattr(model, name).running_mean.uniform_(1, 2)
    images = torch.randn(2, 3, 5, 5)
    expected = model(images)
    assert fold_batch_norms(model) == 1
    assert isinstance(model.third, FoldingConv2d)
    torch.testing.assert_close(model(images), expected)


def test_a_norm_on_another_device_does_its_own_work():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert fold_batch_norms(model) == 1
    images = torch.randn(1, 3, 8, 8)
    model[1].to("meta")
    assert model[0](images).equal(nn.functional.conv2d(images, model[0].weight, model[0].bias))
    assert model[1](torch.zeros(1, 4, 6, 6, device="meta")).shape == (1, 4, 6, 6)
