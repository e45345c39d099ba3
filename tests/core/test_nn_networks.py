"""The networks of the field: shapes, layers and what they refuse."""

import pytest
import torch
from torch import nn

from innerloop import MetaLearner, anil
from innerloop.nn import MLP, Conv4, NormActPool, ResNet12


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 84), (1, 16)])
def test_conv4(channels: int, size: int, strided: bool) -> None:
    model = Conv4(5, channels, size, filters=6, strided=strided)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 5)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(channels, 6), (6, 6), (6, 6), (6, 6)]
    assert all(m.kernel_size == (3, 3) and m.stride == ((2, 2) if strided else (1, 1)) for m in convolutions)
    blocks = [m for m in model.modules() if isinstance(m, NormActPool)]
    assert [(b.negative_slope, b.pool) for b in blocks] == [(0.01, None if strided else 2)] * 4
    assert model.head.in_features == (6 if strided else 6 * (size // 16) ** 2)
    assert all(not m.bias.any() for m in (*convolutions, model.head))


def test_conv4_is_the_network_of_the_papers() -> None:
    assert sum(p.numel() for p in Conv4(20).parameters()) == 640 + 3 * 36928 + 4 * 128 + 64 * 20 + 20
    assert Conv4(5, 3, 84, 48).head.in_features == 1200


def test_conv4_refuses_images_too_small_to_pool() -> None:
    with pytest.raises(ValueError, match="at least 16 x 16, got 15 x 15"):
        Conv4(5, size=15)
    assert Conv4(5, size=5, filters=2, strided=True)(torch.randn(2, 1, 5, 5)).shape == (2, 5)


def test_resnet12() -> None:
    model = ResNet12(4, widths=(3, 4, 5, 6))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    assert model(torch.randn(2, 3, 84, 84)).shape == (2, 4)
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 12
    assert model.blocks(torch.randn(1, 3, 32, 48)).shape == (1, 6, 2, 3)
    assert ResNet12(5, channels=1, widths=(2, 2, 2, 2))(torch.randn(1, 1, 16, 16)).shape == (1, 5)


def test_resnet12_takes_a_shortcut() -> None:
    """With the branch's last gamma and beta at zero a block is the pooled, rectified shortcut."""
    block = ResNet12(2, channels=2, widths=(3, 3, 3, 3)).blocks[0].eval()
    nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(1, 2, 8, 8)
    expected = nn.functional.max_pool2d(nn.functional.leaky_relu(block.shortcut(x), 0.1), 2)
    torch.testing.assert_close(block(x), expected)


def test_mlp() -> None:
    model = MLP()
    assert model(torch.randn(7, 1)).shape == (7, 1)
    assert sum(p.numel() for p in model.parameters()) == 80 + 1640 + 41
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2
    assert MLP(3, 2, hidden=(5,))(torch.randn(4, 3)).shape == (4, 2)
    assert MLP(3, 2, hidden=())(torch.randn(4, 3)).shape == (4, 2)


@pytest.mark.parametrize("model", [MLP(2, 3, (4,)), Conv4(3, filters=2), ResNet12(3, widths=(2, 2, 2, 2))])
def test_the_last_layer_is_named_head(model: nn.Module) -> None:
    learner = MetaLearner(model, nn.functional.cross_entropy, anil())
    adapted = [n for n, _ in learner.named_parameters() if n.startswith("adapted/")]
    assert adapted == ["adapted/head.weight", "adapted/head.bias"]
