"""Backbones of targets."""

import pytest
import torch
from torch import nn

from oag_transform.evaluation.backbones import (
    EFFICIENTNET_LITE_SIZES,
    build,
    build_torchvision,
    efficientnet_lite,
    for_inference,
)
from oag_transform.evaluation.targets import load_target
from tests.sample_images import rand
from tests.test_targets import names


def test_the_three_sizes_of_efficientnet_lite() -> None:
    for variant, size in enumerate(EFFICIENTNET_LITE_SIZES):
        preprocessing = load_target(f"efficientnet-lite{variant}", classes=names(1000)).preprocessing
        assert (preprocessing.resize, preprocessing.crop) == (size + 32, size)
    with pytest.raises(ValueError, match=r"variant must be one of \(0, 1, 2\), got 3"):
        efficientnet_lite(3)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "densenet121", "vgg11", "efficientnet-lite0"])
def test_the_last_layer_is_replaced(backbone: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model, _ = build(backbone, None, 7)
    with torch.no_grad():
        assert torch.equal(model.eval()(rand(1, 3, 64, 64)), torch.zeros(1, 7))  # the new layer starts at zero


def test_a_backbone_without_a_linear_layer_is_named() -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match="squeezenet1_0 has no linear layer"):
        build("squeezenet1_0", None, 3)


def test_weights_of_another_model_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"resnet18 has the weights \['IMAGENET1K_V1'\], got 'ResNet50_Weights.IMAGENET1K_V1'"):
        build("resnet18", "ResNet50_Weights.IMAGENET1K_V1", 3)
    with pytest.raises(ValueError, match="efficientnet-lite0 has its own, got weights 'DEFAULT'"):
        build("efficientnet-lite0", "DEFAULT", 3)


def test_what_torchvision_sets_with_weights_is_set_where_they_come_from_a_file() -> None:
    inception, googlenet = (build_torchvision(name, None, 3)[0][1] for name in ("inception_v3", "googlenet"))
    assert inception.transform_input
    assert googlenet.transform_input
    assert googlenet.aux1 is inception.AuxLogits is None


def test_auxiliary_heads_of_a_file_are_left_out() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux1 = nn.Linear(2, 2), nn.Linear(2, 2)

    state = WithHead().state_dict()
    assert for_inference(state, nn.ModuleDict({"fc": nn.Linear(2, 2)})).keys() == {"fc.weight", "fc.bias"}
    assert for_inference(state, WithHead()).keys() == state.keys()
