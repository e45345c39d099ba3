"""The meta-gradient of a network of fused blocks against the naive loop over the same network of native modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import FIRST_ORDER, WAYS, gradients, make, naive, relative_difference, scramble, statistics
from torch import Tensor, nn

from innerloop import Examples, Method, Task, maml, maml_plus_plus, meta_sgd, stack_tasks
from innerloop.closed_forms import kernels
from innerloop.nn import Conv4, NormActPool

CLASSES = 4


class NativeBlock(nn.BatchNorm2d):
    """The three modules, under the fused block's names."""

    pool: int | None = 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(super().forward(x), 0.01)
        return y if self.pool is None else F.max_pool2d(y, self.pool)


def network(channels: int, size: int, strided: bool = False) -> Conv4:
    """Conv4 with gammas of both signs and no biases before batch norm."""
    torch.manual_seed(3)
    model = Conv4(CLASSES, channels, size, filters=3, strided=strided).double()
    for module in model.modules():
        if isinstance(module, NormActPool):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data[::2] *= -1
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def native(model: Conv4) -> Conv4:
    """The same network of native modules."""
    twin = network(model.blocks[0][0].in_channels, 28)
    twin.head, twin.pool = model.head, model.pool
    for i, block in enumerate(model.blocks):
        layer = NativeBlock(3).double()
        layer.load_state_dict(block[1].state_dict())
        layer.pool = block[1].pool
        twin.blocks[i] = nn.Sequential(block[0], layer)
    return twin


def tasks(channels: int, size: int, shots: int, whole: bool) -> Task:
    """Random images; ``whole`` ones have few values, so that poolings tie."""
    torch.manual_seed(5)

    def examples(n: int) -> Examples:
        images = torch.randn(n * CLASSES, channels, size, size, dtype=torch.float64)
        return Examples(images.sign() if whole else images, torch.arange(n * CLASSES) % CLASSES)

    return stack_tasks([Task(examples(shots), examples(1)) for _ in range(2)])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "size", "shots", "strided"), [(1, 28, 1, False), (3, 23, 2, False), (2, 21, 1, True)]
)
@pytest.mark.parametrize("method", [maml, meta_sgd, maml_plus_plus])
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_naive_loop_over_native_modules(
    method: type[Method],
    way: str,
    channels: int,
    size: int,
    shots: int,
    strided: bool,
    layout: torch.memory_format,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if compiled and kernels.library() is None:
        pytest.skip("no C compiler")
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
    switches = {"inner_steps": 3, "inner_lr": 0.1, **({"da_epochs": 0} if method is maml_plus_plus else {})}
    model = network(channels, size, strided)
    meta_batch = tasks(channels, size, shots, whole=size == 23)
    weights = [0.2, 0.2, 0.6] if method is maml_plus_plus else [0.0, 0.0, 1.0]
    reference = scramble(make(native(model), F.cross_entropy, method(**switches), "reverse"))
    loss, expected, left = naive(reference, meta_batch, weights, first_order=way in FIRST_ORDER)
    learner = scramble(make(model.to(memory_format=layout), F.cross_entropy, method(**switches), way))
    result = learner.backward(meta_batch, epoch=4)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert relative_difference(gradients(learner), expected) < 1e-9
    for name, value in statistics(learner).items():
        torch.testing.assert_close(value, left[name], rtol=1e-10, atol=1e-10, msg=name)
