"""A function of tensors as one flat graph of operations, with every derivative in it, compiled by Inductor.

``torch.compile`` cannot differentiate twice, and need not: a function that takes its derivatives inside is traced with
them, and what is left to compile has none.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from innerloop.closed_forms.kernels import switched_off

Backend = Literal["inductor", "eager"]
"""``eager`` runs the traced graph as it is, operation by operation: the same arithmetic, without a compiler."""
Flat = Callable[..., Sequence[Tensor]]


class NotCompiledError(RuntimeError):
    """A function that cannot be traced or compiled; the message says why."""


def lowered(
    graph: GraphModule, arguments: Sequence[Tensor], backend: Backend, timeout: float, threads: int
) -> Callable[..., Sequence[Tensor]]:
    """A graph as a function of tensors of these shapes, dtypes and strides, compiled.

    Args:
        graph: of tensors; of nothing else may its result depend.
        arguments: tensors like those that it will be called with.
        backend: who runs the graph.
        timeout: seconds that compiling may take.
        threads: of each operation.

    Raises:
        NotCompiledError: there is no compiler, it fails, or it takes too long.
    """
    if backend == "eager":
        return cast(Callable[..., Sequence[Tensor]], graph)
    return cast(Callable[..., Sequence[Tensor]], _within(timeout, lambda: _by_inductor(graph, arguments, threads)))


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
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
        NotCompiledError: the function draws random numbers, chooses by a tensor's values or reads tensors that are no
            arguments, or an operation is unknown.
    """
    try:
        # Of tensors without values, so that nothing can be read from them unnoticed.
        with switched_off():
            pure = functionalize(function, remove="mutations")
            graph: GraphModule = make_fx(pure, _changing_statistics(), tracing_mode="fake")(*arguments)
    except Exception as error:
        raise NotCompiledError(_reason(error)) from error
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotCompiledError(f"it draws random numbers ({node.target}), as dropout does")
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class GraphHalves(NamedTuple):
    """A graph in two parts, for arguments of which some are known only after its first results were used.

    Attributes:
        first: of the early arguments; gives the early results, and what it keeps for the second.
        second: of what was kept, ``again`` and the late arguments; gives the late results.
        again: indices of the early arguments that the second part needs too.
    """

    first: GraphModule
    second: GraphModule
    again: list[int]


def halved(graph: GraphModule, late_arguments: Collection[int], early_results: int) -> GraphHalves | None:
    """The graph in two parts. Results of costly operations are kept for the second, and cheap ones computed again.

    Elementwise operations are fused into those that read them, so that to compute one again costs less than to write
    its result and read it. None where the graph changes tensors in place, and what is computed again might differ.
    """
    nodes = list(graph.graph.nodes)
    if any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in nodes):
        return None
    places = [n for n in nodes if n.op == "placeholder"]
    results: list[Node] = list(nodes[-1].args[0])
    late = {places[i] for i in late_arguments}
    for node in nodes:
        if any(source in late for source in node.all_input_nodes):
            late.add(node)
    if any(result in late for result in results[:early_results]):
        return None
    kept: dict[Node, None] = {}
    again: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = [r for r in results[early_results:] if isinstance(r, Node)]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            if node not in late:
                again[node] = None
        elif node not in late and _costly(node):
            kept[node] = None
        else:
            waiting += node.all_input_nodes
    early = [n for n in places if n not in late]
    first = _part(graph, early, [*results[:early_results], *kept])
    second = _part(graph, [*kept, *again, *(n for n in places if n in late)], results[early_results:])
    return GraphHalves(first, second, [places.index(n) for n in again])


def _costly(node: Node) -> bool:
    if node.target is operator.getitem:
        return _costly(node.all_input_nodes[0])
    return any(part in str(node.target) for part in _COSTLY)


_COSTLY = ("mm", "convolution", "sum", "mean", "max", "softmax", "var", "norm", "scatter", "index", "embedding")


def _part(graph: GraphModule, inputs: Sequence[Node], outputs: Sequence[Any]) -> GraphModule:
    """The operations between these inputs and outputs, as a graph of its own."""
    part, made = Graph(), {}
    for node in inputs:
        made[node] = part.placeholder(node.name)
        made[node].meta = dict(node.meta)
    for node in graph.graph.nodes:
        if (
            node not in made
            and node.op not in ("placeholder", "output")
            and all(n in made for n in node.all_input_nodes)
        ):
            made[node] = part.node_copy(node, made.__getitem__)
    part.output([made[o] if isinstance(o, Node) else o for o in outputs])
    part.eliminate_dead_code()
    return GraphModule(graph, part)


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
