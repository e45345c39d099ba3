"""The block by Triton's kernels against the formulas: on a CPU in Triton's interpreter, a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import MetaLearner, Method, maml, maml_plus_plus
from innerloop.closed_forms import Convolution, NormActPool, TaskBlock, triton_block
from innerloop.closed_forms.cross_entropy import CrossEntropy, FusedCrossEntropy
from innerloop.nn import MLP, Conv4, ConvNormActPool

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ON = ["interpreter", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("on", ON)
def test_the_kernels(on: str) -> None:
    """Triton decides when it is imported whether it interprets: so the ``check_`` functions run in another process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if on == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
    run = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(not Path(find_spec("triton").submodule_search_locations[0], "backends/nvidia/bin/ptxas").exists()
                    if find_spec("triton") else True, reason="no assembler for NVIDIA's GPUs")  # fmt: skip
def test_the_kernels_compile_for_an_h100_and_spill_nothing() -> None:
    program = Path(__file__).parents[2] / "benchmarks" / "triton_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(program), "--only", "1"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [line for line in run.stdout.splitlines() if "registers" in line]
    assert len(lines) == 11
    assert all(", 0 bytes spilled" in line for line in lines), run.stdout


# tasks (0: no vmap), images, channels, height, width, filters, pool: odd maps, one image, one and three channels
SHAPES = [(0, 1, 1, 7, 7, 5, 2), (2, 1, 3, 6, 5, 5, 2), (2, 2, 9, 4, 4, 3, 1), (1, 2, 2, 7, 7, 17, 3)]
Block = Callable[..., Tensor]


def formulas(pool: int) -> Block:
    """Convolution and what follows, one after the other, by PyTorch's operations."""
    convolution = Convolution((1, 1), (1, 1), (1, 1), 1)
    rest = NormActPool(1e-3, 0.1, None if pool == 1 else pool)
    return lambda x, w, b, gamma, beta: rest(convolution(x, w, b), gamma, beta)


def to_second_order(block: Block, given: Sequence[Tensor]) -> list[Tensor]:
    """The output, the gradients of a smooth function of it, and gradients of a smooth function of those."""
    leaves = [t.clone().requires_grad_() for t in given]
    y = block(*leaves)
    loss = (torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y) * torch.sin(y)).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    again = sum(
        (torch.linspace(1, 2, g.numel(), dtype=g.dtype, device=g.device).view_as(g) * torch.cos(g)).sum() for g in first
    )
    return [y, *first, *torch.autograd.grad(again, leaves)]


def problem(shape: tuple[int, ...]) -> list[Tensor]:
    tasks, n, c, h, w, filters, _ = shape
    sizes = [(n, c, h, w), (filters, c, 3, 3), (filters,), (filters,), (filters,)]
    given = [torch.randn(*([tasks] if tasks else []), *s, dtype=torch.float64) for s in sizes]
    given[3][..., 0] = -given[3][..., 0].abs()
    given[3][..., 1] = 0  # ties every window
    return [t.to(DEVICE) for t in given]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, i=i: f"{i}: {m}")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was started."""
    from innerloop.closed_forms import triton_launches

    counts: Counter[str] = Counter()
    start = triton_launches.launch

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counts[kernel.fn.__name__] += 1
        start(kernel, *args, **kwargs)

    monkeypatch.setattr(triton_launches, "launch", counted)
    return counts


@pytest.mark.parametrize("shape", SHAPES)
def check_value_gradient_and_curvature(shape: tuple[int, ...], launches: Counter[str]) -> None:
    op, reference = TaskBlock(1e-3, 0.1, shape[-1], "ieee"), formulas(shape[-1])
    given = problem(shape)
    vmap = torch.func.vmap if shape[0] else lambda f: f
    same(to_second_order(vmap(op), given), to_second_order(vmap(reference), given))
    # value; gradient twice, once more in the walk back; second order
    assert launches.total() - launches["add_splits"] == 2 + 2 * 4 + 5


def check_shared_weights_and_directions_that_are_not_there() -> None:
    """Tasks of their own images alone; then a tangent, forward over a gradient by one input."""
    x, *parameters = problem(SHAPES[1])
    op, reference = TaskBlock(1e-3, 0.1, 2, "ieee"), formulas(2)
    shared = [p[0] for p in parameters]

    def each(block: Block) -> Block:
        return torch.func.vmap(block, in_dims=(0, None, None, None, None))

    same(to_second_order(each(op), [x, *shared]), to_second_order(each(reference), [x, *shared]))
    for i in range(1, 5):

        def of_one(block: Block, i: int = i) -> Any:
            def f(t: Tensor) -> Tensor:
                return torch.sin(block(*[t if j == i else u for j, u in enumerate([x[0], *shared])])).sum()

            t = shared[i - 1]
            return torch.func.jvp(torch.func.grad(f), (t,), (torch.cos(t),))

        same(of_one(op), of_one(reference))


def check_several_programs_and_splits_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a program takes one after the other, and weight gradients in parts that are added."""
    from innerloop.closed_forms import triton_launches

    monkeypatch.setattr(triton_launches, "_programs", lambda tasks, count, tile: min(2, -(-count // tile)))
    monkeypatch.setattr(triton_launches, "ROWS_OF_SPLIT", 64)
    given = problem((1, 2, 1, 9, 7, 3, 2))
    same(
        to_second_order(torch.func.vmap(TaskBlock(1e-3, 0.1, 2, "ieee")), given),
        to_second_order(torch.func.vmap(formulas(2)), given),
    )


def check_a_whole_meta_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def learner(parallel: str) -> MetaLearner:
        torch.manual_seed(0)
        model = Conv4(2, size=16, filters=2).to(DEVICE, memory_format=torch.channels_last)
        method = maml_plus_plus(inner_steps=2, msl_epochs=4, da=False)
        return MetaLearner(model, F.cross_entropy, method, "mixed", parallel=parallel)

    from innerloop.closed_forms import triton_launches

    for name in ("ROWS", "ROWS_OF_PRODUCT", "FEW_ROWS_OF_PRODUCT", "ROWS_OF_SUM") if INTERPRETED else ():
        monkeypatch.setattr(triton_launches, name, 512)  # few programs: each is slow here, whatever its size
    images, labels = torch.randn(2, 2, 1, 16, 16, device=DEVICE), torch.arange(2, device=DEVICE).expand(2, 2)
    tasks = ((images, labels), (images.flip(1), labels.flip(1)))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    vmapped, looped = learner("vmap"), learner("loop")
    vmapped.task_gradients(tasks, 0.5)  # the model is looked at in the first
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INNERLOOP_KERNELS", "0")
        expected = looped.backward(tasks, 0.5)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if INTERPRETED else "0")
    found = vmapped.backward(tasks, 0.5)
    torch.testing.assert_close(found.query_losses, expected.query_losses)
    for (name, a), b in zip(vmapped.named_parameters(), looped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, t in vmapped.state_dict().items():
        if "statistics" in name:
            torch.testing.assert_close(t, looped.state_dict()[name])


def check_where_the_kernels_serve(launches: Counter[str]) -> None:
    block = ConvNormActPool(2, 3).to(DEVICE)
    x = torch.randn(2, 2, 4, 4, device=DEVICE)

    def taken(block: ConvNormActPool, x: Tensor) -> bool:
        launches.clear()
        torch.testing.assert_close(block(x), nn.Sequential(*block)(x))
        return bool(launches)

    assert taken(block, x)
    assert taken(ConvNormActPool(2, 3, pool=None).to(DEVICE), x)
    assert not taken(ConvNormActPool(2, 3, stride=2).to(DEVICE), x)
    assert not taken(block.eval(), x)
    assert not triton_block.usable(x.half())


def check_a_trace_sees_each_operator_as_one() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    op = TaskBlock(1e-3, 0.1, 2, "ieee")
    given = problem(SHAPES[1])

    def gradients(*given: Tensor) -> list[Tensor]:
        return to_second_order(torch.func.vmap(op), given)

    graph = make_fx(gradients, tracing_mode="fake")(*given)
    names = Counter(str(node.target) for node in graph.graph.nodes if "innerloop" in str(node.target))
    assert names == {
        "innerloop.block_value.default": 1,
        "innerloop.block_gradient.default": 2,
        "innerloop.block_second_order.default": 1,
    }
    same(graph(*given), gradients(*given))


@pytest.mark.parametrize("shape", [(3, 20, 5), (1, 3, 20)])
def check_cross_entropy(shape: tuple[int, ...]) -> None:
    """With a row that does not count; a class that there is not makes the loss NaN."""
    tasks, rows, classes = shape
    logits = 3 * torch.randn(*shape, dtype=torch.float64, device=DEVICE)
    targets = torch.randint(0, classes, (tasks, rows), device=DEVICE)
    targets[0, 0] = -100

    def over(loss: Callable[..., Tensor]) -> Block:
        return lambda given: torch.func.vmap(loss)(given, targets)

    same(to_second_order(over(CrossEntropy()), [logits]), to_second_order(over(F.cross_entropy), [logits]))
    assert CrossEntropy()(logits[0], targets[0] * 0 + classes).isnan()
    with FusedCrossEntropy():
        for options in ({"label_smoothing": 0.1}, {"reduction": "sum"}, {"weight": logits.new_ones(classes)}):
            torch.testing.assert_close(
                F.cross_entropy(logits[0], targets[0], **options),
                torch.nn.CrossEntropyLoss(**options)(logits[0], targets[0]),
            )


@pytest.mark.parametrize(
    "method", [maml(inner_rule="momentum"), maml(inner_rule="adam", lslr=True), maml(meta_sgd=True), maml(lslr=True)]
)
def check_updates_end_to_end(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule and kind of rates, parameters laid end to end, against one after the other."""

    def learner(parallel: str) -> MetaLearner:
        torch.manual_seed(0)
        return MetaLearner(MLP(hidden=(5, 4)).to(DEVICE), F.mse_loss, method, "mixed", parallel=parallel)

    tasks = ((torch.randn(3, 4, 1, device=DEVICE), torch.randn(3, 4, 1, device=DEVICE)),) * 2
    found, expected = learner("vmap"), learner("loop")
    found.backward(tasks)
    monkeypatch.setenv("INNERLOOP_KERNELS", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    expected.backward(tasks)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
