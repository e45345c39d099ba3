"""The first block as one operation, against its two parts of native modules and against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from innerloop.closed_forms import ConvNormActPool, kernels
from innerloop.nn import ConvNormActPool as Block

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
Parameters = tuple[Tensor, Tensor, Tensor, Tensor]

# images, channels, height, width, filters, pool: odd maps, one image, every width of the kernels (64 + 32 + 16 + 1)
SHAPES = [(1, 1, 7, 7, 1, 2), (3, 2, 9, 5, 3, 2), (2, 3, 8, 10, 17, 3), (2, 1, 6, 6, 113, 2), (1, 4, 4, 4, 5, 4)]


def problem(shape: tuple[int, ...], whole: bool = False) -> tuple[Tensor, Parameters]:
    """Images and parameters: a negative gamma and a zero one, and with ``whole`` numbers, poolings that tie."""
    n, c, h, w, filters, _ = shape
    torch.manual_seed(sum(shape))
    x = torch.randn(n, c, h, w, dtype=torch.float64)
    weight = torch.randn(filters, c, 3, 3, dtype=torch.float64)
    gamma = torch.randn(filters, dtype=torch.float64)
    gamma[0] = -gamma[0].abs()
    gamma[1:2] = 0
    b, beta = (torch.randn(filters, dtype=torch.float64) for _ in range(2))
    if whole:
        x, weight, b = x.sign(), weight.sign(), b.round()
    return x, (weight, b, gamma, beta)


def native(pool: int) -> Callable[..., Tensor]:
    def block(x: Tensor, w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.batch_norm(F.conv2d(x, w, b, padding=1), None, None, gamma, beta, True, 0.1, 1e-3)
        return F.max_pool2d(F.leaky_relu(y, 0.1), pool)

    return block


def to_second_order(block: Callable[..., Tensor], x: Tensor, parameters: Parameters) -> list[Tensor]:
    """The output, the gradients of a smooth function of it, and gradients of a smooth function of those."""
    leaves = [p.clone().requires_grad_() for p in parameters]
    y = block(x, *leaves)
    loss = (torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y) * torch.sin(y)).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    again = sum((torch.linspace(1, 2, g.numel(), dtype=g.dtype).view_as(g) * torch.cos(g)).sum() for g in first)
    return [y, *first, *torch.autograd.grad(again, leaves)]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_native_modules(shape: tuple[int, ...], layout: torch.memory_format, whole: bool) -> None:
    x, (w, *rest) = problem(shape, whole)
    x, w = (t.contiguous(memory_format=layout) for t in (x, w))
    found = to_second_order(ConvNormActPool(1e-3, 0.1, shape[-1]), x, (w, *rest))
    expected = to_second_order(native(shape[-1]), x, (w, *rest))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_derivatives_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    x, parameters = problem(shape)
    leaves = [p.requires_grad_() for p in parameters]
    leaves[2].data[1:2] = 0.7  # at a gamma of exactly 0 another place is pooled on either side
    op = ConvNormActPool(1e-3, 0.1, shape[-1])

    def block(*parameters: Tensor) -> Tensor:
        return op(x, *parameters)

    assert gradcheck(block, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(block, leaves, check_fwd_over_rev=True)


def test_float32_comes_near() -> None:
    x, parameters = problem((6, 1, 28, 28, 64, 2))
    found = to_second_order(ConvNormActPool(1e-3, 0.1, 2), x.float(), tuple(p.float() for p in parameters))
    expected = to_second_order(native(2), x, parameters)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if i not in (2, 6):  # the bias has no effect on what batch norm makes of it: zero but for rounding
            assert float(((a - b).norm() / b.norm()).detach()) < 2e-3, i


def block_and_parts(**switches: object) -> tuple[Block, nn.Sequential]:
    """The module, and its parts one after the other, with the same tensors."""
    torch.manual_seed(0)
    block = Block(2, 5, **switches).double()
    return block, nn.Sequential(*block)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_module_moves_running_statistics_and_evaluates_with_them(momentum: float | None) -> None:
    block, _ = block_and_parts()
    reference = nn.Sequential(
        block[0], nn.BatchNorm2d(5, momentum=momentum).double(), nn.LeakyReLU(0.01), nn.MaxPool2d(2)
    )
    block[1].momentum = momentum
    reference[1].load_state_dict(block[1].state_dict())
    for i in range(3):
        x = torch.randn(3, 2, 7, 6, dtype=torch.float64) + i
        torch.testing.assert_close(block(x), reference(x))
    torch.testing.assert_close(dict(block[1].named_buffers()), dict(reference[1].named_buffers()))
    torch.testing.assert_close(block.eval()(x), reference.eval()(x))


def test_one_operation_is_taken_where_it_can_be_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    apply = ConvNormActPool.apply
    monkeypatch.setattr(ConvNormActPool, "apply", lambda self, *a: calls.append(a[0]) or apply(self, *a))
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    block, _ = block_and_parts()

    def taken(block: Block, x: Tensor) -> bool:
        calls.clear()
        torch.testing.assert_close(block(x), nn.Sequential(*block)(x))
        return bool(calls)

    assert taken(block, x)
    assert not taken(block, x.clone().requires_grad_())
    assert not taken(block_and_parts(pool=None)[0], x)
    assert not taken(block_and_parts(stride=2)[0], x)
    assert not taken(Block(5, 5).double(), torch.randn(2, 5, 8, 8, dtype=torch.float64))
    assert not taken(block_and_parts()[0].eval(), x)
    seen: list[Tensor] = []
    block[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert not taken(block, x)
    assert seen
    with forward_ad.dual_level():
        assert not taken(without_hooks(block), forward_ad.make_dual(x, x))


def without_hooks(block: Block) -> Block:
    """The same without its hooks."""
    block[0]._forward_hooks.clear()
    return block


def test_a_wrong_number_of_channels_is_an_error_as_ever() -> None:
    block, _ = block_and_parts()
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 3 channels"):
        block(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Block(1, 2, pool=1).double()(torch.randn(1, 1, 1, 1, dtype=torch.float64))
