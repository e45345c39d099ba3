"""The closed forms of batch normalisation against PyTorch's own derivatives and against finite differences."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from innerloop.batch_norm import ClosedFormBatchNorm

SHAPES = [(4, 3, 5, 5), (1, 2, 3, 4), (6, 4), (3, 2, 7), (2, 3, 2, 3, 2)]


def problem(shape: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    gamma = torch.randn(shape[1], dtype=torch.float64)
    gamma[0] = -gamma[0].abs()  # a negative gamma
    return {"x": x, "gamma": gamma, "beta": torch.randn(shape[1], dtype=torch.float64)}


def loss(tensors: dict[str, Tensor]) -> Tensor:
    # A smooth loss whose own gradient depends on its input: every term of the tangent of the gradient counts.
    y = F.batch_norm(tensors["x"], None, None, tensors["gamma"], tensors["beta"], True, 0.1, 1e-3)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return (weights * torch.sin(y)).sum()


def products(
    tensors: dict[str, Tensor], tangents: dict[str, Tensor], mode: AbstractContextManager[object]
) -> dict[str, Tensor]:
    """The loss's tangent, its gradients, and the gradients' tangents."""
    with forward_ad.dual_level(), mode:
        duals = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        duals = {n: forward_ad.make_dual(t, tangents[n]) if n in tangents else t for n, t in duals.items()}
        value = loss(duals)
        gradients = torch.autograd.grad(value, list(duals.values()), create_graph=True)
        results = {"loss": forward_ad.unpack_dual(value).tangent}
        for name, gradient in zip(duals, gradients, strict=True):
            unpacked = forward_ad.unpack_dual(gradient)
            results |= {f"d{name}": unpacked.primal, f"d{name}.": unpacked.tangent}
    return {n: t.detach() for n, t in results.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moved", ["x", "gamma", "beta", "x gamma", "x beta", "gamma beta", "x gamma beta"])
def test_equals_pytorchs_own_derivatives(shape: tuple[int, ...], moved: str) -> None:
    tensors = problem(shape)
    tangents = {n: torch.randn_like(tensors[n]) for n in moved.split()}
    closed = products(tensors, tangents, ClosedFormBatchNorm())
    native = products(tensors, tangents, nullcontext())
    for name, expected in native.items():
        torch.testing.assert_close(closed[name], expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_equals_finite_differences() -> None:
    tensors = problem((3, 2, 4, 4))
    tangents = {n: torch.randn_like(t) for n, t in tensors.items()}
    step = 1e-5

    def gradients(sign: int) -> list[Tensor]:
        moved = {n: (t + sign * step * tangents[n]).requires_grad_() for n, t in tensors.items()}
        return list(torch.autograd.grad(loss(moved), list(moved.values())))

    closed = products(tensors, tangents, ClosedFormBatchNorm())
    for name, plus, minus in zip(tensors, gradients(1), gradients(-1), strict=True):
        torch.testing.assert_close(closed[f"d{name}."], (plus - minus) / (2 * step), rtol=1e-6, atol=1e-6)


def test_it_is_used_for_batch_statistics_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    native = torch.native_batch_norm
    monkeypatch.setattr(torch, "native_batch_norm", lambda *a: calls.append(a[0]) or native(*a))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    layer = nn.BatchNorm2d(3).double()
    expected = layer(x)
    before = layer.running_mean.clone()
    with ClosedFormBatchNorm():
        torch.testing.assert_close(layer(x), expected)
        assert len(calls) == 1
        assert torch.equal(layer.running_mean, before)
        layer.eval()
        torch.testing.assert_close(
            layer(x), F.batch_norm(x, layer.running_mean, layer.running_var, *layer.parameters())
        )
        nn.BatchNorm2d(3, affine=False).double()(x)
        assert len(calls) == 1
