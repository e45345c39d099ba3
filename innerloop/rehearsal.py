"""A model and a loss called a few times before they are trusted: what an inner loop takes for granted, found to hold.

An inner loop exchanges a model's tensors, calls it, and differentiates what comes out; some steps are computed twice,
and tasks may be computed at once. So an answer must depend on the tensors that are exchanged, the inputs and PyTorch's,
Python's and NumPy's random numbers, and on nothing that an earlier call left. Nobody declares that, and where it does
not hold the numbers are wrong without a word. It is found out once, on one task.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop.explanations import UnsuitableModelError, compiled_twice
from innerloop.model_state import Attributes, Randomness
from innerloop.network import Network
from innerloop.tasks import Examples

_TRUSTED = ("torch.nn.", "innerloop.")
_RELATIVE = 1e-4


class _Call(NamedTuple):
    loss: Tensor
    outputs: list[Tensor]


def is_trusted(network: Network) -> bool:
    """Whether the model is made of PyTorch's layers and this package's, without hooks, and its loss is one of these."""
    own = getattr(network.loss_function, "__module__", None) or ""
    layers = all(
        type(m).__module__.startswith(_TRUSTED)
        and "parametr" not in type(m).__module__
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in network.model.modules()
    )
    return layers and own.startswith(("torch.nn.functional", "torch._C", "innerloop."))


def rehearse(
    network: Network,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    examples: Examples,
    *,
    second_order: bool,
) -> None:
    """Call the model and the loss as an inner loop will, and change nothing by it.

    Args:
        network: in the modes that it is going to be called in.
        parameters: every trainable parameter's value.
        buffers: of the model.
        examples: a support set.
        second_order: whether gradients will be differentiated.

    Raises:
        ValueError: an answer depends on what earlier calls left, or on tensors that are not the model's parameters.
        UnsuitableModelError: a function without a second derivative, or a compiled one, in second order.
    """
    device = next(iter(parameters.values())).device
    randomness, attributes = Randomness.now(device), Attributes(network.model)
    # Not the model's own values, so that it shows where those are used.
    moved = {n: (t.detach() * 1.01).requires_grad_() for n, t in parameters.items()}
    kept = [(t, t.detach().clone()) for t in _plain_tensors(network.model)]

    def put_back() -> None:
        attributes.put_back()
        for tensor, value in kept:
            tensor.data.copy_(value)

    def called(on: Examples) -> _Call:
        randomness.restore(device)
        loss, outputs, _ = network.loss(moved, buffers, on)
        return _Call(loss, [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)])

    try:
        with torch.enable_grad():
            first = called(examples)
            changed = attributes.names()
            gradients = _gradients(first.loss, moved, create_graph=second_order)
            if second_order:
                _check_derivatives(network.model, gradients)
            network.recomputes = _recomputes(network, moved, buffers, first.loss, gradients, second_order)
            put_back()
            try:
                called(_others(examples))
            except Exception:  # other examples that do not suit are no reason to refuse these
                put_back()
            again = called(examples)
            _check_leaves(network, [first.loss, again.loss], moved, examples)
    finally:
        put_back()
        randomness.restore(device)
    if not _alike(first, again):
        raise ValueError(_state_found(network.model, changed))


def check_modes(
    network: Network, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], examples: Examples
) -> None:
    """Warn of a model that answers otherwise in use than in training, for a reason that is no norm layer we know.

    Of what draws random numbers in training (dropout) nothing is said: that is what evaluation mode is for.
    """
    if not network.model.training:
        return
    device = next(iter(parameters.values())).device
    before = Randomness.now(device)
    answers = []
    for modes in (network.modes.without_dropout(), network.modes.adapting()):
        with modes:
            answers.append(network.answers(parameters, {n: b.clone() for n, b in buffers.items()}, examples.inputs))
        if not before.same(Randomness.now(device)):
            before.restore(device)
            return
    pairs = zip(*map(pytree.tree_leaves, answers), strict=False)
    if not all(_close(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)):
        warnings.warn(
            f"{type(network.model).__name__} answers otherwise in evaluation mode than it was trained, for another "
            "reason than dropout and norm layers that are known by their running_mean and running_var: a layer that "
            "asks self.training. Adapting and predicting use its evaluation mode, training its training mode",
            stacklevel=7,
        )


def _others(examples: Examples) -> Examples:
    """Examples of the same kind, made of a support set: half of them, with other numbers where there are any."""

    def cut(leaf: Any) -> Any:
        return leaf[: max(1, len(leaf) // 2)] if isinstance(leaf, Tensor) and leaf.ndim else leaf

    def half(leaf: Any) -> Any:
        some = cut(leaf)
        return some * 0.9 + 0.05 if isinstance(some, Tensor) and some.is_floating_point() else some

    inputs = pytree.tree_map(half, examples.inputs)
    return Examples(inputs, pytree.tree_map(cut, examples.targets))


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors among the attributes of the model's modules, which a forward may change in place."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.is_leaf and not value.is_inference():
                yield value


def _alike(a: _Call, b: _Call) -> bool:
    pairs = [(a.loss, b.loss), *zip(a.outputs, b.outputs, strict=False)]
    return len(a.outputs) == len(b.outputs) and all(_close(x, y) for x, y in pairs)


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    if not (x.is_floating_point() or x.is_complex()):
        return bool((x == y).all())
    scale = float(y.detach().abs().nan_to_num().max()) if y.numel() else 0.0
    return bool(torch.allclose(x, y, rtol=_RELATIVE, atol=_RELATIVE * scale, equal_nan=True))


def _state_found(model: nn.Module, changed: list[str]) -> str:
    who = f"{type(model).__name__}.forward (or the loss)"
    rule = "Buffers go from inner step to inner step, each task with its own; nothing else does"
    if changed:
        name = changed[0].rpartition(".")[2]
        return (
            f"{who} changes {', '.join(changed)} and reads it in the next call. {rule}. Make it a buffer, in __init__: "
            f"self.register_buffer({name!r}, torch.zeros(...))"
        )
    return (
        f"{who} gives another answer when it is called again with the same inputs: it keeps state that is no buffer "
        f"(in an object, a nest of containers, a closure), or draws random numbers that are not PyTorch's, Python's "
        f"or NumPy's. {rule}. Make it a buffer, in __init__: self.register_buffer(...)"
    )


def _check_leaves(network: Network, losses: list[Tensor], parameters: Mapping[str, Tensor], examples: Examples) -> None:
    """Raise if the loss depends on a tensor that requires a gradient and was not exchanged.

    What a forward makes itself (``x.requires_grad_()``) is another one in each of two calls.
    """
    known = {id(t) for t in parameters.values()}
    known |= {id(t) for t in pytree.tree_leaves(tuple(examples)) if isinstance(t, Tensor)}
    own = {id(p): name for name, p in network.model.named_parameters(remove_duplicate=False)}
    leaves = [{id(leaf): leaf for leaf in _leaves(loss)} for loss in losses]
    for leaf in [leaf for key, leaf in leaves[0].items() if key in leaves[1] and key not in known]:
        if id(leaf) in own:
            raise ValueError(
                f"the loss depends on {own[id(leaf)]} in another way than by its layer: a list, a view or a function "
                "keeps the parameter itself, and would keep it while the layer has fast weights. Read it from the "
                "layer in forward (and in the loss), each time"
            )
        raise ValueError(
            f"the loss depends on a tensor of shape {list(leaf.shape)} that requires a gradient and is not among the "
            "model's parameters: of another network whose outputs are the inputs, of the loss, or of layers in a "
            "Python list (nn.ModuleList registers them). Put it into the model, or detach it"
        )


def _check_derivatives(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Raise if a gradient was made by a function that has no derivative of its own and does not say so."""
    for node in _nodes([g.grad_fn for g in gradients.values()]):
        name = node.name()
        if "CompiledFunction" in name:
            raise compiled_twice(model)
        if name.rpartition("::")[2] in ("Error", "DelayedError"):
            raise UnsuitableModelError(
                "a function of the model or the loss is marked once_differentiable: it has no second derivative, and a "
                "second-order meta-gradient would leave its part out without a word. Take first-order meta-gradients "
                "(second_order=False, fomaml()), or write its backward in differentiable operations"
            )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Tensors that a loss's graph ends in."""
    return (node.variable for node in _nodes([loss.grad_fn]) if hasattr(node, "variable"))


def _nodes(roots: list[Any]) -> Iterator[Any]:
    """The nodes of an autograd graph."""
    seen: set[Any] = set()
    waiting = [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions if following is not None]


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor], create_graph: bool) -> dict[str, Tensor]:
    values = torch.autograd.grad(
        loss, list(parameters.values()), create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return dict(zip(parameters, values, strict=True))


def _recomputes(
    network: Network,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    loss: Tensor,
    outside: Mapping[str, Tensor],
    create_graph: bool,
) -> bool:
    """Whether a gradient is another one where the model has the exchanged tensors while it is taken: checkpointing."""
    with network.state.exchanged(parameters, {n: b.clone() for n, b in buffers.items()}):
        inside = _gradients(loss, parameters, create_graph)
    return not all(_close(inside[n], outside[n]) for n in inside)
