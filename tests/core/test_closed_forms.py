"""The closed forms against PyTorch's own derivatives of its own modules, and against finite differences."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from innerloop import nn as innerloop_nn
from innerloop.closed_forms import ClosedForms, Convolution, NormActPool, kernels

Function = Callable[..., Any]
WAYS = ["kernels", "formulas", "formulas, channels first"]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="no C compiler, or INNERLOOP_KERNELS=0")


class Way:
    """An implementation and a layout. ``calls`` names the kernels that were called, and proves which it was."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[str] = []

    def lay_out(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or "channels first" in self.name:
            return x.contiguous()
        return x.contiguous(memory_format=torch.channels_last)

    def check(self, *, has_kernels: bool = True) -> None:
        assert bool(self.calls) == (self.name == "kernels" and has_kernels)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    way = Way(request.param)
    if way.name == "kernels" and kernels.library() is None:
        pytest.skip("no C compiler, or INNERLOOP_KERNELS=0")
    if way.name != "kernels":
        monkeypatch.setattr("innerloop.closed_forms.kernels.library", lambda: None)
    original = kernels.call

    def spy(name: str, *rest: Any, **tensors: Any) -> None:
        way.calls.append(name)
        original(name, *rest, **tensors)

    monkeypatch.setattr(kernels, "call", spy)
    return way


every_way = pytest.mark.parametrize("way", WAYS, indirect=True)


def modules(op: NormActPool) -> Function:
    """The native modules one after the other."""

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, gamma, beta, True, 0.1, op.eps)
        if op.negative_slope is not None:
            y = F.leaky_relu(y, op.negative_slope)
        return y if op.pool is None else F.max_pool2d(y, op.pool)

    return function


def written_out(op: NormActPool) -> Function:
    """The same of elementary operations: a vmapped double backward of PyTorch's batch norm is wrong (2.13)."""

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        others = [d for d in range(x.ndim) if d != 1]
        per_channel = (-1, *[1] * (x.ndim - 2))
        centred = x - x.mean(others, keepdim=True)
        y = centred * (centred.square().mean(others, keepdim=True) + op.eps).rsqrt()
        y = y * gamma.view(per_channel) + beta.view(per_channel)
        if op.negative_slope is not None:
            y = F.leaky_relu(y, op.negative_slope)
        return y if op.pool is None else F.max_pool2d(y, op.pool)

    return function


def native(op: Convolution) -> Function:
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(op.stride)]
    return lambda x, w, b: convolution(x, w, b, op.stride, op.padding, op.dilation, op.groups)


def smooth(y: Tensor) -> Tensor:
    """A scalar whose gradient depends on y at second order too, and differs from element to element."""
    return (torch.linspace(-1, 2, y.numel()).view_as(y) * torch.sin(y)).sum()


def derivatives(
    function: Function, inputs: Sequence[Tensor | None], wanted: Sequence[bool], moving: Sequence[bool] | None = None
) -> dict[str, Tensor]:
    """All there is to second order by the inputs that are wanted; tangents as those that are ``moving`` move."""

    def leaves() -> list[Tensor | None]:
        return [t if t is None else t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]

    def chosen(given: Sequence[Tensor | None]) -> list[Tensor]:
        return [t for t, w in zip(given, wanted, strict=True) if t is not None and w]

    results: dict[str, Tensor] = {}
    given = leaves()
    y = function(*given)
    # dy too is something to differentiate by.
    dy = torch.linspace(-1, 2, y.numel()).view_as(y).requires_grad_()
    first = torch.autograd.grad((dy * torch.sin(y)).sum(), chosen(given), create_graph=True)
    second = torch.autograd.grad(sum(map(smooth, first)), [*chosen(given), dy])
    results |= {"y": y, "dy.dy": second[-1]}
    for i, (g, h) in enumerate(zip(first, second, strict=False)):
        results |= {f"gradient {i}": g, f"second {i}": h}

    torch.manual_seed(1)
    with forward_ad.dual_level():
        given = leaves()
        duals = [
            t if t is None or not m else forward_ad.make_dual(t, torch.randn(t.shape))
            for t, m in zip(given, moving or wanted, strict=True)
        ]
        y = function(*duals)
        results["tangent"] = forward_ad.unpack_dual(y).tangent
        first = torch.autograd.grad(smooth(y), chosen(duals), create_graph=True)
        for i, g in enumerate(first):
            results[f"tangent of gradient {i}"] = forward_ad.unpack_dual(g).tangent
    return {name: t.detach() for name, t in results.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        message = f"{where}{name}: {{}}".format
        torch.testing.assert_close(found[name], t, rtol=1e-10, atol=1e-10, msg=message)


def problem(way: Way, shape: Sequence[int], kind: str, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, gamma of both signs, beta.

    Ties are of -1, 0 and 1: a product with these is exact, so what is equal in x is equal in y in PyTorch's too, fused
    multiply-add or not. "flat": every window is constant, and all of channel 0.
    """
    torch.manual_seed(sum(shape))
    x = torch.randn(*shape) * 3 + 1
    gamma, beta = torch.randn(shape[1]), torch.randn(shape[1])
    gamma[::2], gamma[1::2] = -gamma[::2].abs() - 0.1, gamma[1::2].abs() + 0.1
    if kind in ("ties", "flat"):
        x = torch.randint(-1, 2, tuple(shape)).double()
        beta[:1] = 0.0  # x = mean is then at the kink
    if kind == "flat":
        for d in range(2, len(shape)):
            x = x.index_select(d, torch.arange(shape[d]) // (window or 2) * (window or 2))
        x[:, 0] = 2.0
    if kind != "smooth":
        gamma[-1] = 0.0
    return way.lay_out(x), gamma, beta


# Pooling


# 113 = 64 + 32 + 16 + 1: the kernels take channels by these.
POOLED = [
    ((4, 3, 7, 7), 2),
    ((2, 2, 9, 5), 2),
    ((2, 3, 9, 5), 3),
    ((1, 1, 3, 3), 2),
    ((3, 1, 3, 3), 3),
    ((3, 17, 6, 5), 2),
    ((2, 64, 4, 5), 2),
    ((1, 113, 3, 2), 2),
    ((3, 2, 1, 7), 1),
]
UNPOOLED = [(4, 3, 7, 7), (3, 1, 1, 7), (2, 17, 3, 3), (1, 64, 3, 1), (6, 2, 1, 1), (2, 113, 1, 2)]


@functools.cache
def expected_derivatives(shape: tuple[int, ...], pool: int | None, slope: float | None, kind: str) -> dict[str, Tensor]:
    inputs = problem(Way("formulas, channels first"), shape, kind, pool)
    return derivatives(modules(NormActPool(1e-3, slope, pool)), inputs, [True] * 3)


@every_way
@pytest.mark.parametrize("kind", ["smooth", "ties", "flat"])
@pytest.mark.parametrize(("shape", "pool"), [*POOLED, *((shape, None) for shape in UNPOOLED)])
def test_equals_the_native_modules(way: Way, shape: tuple[int, ...], pool: int | None, kind: str) -> None:
    inputs = problem(way, shape, kind, pool)
    for slope in (None, 0.0, 0.01, 0.1):
        found = derivatives(NormActPool(1e-3, slope, pool), inputs, [True] * 3)
        assert_same(found, expected_derivatives(shape, pool, slope, kind), f"slope {slope}, ")
    way.check()


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
@pytest.mark.parametrize("slope", [None, 0.1])
@pytest.mark.parametrize("shape", [(6, 4), (2, 113), (3, 2, 7), (2, 3, 2, 3, 2)])
def test_other_dimensions(way: Way, shape: tuple[int, ...], slope: float | None) -> None:
    op = NormActPool(1e-5, slope)
    inputs = problem(way, shape, "zero gamma")
    assert_same(derivatives(op, inputs, [True] * 3), derivatives(modules(op), inputs, [True] * 3))
    way.check(has_kernels=len(shape) == 2)


@every_way
@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=3)][1:])
def test_inputs_held_constant(way: Way, wanted: tuple[bool, ...], pool: int | None) -> None:
    """Frozen x, gamma or beta; and directions in which only some of the inputs move."""
    op = NormActPool(1e-3, 0.1, pool)
    inputs = problem(way, (3, 3, 5, 4), "zero gamma")
    assert_same(derivatives(op, inputs, wanted), derivatives(modules(op), inputs, wanted))
    moved = derivatives(op, inputs, [True] * 3, moving=wanted)
    assert_same(moved, derivatives(modules(op), inputs, [True] * 3, moving=wanted))
    way.check()


@every_way
@pytest.mark.parametrize("window", [16, 17])
def test_the_largest_window_of_the_kernels_and_a_larger_one(way: Way, window: int) -> None:
    """A place in a window is a byte to them."""
    op = NormActPool(1e-3, 0.1, window)
    inputs = problem(way, (2, 2, 34, 20), "smooth")
    inputs[0][0, 1, 15, 15] = inputs[0][0, 0, 15, 15] = 30.0  # the last place of all
    inputs[0][1, 0, 15, 15] = -30.0
    assert_same(derivatives(op, inputs, [True] * 3), derivatives(modules(op), inputs, [True] * 3))


@every_way
def test_an_image_smaller_than_the_window(way: Way) -> None:
    inputs = problem(way, (2, 3, 1, 5), "smooth")
    with pytest.raises(RuntimeError, match="too small"):
        NormActPool(1e-3, 0.1, 2)(*inputs)


@every_way
def test_a_parameter_of_another_size(way: Way) -> None:
    """The kernels are told C by x: with a shorter gamma they would read what lies behind it."""
    x, gamma, beta = problem(way, (2, 3, 4, 4), "smooth")
    op = NormActPool(1e-3, 0.1, 2)
    for length in (2, 1):  # 1 would broadcast
        with pytest.raises((RuntimeError, ValueError)):
            op(x, gamma[:length], beta)
        with pytest.raises((RuntimeError, ValueError)):
            op(x, gamma, beta[:length])


REARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: torch.stack([t, torch.full_like(t, 7.0)], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: (t[:, :1] if t.ndim > 1 else t[:1]).expand(t.shape),
}


@every_way
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 4)])
@pytest.mark.parametrize("rearranged", REARRANGED.values(), ids=REARRANGED.keys())
def test_memory_in_any_order(way: Way, shape: tuple[int, ...], rearranged: Callable[[Tensor], Tensor]) -> None:
    op = NormActPool(1e-3, 0.1, 2 if len(shape) == 4 else None)
    inputs = problem(way, shape, "smooth")

    def within(f: Function, first: int) -> Function:
        return lambda *a: f(*a[:first], *map(rearranged, a[first:]))

    for first in (0, 1):  # 1: the parameters alone, beside an x that suits the kernels
        found = derivatives(within(op, first), inputs, [True] * 3)
        # Of a strided gamma PyTorch's own gradient is wrong (2.13): it takes its memory for dense.
        assert_same(found, derivatives(within(written_out(op), first), inputs, [True] * 3), f"from {first}, ")
    way.check()


# Finite differences


def checked(function: Function, inputs: Sequence[Tensor]) -> None:
    """First and second derivatives in every mode there is, alone and batched."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize(
    ("shape", "slope", "pool"),
    [((2, 2, 3, 5), 0.1, 2), ((2, 1, 4, 4), 0.0, 2), ((1, 2, 3, 3), 0.01, None), ((5, 2), None, None)],
)
def test_gradcheck_of_norm_act_pool(way: Way, shape: tuple[int, ...], slope: float | None, pool: int | None) -> None:
    torch.manual_seed(4)
    size = torch.Size(shape).numel()
    # A permutation of evenly spaced numbers: no two are close, as maxima of a window must not be.
    x = way.lay_out(torch.linspace(-2, 2, size)[torch.randperm(size)].view(shape))
    gamma, beta = torch.tensor([-0.9, 1.3])[: shape[1]], torch.tensor([0.13, -0.21])[: shape[1]]
    op = NormActPool(0.1, slope, pool)
    before_activation = modules(NormActPool(0.1))(x, gamma, beta)
    assert before_activation.abs().min() > 1e-3  # the kink
    checked(op, [x, gamma, beta])
    way.check()


CONVOLUTIONS = {
    "1d": ((2, 2, 6), (3, 2, 3), Convolution((2,), (1,), (1,), 1)),
    "2d": ((2, 2, 4, 3), (2, 2, 3, 3), Convolution((1, 1), (1, 1), (1, 1), 1)),
    "1x1": ((1, 2, 3, 3), (3, 2, 1, 1), Convolution((2, 2), (0, 0), (1, 1), 1)),
    "one channel": ((2, 1, 4, 4), (2, 1, 3, 3), Convolution((1, 1), (1, 1), (1, 1), 1)),
    "uneven": ((1, 2, 7, 5), (4, 1, 3, 2), Convolution((2, 1), (2, 0), (2, 3), 2)),
    "depthwise": ((1, 2, 4, 3), (4, 1, 2, 2), Convolution((2, 1), (1, 0), (1, 1), 2)),
    "3d": ((1, 2, 3, 4, 3), (2, 1, 2, 3, 2), Convolution((1, 2, 1), (1, 0, 1), (1, 1, 1), 2)),
}


def convolution_problem(name: str, bias: bool) -> tuple[Convolution, list[Tensor | None]]:
    x_shape, w_shape, op = CONVOLUTIONS[name]
    torch.manual_seed(len(name))
    return op, [torch.randn(x_shape), torch.randn(w_shape), torch.randn(w_shape[0]) if bias else None]


@pytest.mark.parametrize(("name", "bias"), [*((name, True) for name in CONVOLUTIONS), ("1d", False), ("3d", False)])
def test_gradcheck_of_convolution(name: str, bias: bool) -> None:
    op, (x, w, b) = convolution_problem(name, bias)
    if b is not None:
        checked(op, [x, w, b])
    else:
        checked(lambda x, w: op(x, w, None), [x, w])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_the_native_one(name: str, bias: bool, channels_last: bool) -> None:
    op, inputs = convolution_problem(name, bias)
    if channels_last and inputs[0].ndim == 4:
        inputs[:2] = [t.contiguous(memory_format=torch.channels_last) for t in inputs[:2]]
    for wanted in [*itertools.product([False, True], repeat=3 if bias else 2)][1:]:
        wanted = (*wanted, False)[:3]
        assert_same(derivatives(op, inputs, wanted), derivatives(native(op), inputs, wanted))
        by_all = (True, True, bias)
        moved = derivatives(op, inputs, by_all, moving=wanted)
        assert_same(moved, derivatives(native(op), inputs, by_all, moving=wanted))


# torch.func


def along(t: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A tangent or cotangent for each, batched as it is."""
    return tuple(torch.cos(2 * s) for s in t)


def loss(f: Function) -> Function:
    return lambda *a: smooth(f(*a))


def gradient(f: Function) -> Function:
    return lambda *a: grad(loss(f), tuple(range(len(a))))(*a)


def pulled_back(f: Function) -> Function:
    def pull(*a: Tensor) -> tuple[Tensor, ...]:
        outputs, back = vjp(f, *a)
        return back(along(outputs))

    return pull


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "value": lambda f: f,
    "grad": gradient,
    "jvp": lambda f: lambda *a: jvp(f, a, along(a)),
    "jacrev": lambda f: lambda *a: jacrev(f, tuple(range(len(a))))(*a),
    "jacfwd": lambda f: lambda *a: jacfwd(f, tuple(range(len(a))))(*a),
    "jvp of grad": lambda f: lambda *a: jvp(gradient(f), a, along(a)),
    "vjp of grad": lambda f: pulled_back(gradient(f)),
    "jacrev of grad": lambda f: lambda *a: jacrev(gradient(f), tuple(range(len(a))))(*a),
    "hessian": lambda f: lambda *a: hessian(loss(f), tuple(range(len(a))))(*a),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS)


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def by_loop(f: Function, inputs: Sequence[Tensor], in_dims: Sequence[int | None]) -> Any:
    """What ``vmap(f, in_dims)`` is to give."""
    size = next(t.shape[d] for t, d in zip(inputs, in_dims, strict=True) if d is not None)
    results = [
        f(*[t if d is None else t.select(d, i).contiguous() for t, d in zip(inputs, in_dims, strict=True)])
        for i in range(size)
    ]
    return pytree.tree_map(lambda *t: torch.stack(t), *results)


@every_way
@every_transform
@pytest.mark.parametrize("channels", [2, 1])
def test_transforms(way: Way, transform: str, channels: int) -> None:
    op = NormActPool(1e-2, 0.1, 2)
    inputs = problem(way, (2, channels, 5, 4), "smooth")
    # vmap does not know PyTorch's pooling channels-last.
    plain = [t.contiguous() for t in inputs]
    assert_close(TRANSFORMS[transform](op)(*inputs), TRANSFORMS[transform](written_out(op))(*plain))
    way.check()


def tasks(way: Way, shape: tuple[int, ...], in_dims: Sequence[int | None]) -> list[Tensor]:
    """x, gamma and beta, of three tasks where there is a dimension for them."""
    x, gamma, beta = (torch.stack(t) for t in zip(*[problem(way, shape, "smooth") for _ in range(3)], strict=True))
    x, gamma, beta = (t + 0.3 * torch.randn(t.shape) for t in (x, gamma, beta))
    if way.name == "kernels" and x.ndim == 5:
        # Tasks beside the channels in memory, where the operation's own vmap puts them: with them first, folding
        # would lay x out anew, channels first.
        x = x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)
    return [t[0] if d is None else t.movedim(0, d) for t, d in zip((x, gamma, beta), in_dims, strict=True)]


@functools.cache
def expected_over_tasks(
    op: NormActPool, shape: tuple[int, ...], transform: str, in_dims: tuple[int | None, ...]
) -> Any:
    inputs = tasks(Way("formulas, channels first"), shape, in_dims)
    return by_loop(TRANSFORMS[transform](written_out(op)), inputs, in_dims)


@every_way
@every_transform
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (1, 1, None), (3, None, None)])
def test_transforms_under_vmap(way: Way, transform: str, in_dims: tuple[int | None, ...]) -> None:
    op = NormActPool(1e-2, 0.1, 2)
    for shape in ((2, 2, 4, 3), (2, 1, 4, 3)):
        found = vmap(TRANSFORMS[transform](op), in_dims)(*tasks(way, shape, in_dims))
        assert_close(found, expected_over_tasks(op, shape, transform, in_dims))
    if in_dims[0] is not None:
        way.check()


@every_way
@every_transform
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0)])
def test_transforms_under_vmap_in_two_dimensions(way: Way, transform: str, in_dims: tuple[int | None, ...]) -> None:
    op = NormActPool(1e-2, 0.1)
    for shape in ((4, 2), (4, 1)):  # of one channel vmap's fold is a view, and not of dense memory
        found = vmap(TRANSFORMS[transform](op), in_dims)(*tasks(way, shape, in_dims))
        assert_close(found, expected_over_tasks(op, shape, transform, in_dims))
    way.check()


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
def test_vmap_in_vmap(way: Way) -> None:
    op = NormActPool(1e-2, 0.1, 2)
    x = torch.stack([tasks(way, (2, 2, 4, 3), (0, 0, 0))[0] + i for i in range(2)])
    _, gamma, beta = tasks(way, (2, 2, 4, 3), (0, 0, 0))
    dims = (0, None, None)
    for name in ("value", "grad", "vjp of grad"):
        found = vmap(vmap(TRANSFORMS[name](op)), dims)(x, gamma, beta)
        each = TRANSFORMS[name](written_out(op))
        assert_close(found, by_loop(lambda *a, f=each: by_loop(f, a, (0, 0, 0)), (x, gamma, beta), dims))


@every_transform
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None), (None, 0), (None, None, 0), (1, 2, 0)])
@pytest.mark.parametrize("name", ["1d", "uneven", "3d"])
def test_convolution_under_vmap(name: str, in_dims: tuple[int | None, ...], transform: str) -> None:
    x_shape, w_shape, op = CONVOLUTIONS[name]
    shapes = [x_shape, w_shape, w_shape[:1]][: len(in_dims)]
    inputs = [torch.randn(s if d is None else (*s[:d], 3, *s[d:])) for s, d in zip(shapes, in_dims, strict=True)]

    def closed(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return op(x, w, b)

    def plain(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return native(op)(x, w, b)

    found = vmap(TRANSFORMS[transform](closed), in_dims)(*inputs)
    assert_close(found, by_loop(TRANSFORMS[transform](plain), inputs, in_dims))


# A third derivative


def once(f: Function) -> Function:
    return grad(lambda x: smooth(f(x)))


def pushed(f: Function) -> Function:
    return lambda x: jvp(f, (x,), (torch.cos(x),))[1]


ABOVE_TWO: dict[str, Callable[[Function], Function]] = {
    "reverse, reverse, reverse": lambda f: once(once(once(f))),
    "forward, reverse, reverse": lambda f: pushed(once(once(f))),
    "reverse, forward, reverse": lambda f: once(pushed(once(f))),
    "forward, forward, reverse": lambda f: pushed(pushed(once(f))),
}


def closed_forms_of_x(way: Way) -> list[tuple[Function, Tensor]]:
    x, gamma, beta = problem(way, (2, 2, 4, 4), "smooth")
    w = torch.randn(2, 2, 3, 3)
    convolution = Convolution((1, 1), (1, 1), (1, 1), 1)
    return [
        (lambda x: NormActPool(1e-3, 0.1, 2)(x, gamma, beta), x),
        (lambda x: convolution(torch.tanh(x), w, None), x),
    ]


@every_way
@pytest.mark.parametrize("order", ABOVE_TWO.values(), ids=ABOVE_TWO.keys())
def test_a_third_derivative_says_what_to_do(way: Way, order: Callable[[Function], Function]) -> None:
    for f, x in closed_forms_of_x(way):
        with pytest.raises(NotImplementedError, match=r"nn\.BatchNorm2d"):
            order(f)(x)


@every_way
def test_a_third_derivative_without_functorch(way: Way) -> None:
    for f, x in closed_forms_of_x(way):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(smooth(f(x)), x, create_graph=True)
        (h,) = torch.autograd.grad(smooth(g), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"nn\.BatchNorm2d"):
            torch.autograd.grad(h.sum(), x)


@every_way
@pytest.mark.parametrize("outer", [once, pushed])
def test_a_derivative_of_a_tangent_raises(way: Way, outer: Callable[[Function], Function]) -> None:
    """Reverse and forward over forward are second derivatives that there is no formula for: no silent zero."""
    for f, x in closed_forms_of_x(way):
        with pytest.raises(NotImplementedError):
            outer(pushed(f))(x)


# The kernels beside the formulas


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Function], Any]:
    """Calls a function with the formulas."""

    def call(function: Function) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("innerloop.closed_forms.kernels.library", lambda: None)
            return function()

    return call


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous(),
    "channels first": lambda t: t.contiguous(),
    **REARRANGED,
}


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    ("shape", "slope", "pool"),
    [
        ((3, 113, 5, 7), 0.1, 2),
        ((2, 5, 9, 8), 0.0, 3),
        ((1, 64, 4, 4), 0.01, None),
        ((4, 3, 5, 1), None, None),
        ((2, 1, 6, 7), None, 2),
        ((7, 3), 0.1, None),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
def test_kernels_equal_the_formulas(
    dtype: torch.dtype,
    tolerance: float,
    shape: tuple[int, ...],
    slope: float | None,
    pool: int | None,
    layout: Callable[[Tensor], Tensor],
    without_kernels: Callable[[Function], Any],
) -> None:
    """Every function of the operation, for dy and directions in any layout."""
    op = NormActPool(1e-3, slope, pool)
    x, gamma, beta = (t.to(dtype) for t in problem(Way("kernels"), shape, "smooth"))
    x.sub_(1)
    outputs = op.value(x, gamma, beta)
    expected_outputs = without_kernels(lambda: op.value(x, gamma, beta))
    assert outputs[-1].dtype == (dtype if pool is None else torch.uint8)  # it was the kernels

    def close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        for a, b, w in zip(found, expected, wanted, strict=True):
            if w:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    compared = 4 if pool is None else 5  # places are in the window here, in the plane there
    close(outputs[:compared], expected_outputs[:compared], [True] * compared)
    point, expected_point = (x, gamma, beta, *outputs), (x, gamma, beta, *expected_outputs)
    dy = layout(torch.randn_like(outputs[0]))
    direction = [layout(torch.randn_like(t)) for t in (x, gamma, beta)]
    for wanted in itertools.product([False, True], repeat=3):
        found = op.gradient(point, dy, wanted)
        close(found, without_kernels(lambda w=wanted: op.gradient(expected_point, dy, w)), wanted)
    for moving, by_dy in itertools.product(itertools.product([False, True], repeat=3), [False, True]):
        along = [t if m else None for t, m in zip(direction, moving, strict=True)]
        for wanted in [(True, True, True, True), (False, True, False, True), (True, False, False, False)]:
            if not by_dy and any(wanted[1:]):
                continue
            arguments = (dy if by_dy else None, along, wanted)
            found = op.second_order(point, *arguments)
            expected = without_kernels(lambda a=arguments: op.second_order(expected_point, *a))
            close(found, expected, wanted)


@needs_kernels
def test_derivatives_of_what_the_kernels_kept_in_another_layout(without_kernels: Callable[[Function], Any]) -> None:
    """The formulas take the kernels' places, bytes within a window, too: so it is when a cotangent alone is batched."""
    op = NormActPool(1e-3, 0.1, 3)
    x, gamma, beta = problem(Way("kernels"), (2, 3, 8, 10), "smooth")
    point = (x, gamma, beta, *op.value(x, gamma, beta))
    dy, direction = torch.randn_like(point[3]), [torch.randn_like(t) for t in (x, gamma, beta)]
    assert_close(without_kernels(lambda: op.gradient(point, dy, [True] * 3)), op.gradient(point, dy, [True] * 3))
    found = without_kernels(lambda: op.second_order(point, dy, direction, [True] * 4))
    assert_close(found, op.second_order(point, dy, direction, [True] * 4))


@every_way
@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinity(way: Way, dtype: torch.dtype, pool: int | None) -> None:
    """They spoil their own channel, where PyTorch's spoil it, and no other."""
    x, gamma, beta = (t.to(dtype) for t in problem(way, (3, 6, 5, 4), "smooth"))
    for channel, value in enumerate([float("nan"), float("inf"), float("-inf"), float("inf")]):
        x[1, channel, 2, 3] = value
    x[0, 3, 0, 0] = float("-inf")
    op = NormActPool(1e-3, 0.1, pool)

    def results(function: Function) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, gamma, beta)]
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), inputs)]

    for found, expected in zip(results(op), results(modules(op)), strict=True):
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-3, atol=1e-3, equal_nan=True)
    assert results(op)[0][:, :4].isnan().all()
    assert not results(op)[0][:, 4:].isnan().any()
    way.check()


@every_way
@pytest.mark.parametrize("shape", [(5, 4, 28, 28), (40, 4, 2, 3), (200, 4)])
def test_the_variance_beside_a_large_mean(way: Way, shape: tuple[int, ...]) -> None:
    """A mean of squares less a squared mean would have no digit left: 10^8 in float32 is good to 8."""
    x = way.lay_out((torch.randn(shape) + 1e4).float())
    exact = x.double()
    others = [d for d in range(x.ndim) if d != 1]
    variance, mean = torch.var_mean(exact, others, correction=0)
    y, mean_found, variance_found, r_found, *_ = NormActPool(1e-5).apply(
        x, torch.ones(4).float(), torch.zeros(4).float()
    )
    torch.testing.assert_close(variance_found.double(), variance, rtol=1e-3, atol=0)
    torch.testing.assert_close(mean_found.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(r_found.double(), (variance + 1e-5).rsqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        y.double(), modules(NormActPool(1e-5))(exact, torch.ones(4), torch.zeros(4)), rtol=0, atol=1e-2
    )
    way.check()


# ClosedForms, the mode


def products(model: nn.Module, x: Tensor, mode: Callable[[], AbstractContextManager[object]]) -> dict[str, Tensor]:
    """The outputs of two forward passes, first and second derivatives, and the buffers left behind."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with mode():
        results = {"first y": model(x)}
        y = model(x + 1)  # moves statistics that are the initial ones no more
    wanted = {"x": x, **dict(model.named_parameters())}
    first = torch.autograd.grad(smooth(y), list(wanted.values()), create_graph=True)
    second = torch.autograd.grad(sum(map(smooth, first)), list(wanted.values()), materialize_grads=True)
    results |= {"y": y, **dict(model.named_buffers())}
    for name, g, h in zip(wanted, first, second, strict=True):
        results |= {f"d{name}": g, f"dd{name}": h}
    return {name: t.detach() for name, t in results.items()}


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def a_users_model(dimensions: int, momentum: float | None) -> nn.Module:
    convolution, norm = CONV[dimensions], NORM[dimensions]
    return nn.Sequential(
        convolution(2, 4, 3, stride=2, padding=1, groups=2),
        norm(4, momentum=momentum),
        nn.Tanh(),
        convolution(4, 3, 2, dilation=2, padding=1, bias=False, padding_mode="circular"),
        norm(3, momentum=momentum, eps=1e-2),
        nn.Flatten(),
        nn.LazyLinear(2),
        nn.BatchNorm1d(2, momentum=momentum),
    )


@every_way
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_mode_changes_no_result(way: Way, dimensions: int, momentum: float | None) -> None:
    model = a_users_model(dimensions, momentum)
    x = way.lay_out(torch.randn(3, 2, *(5, 7, 5)[:dimensions]))
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    found = products(model, x, ClosedForms)
    assert_same(found, products(model, x, nullcontext))
    assert [t.item() for name, t in found.items() if "num_batches" in name] == [3, 3, 3]
    way.check()


@pytest.mark.parametrize("before", [lambda: nn.BatchNorm2d(3), lambda: nn.Conv2d(3, 3, 3)], ids=["norm", "conv"])
def test_the_mode_beside_in_place_activations(before: Callable[[], nn.Module]) -> None:
    """Batch norm and convolution keep their inputs only: what follows may overwrite their output."""
    model = nn.Sequential(nn.Tanh(), before(), nn.ReLU(inplace=True), before(), nn.LeakyReLU(0.1, inplace=True))
    x = torch.randn(2, 3, 7, 7)
    assert_same(products(model, x, ClosedForms), products(model, x, nullcontext))


def test_the_mode_beside_mixed_precision() -> None:
    """Activations in bfloat16 of a norm in float32 stay what they are."""
    layer = nn.BatchNorm2d(3).float()
    x = torch.randn(2, 3, 4, 4).bfloat16().requires_grad_()
    expected = layer(x)
    with ClosedForms():
        y = layer(x)
    (found,), (gradient,) = (torch.autograd.grad(smooth(t.double()), x) for t in (y, expected))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, gradient)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The operations that were applied."""
    used: list[type] = []
    for operation in (NormActPool, Convolution):

        def spy(self: Any, *inputs: Any, original: Function = operation.apply) -> Any:
            used.append(type(self))
            return original(self, *inputs)

        monkeypatch.setattr(operation, "apply", spy)
    return used


USED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], type | None]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3), NormActPool),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(3), (4, 3, 5), NormActPool),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5), NormActPool),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (2, 3, 2, 3, 2), NormActPool),
    "without running statistics": (
        lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(),
        (4, 3, 5, 5),
        NormActPool,
    ),
    "innerloop's own block": (lambda: innerloop_nn.NormActPool(3), (4, 3, 5, 5), NormActPool),
    "Conv1d": (lambda: nn.Conv1d(3, 2, 3), (4, 3, 7), Convolution),
    "Conv2d": (lambda: nn.Conv2d(3, 2, (3, 2), (2, 1), (0, 1)), (4, 3, 7, 5), Convolution),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2, groups=2, bias=False), (1, 2, 3, 4, 3), Convolution),
    "circular padding": (lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), (4, 3, 5, 5), Convolution),
    "evaluation": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 5, 5), None),
    "no gamma": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5), None),
    "same padding": (lambda: nn.Conv2d(3, 2, 3, padding="same"), (4, 3, 5, 5), None),
    "valid padding": (lambda: nn.Conv1d(3, 2, 3, padding="valid"), (4, 3, 5), None),
    "an unbatched sequence": (lambda: nn.Conv1d(3, 2, 3), (3, 5), None),
    "an unbatched image": (lambda: nn.Conv2d(3, 2, 3), (3, 5, 5), None),
    "an unbatched volume": (lambda: nn.Conv3d(3, 2, 3), (3, 5, 5, 4), None),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 2, 3), (4, 3, 5, 5), None),
    "GroupNorm": (lambda: nn.GroupNorm(1, 3), (4, 3, 5, 5), None),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 5, 5), None),
    "LayerNorm": (lambda: nn.LayerNorm(5), (4, 3, 5, 5), None),
    "Linear": (lambda: nn.Linear(5, 2), (4, 5), None),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (4, 3, 5, 5), None),
}


@pytest.mark.parametrize(("module", "shape", "operation"), USED.values(), ids=USED.keys())
def test_the_mode_is_used_for_what_it_is_for(
    module: Callable[[], nn.Module], shape: tuple[int, ...], operation: type | None, used: list[type]
) -> None:
    layer = module()
    x = torch.randn(shape)
    expected = copy.deepcopy(layer)(x)
    outside = list(used)
    used.clear()
    with ClosedForms():
        assert_close(layer(x), expected)
    assert used == ([] if operation is None else [operation])
    assert outside == (used if isinstance(layer, innerloop_nn.NormActPool) else [])


@pytest.mark.parametrize(
    ("call", "operation"),
    [
        (F.conv2d, Convolution),
        (lambda x, w: F.conv2d(x, w, stride=2, padding=1), Convolution),
        (lambda x, w: F.conv2d(input=x, weight=w, bias=w[:, 0, 0, 0], dilation=[2], stride=(1, 2)), Convolution),
        (lambda x, w: torch.conv2d(x, w, None, (2, 1), [1, 0], 1, 1), Convolution),
        (lambda x, w: F.batch_norm(x, None, None, w[0, :, 0, 0], w[1, :, 0, 0], training=True), NormActPool),
        (lambda x, w: F.batch_norm(input=x, running_mean=None, running_var=None, training=True), None),
        (lambda x, w: F.batch_norm(x, None, None, w[0, :, 0, 0], None, True), None),
        (lambda x, w: F.batch_norm(x, x[0, :, 0, 0], x[0, :, 0, 1].exp(), w[0, :, 0, 0], w[1, :, 0, 0]), None),
    ],
)
def test_the_mode_takes_every_way_to_call(
    call: Callable[[Tensor, Tensor], Tensor], operation: type | None, used: list[type]
) -> None:
    x, w = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 2)
    expected = call(x, w)
    with ClosedForms():
        assert_close(call(x, w), expected)
    assert used == ([] if operation is None else [operation])


# nn.NormActPool


def three_modules(block: innerloop_nn.NormActPool) -> nn.Sequential:
    """Native modules in the same state."""
    norm = nn.BatchNorm2d(block.num_features, block.eps, block.momentum)
    norm.load_state_dict(block.state_dict())
    pool = nn.Identity() if block.pool is None else nn.MaxPool2d(block.pool)
    return nn.Sequential(norm, nn.LeakyReLU(block.negative_slope), pool).train(block.training)


def a_block(**options: Any) -> innerloop_nn.NormActPool:
    block = innerloop_nn.NormActPool(3, **options)
    with torch.no_grad():
        block.weight.copy_(torch.tensor([-1.2, 0.0, 0.7]))
        block.bias.copy_(torch.randn(3))
        block.running_mean.copy_(torch.randn(3))
        block.running_var.copy_(torch.rand(3) + 0.5)
    return block


def as_three_modules(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the block has them."""
    return {name.replace("0.", ""): t for name, t in found.items()}


@every_way
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("slope", "pool"), [(0.01, 2), (0.0, 3), (0.1, None)])
@pytest.mark.parametrize("training", [True, False])
def test_the_block_is_the_three_modules(
    way: Way, training: bool, slope: float, pool: int | None, momentum: float | None
) -> None:
    block = a_block(negative_slope=slope, pool=pool, momentum=momentum).train(training)
    x = way.lay_out(torch.randn(3, 3, 7, 6) * 2 + 1)
    found = products(block, x, nullcontext)
    assert_same(found, as_three_modules(products(three_modules(block), x, nullcontext)))
    assert found["num_batches_tracked"] == (2 if training else 0)
    way.check(has_kernels=training)


@every_way
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_a_block_with_frozen_parameters(way: Way, frozen: tuple[str, ...]) -> None:
    block = a_block()
    for name in frozen:
        getattr(block, name).requires_grad_(False)
    x = way.lay_out(torch.randn(3, 3, 7, 6))
    kept = [p for p in block.parameters() if p.requires_grad]

    def results(model: nn.Module, x: Tensor, by: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(smooth(model(x)), by, create_graph=True)
        return [*first, *torch.autograd.grad(sum(map(smooth, first)), by)]

    separate = three_modules(block)
    for name in frozen:
        getattr(separate[0], name).requires_grad_(False)
    separate_kept = [p for p in separate.parameters() if p.requires_grad]
    leaf = x.clone().requires_grad_()
    assert_close(results(block, leaf, [leaf, *kept]), results(separate, leaf, [leaf, *separate_kept]))
    if kept:  # of the first layer x is data
        assert_close(results(block, x, kept), results(separate, x, separate_kept))


def test_the_block_is_a_batch_norm() -> None:
    block = a_block()
    norm = nn.BatchNorm2d(3)
    assert isinstance(block, nn.BatchNorm2d)
    assert list(block.state_dict()) == list(norm.state_dict())
    norm.load_state_dict(block.state_dict())
    other = innerloop_nn.NormActPool(3)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert_close(other(x), block(x))
    assert "negative_slope=0.01, pool=2" in repr(block)


@every_way
def test_a_copy_of_a_block_stands_alone(way: Way) -> None:
    block = a_block()
    twin = copy.deepcopy(block)
    x = way.lay_out(torch.randn(2, 3, 4, 4))
    before = twin.running_mean.clone()
    y = block(x)
    assert_close(twin.running_mean, before)
    assert_close(twin(x), y)
    assert_close(dict(twin.state_dict()), dict(block.state_dict()))


@every_way
def test_the_block_without_gradients(way: Way) -> None:
    block = a_block()
    separate = three_modules(block)
    x = way.lay_out(torch.randn(2, 3, 4, 4)).requires_grad_()
    with torch.no_grad():
        y = block(x)
    assert not y.requires_grad
    assert_close(y, separate(x).detach())
    assert_close(block.running_var, separate[0].running_var)
    with torch.inference_mode():
        assert_close(block(x).clone(), separate(x))


@every_way
def test_the_block_without_running_statistics(way: Way) -> None:
    """As BatchNorm2d has it: its own statistics in evaluation where there are none, and none moved untracked."""
    x = way.lay_out(torch.randn(2, 3, 4, 4))
    block = a_block()
    block.track_running_stats = False
    before = copy.deepcopy(dict(block.state_dict()))
    expected = three_modules(block)(x)
    assert_close(block(x), expected)
    assert_close(dict(block.state_dict()), before)
    block.running_mean = block.running_var = block.num_batches_tracked = None
    assert_close(block.eval()(x), expected)
    assert_close(block.train()(x), expected)


def test_the_block_in_functional_call() -> None:
    block = a_block()
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(3)
    before = block.running_mean.clone()
    statistics = torch.zeros(3)
    y = functional_call(block, {"weight": weight, "running_mean": statistics}, x)
    assert_close(y, modules(NormActPool(1e-5, 0.01, 2))(x, weight, block.bias))
    assert_close(statistics, 0.1 * x.mean([0, 2, 3]))
    assert_close(block.running_mean, before)


def test_what_the_block_refuses() -> None:
    with pytest.raises(ValueError, match=r"negative_slope must be at least 0, got -0\.2"):
        innerloop_nn.NormActPool(3, negative_slope=-0.2)
    block = a_block(pool=None)
    for training in (True, False):
        for shape in [(4, 3), (4, 3, 5), (4, 3, 5, 5, 5)]:
            with pytest.raises(ValueError, match=f"expected 4D input \\(got {len(shape)}D"):
                block.train(training)(torch.randn(shape))
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\[1, 3, 1, 1\]"):
        block.train()(torch.randn(1, 3, 1, 1))
    assert block.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)
    with ClosedForms(), pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))


# The compiler


library = kernels.library.__wrapped__  # type: ignore[attr-defined] # without its memory of the first answer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a compiler that is not told of by the environment."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("INNERLOOP_KERNELS", raising=False)
    return tmp_path / "cache"


def files(folder: Path) -> list[str]:
    """Names of all that a folder holds in the end: files and empty folders."""
    return [p.name for p in folder.rglob("*") if not p.is_dir() or not any(p.iterdir())]


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a compiler of a shell script."""

    def make(script: str) -> Path:
        path = tmp_path / "a compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


@needs_kernels
def test_the_kernels_are_compiled_once(
    cache: Path, tmp_path: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    compiles = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiles is None:
        pytest.skip("the compiler has another name")
    # Without optimisation, which takes most of the time.
    made = compiler(f"echo called >> '{log}'; exec '{compiles}' \"$@\" -O0")
    monkeypatch.setenv("CC", f"'{made}' -DUNUSED")
    assert library() is not None
    assert library() is not None
    (name,) = files(cache)
    assert name.endswith(".so")
    second = (
        "import pathlib, platformdirs, sys\n"
        "platformdirs.user_cache_path = lambda name: pathlib.Path(sys.argv[1]) / name\n"
        "from innerloop.closed_forms import kernels; print(kernels.library())"
    )
    command = [sys.executable, "-c", second, str(cache)]
    root = Path(kernels.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert name in found.stdout
    assert log.read_text().split() == ["called"]
    assert files(cache) == [name]


@needs_kernels
def test_another_compiler_or_processor_has_kernels_of_its_own(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiler('for last; do :; done; while [ "$1" != -o ]; do shift; done; echo "not a library" > "$2"')
    for command, processor in [(f"'{made}'", "a"), (f"'{made}' -O1", "a"), (f"'{made}'", "b")]:
        monkeypatch.setenv("CC", command)
        monkeypatch.setattr(kernels, "_processor", lambda p=processor: p)
        assert library() is None  # what was made is no library
    assert len(files(cache)) == 3


def test_the_kernels_can_be_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_KERNELS", "0")
    assert library() is None
    assert not cache.exists()


@pytest.mark.parametrize("fault", ["fails", "complains", "missing", "none", "no folder"])
def test_without_a_working_compiler_there_are_the_formulas(
    fault: str,
    cache: Path,
    compiler: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if fault == "fails":
        monkeypatch.setenv("CC", "false")
    elif fault == "complains":
        monkeypatch.setenv("CC", f"'{compiler('echo wrong; echo very wrong >&2; exit 1')}'")
    elif fault == "missing":
        monkeypatch.setenv("CC", "/no/such/compiler -O2")
    elif fault == "none":
        monkeypatch.setenv("PATH", str(cache))
    else:
        cache.write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = library()
        assert found is None
        monkeypatch.setattr(kernels, "library", lambda: found)
        op = NormActPool(1e-3, 0.1, 2)
        inputs = problem(Way("formulas"), (2, 3, 5, 5), "smooth")
        assert_close(op(*inputs), modules(op)(*inputs))
    assert files(cache) in ([], ["kernels"])  # a folder with nothing in it
    assert capfd.readouterr() == ("", "")
