"""A function of tensors as one flat graph of operations, with every derivative in it, compiled by Inductor.

``torch.compile`` cannot differentiate twice, and need not: a function that takes its derivatives inside is traced with
them, and what is left to compile has none.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from innerloop.closed_forms.kernels import switched_off

Backend = Literal["inductor", "eager"]
"""``eager`` runs the traced graph as it is, operation by operation: the same arithmetic, without a compiler."""
Flat = Callable[..., Sequence[Tensor]]


class NotCompiledError(RuntimeError):
    """A function that cannot be traced or compiled; the message says why."""


def compiled(
    function: Flat, arguments: Sequence[Tensor], backend: Backend, timeout: float, threads: int
) -> Callable[..., Sequence[Tensor]]:
    """``function`` of tensors of these shapes, dtypes and strides, as one compiled graph.

    Args:
        function: takes tensors and gives tensors; of nothing else may its result depend.
        arguments: tensors like those that it will be called with.
        backend: who runs the graph.
        timeout: seconds that compiling may take.
        threads: of each operation.

    Raises:
        NotCompiledError: the function draws random numbers, chooses by a tensor's values or reads tensors that are no
            arguments, an operation is unknown, there is no compiler, it fails, or it takes too long.
    """
    arguments = _distinct(arguments)
    graph = traced(function, arguments)
    if backend == "eager":
        return cast(Callable[..., Sequence[Tensor]], graph)
    return cast(Callable[..., Sequence[Tensor]], _within(timeout, lambda: _by_inductor(graph, arguments, threads)))


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in tensors of their own: a trace takes one tensor in two places for one argument."""
    seen: set[int] = set()
    found = []
    for tensor in tensors:
        found.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return found


def traced(function: Flat, arguments: Sequence[Tensor]) -> GraphModule:
    """The operations of ``function``, and of the derivatives that it takes, without those that nobody needs.

    Raises:
        NotCompiledError: see ``compiled``.
    """
    try:
        # Of tensors without values, so that nothing can be read from them unnoticed.
        with switched_off():
            graph: GraphModule = make_fx(function, _changing_statistics(), tracing_mode="fake")(*arguments)
    except Exception as error:
        raise NotCompiledError(_reason(error)) from error
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotCompiledError(f"it draws random numbers ({node.target}), as dropout does")
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@functools.cache
def _changing_statistics() -> dict[Any, Callable[..., Any]]:
    """Batch norms as arithmetic: their schemas do not tell that they change running statistics.

    A compiler takes one whose output nobody needs for dead, and may move the others past those who read what they left.
    """
    aten = torch.ops.aten
    return get_decompositions([aten.native_batch_norm, aten.cudnn_batch_norm])


def _by_inductor(graph: GraphModule, arguments: Sequence[Tensor], threads: int) -> Callable[..., Sequence[Tensor]]:
    try:
        # Imported here: it takes seconds, and most runs have no use for it.
        import torch._inductor

        made: Callable[..., Sequence[Tensor]] = torch._inductor.standalone_compile(
            graph, list(arguments), options={"config_patches": {"cpp.threads": threads}}
        )
        with torch.no_grad():
            made(*arguments)  # what fails, fails here
        return made
    except Exception as error:
        raise NotCompiledError(_reason(error)) from error


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """``call()``, in a thread that is left to itself when the time is over.

    What it compiles is kept on disk all the same.

    Raises:
        NotCompiledError: the time is over.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name="innerloop-compile")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise NotCompiledError(f"compiling took longer than {seconds:g} s")
    well, result = outcome[0]
    if not well:
        raise result
    return result


def _reason(error: BaseException) -> str:
    """One line for people."""
    text = f"{type(error).__name__}: {error}"
    while error.__cause__ is not None:
        error = error.__cause__
        text += f" {type(error).__name__}: {error}"
    for sign, meaning in _MEANINGS.items():
        if sign in text:
            return meaning
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


_MEANINGS = {
    "data-dependent": "what it does depends on the values of tensors",
    "DataDependent": "what it does depends on the values of tensors",
    "_local_scalar_dense": "what it does depends on the values of tensors",
    "convert all Tensors to FakeTensors": "it reads a tensor that is no parameter, buffer, input or target "
    "(register_buffer makes a tensor of the model's a buffer)",
    "InvalidCxxCompiler": "there is no C++ compiler (install g++ or clang, or name one in CXX)",
    "No space left": "the disk of Inductor's cache is full (TORCHINDUCTOR_CACHE_DIR names another place)",
    "Disk quota": "the disk of Inductor's cache is full (TORCHINDUCTOR_CACHE_DIR names another place)",
    "Read-only file system": "Inductor's cache cannot be written (TORCHINDUCTOR_CACHE_DIR names another place)",
    "PermissionError": "Inductor's cache cannot be written (TORCHINDUCTOR_CACHE_DIR names another place)",
}
