"""What an inner loop is given: a task's support set and query set."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils import _pytree as pytree

Tree = TypeVar("Tree")


class Examples(NamedTuple):
    """Inputs and their targets: the support set or the query set of a task.

    ``inputs`` is what the model is called with: a tensor ``[n, ...]``, or a tuple (positional arguments) or dict
    (keyword arguments) of tensors. ``targets`` is what the loss compares the outputs with; any nest of tensors.
    """

    inputs: Any
    targets: Any


class Task(NamedTuple):
    """A support set to adapt to and a query set of the same classes (or function) to be judged on.

    A *meta-batch* is a ``Task`` whose tensors all carry one more leading dimension, the tasks.
    """

    support: Examples
    query: Examples


SHARED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""What is no tensor and may stand in a meta-batch: the same for all of its tasks."""


def as_tensors(tree: Any, like: torch.Tensor) -> Any:
    """A nest with its arrays and lists of numbers as tensors of the type and device of ``like``, mappings as dicts.

    Tensors stay what they are. Integers stay integers; floating-point numbers take ``like``'s precision, since those of
    NumPy and of Python say nothing of what the model is to compute in.

    Raises:
        TypeError: an array holds no numbers.
        ValueError: a list of numbers has rows of different lengths.
    """
    if isinstance(tree, torch.Tensor):
        return tree
    if isinstance(tree, Mapping):
        return {name: as_tensors(value, like) for name, value in tree.items()}
    if isinstance(tree, range):
        tree = list(tree)
    if isinstance(tree, list) and tree and all(map(_is_number, pytree.tree_leaves(tree))):
        tree = pytree.tree_map(lambda x: x.item() if hasattr(x, "item") else x, tree)
        try:
            return _of_kind(torch.tensor(tree), like)
        except (ValueError, TypeError) as error:
            raise ValueError(f"a list of numbers makes no tensor: {error}") from None
    if isinstance(tree, tuple):
        values = [as_tensors(value, like) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if isinstance(tree, list):
        return [as_tensors(value, like) for value in tree]
    if hasattr(tree, "__array__"):
        if not tree.shape:  # a number of NumPy's
            return tree.item()
        try:
            # A copy: PyTorch takes neither backward strides nor the other byte order, and warns of what is read-only.
            return _of_kind(torch.as_tensor(tree.astype(tree.dtype.newbyteorder("="))), like)
        except (TypeError, AttributeError) as error:
            raise TypeError(f"an array of {tree.dtype} makes no tensor: {error}") from None
    return tree


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float) or (hasattr(leaf, "item") and getattr(leaf, "shape", None) == ())


def _of_kind(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    kind = like.dtype if tensor.is_complex() == like.dtype.is_complex else like.dtype.to_real()
    return tensor.to(like.device, kind if tensor.is_floating_point() or tensor.is_complex() else None)


def as_support(support: Any, like: torch.Tensor) -> Examples:
    """``(inputs, targets)`` as ``Examples`` of tensors.

    Raises ``ValueError`` for what is no pair, and for a whole task.
    """
    if isinstance(support, Task):
        raise ValueError(
            "a support set is (inputs, targets), and this is a Task of a support and a query set: give .support"
        )
    return Examples(*(as_tensors(part, like) for part in _pair(support, "a support set is (inputs, targets)")))


def as_meta_batch(tasks: Any, like: torch.Tensor) -> Task:
    """``(inputs, targets), (inputs, targets)`` of support and query, plain pairs or not, as a ``Task`` of tensors.

    Raises:
        ValueError: it is no pair of pairs, or its tensors have no dimension of tasks or of examples.
        TypeError: it holds something that is the same for all tasks and no number, string or None.
    """
    if isinstance(tasks, list) and all(isinstance(task, Task) for task in tasks):
        raise ValueError(f"a meta-batch is one Task; of a list of {len(tasks)}, innerloop.stack_tasks makes one")
    shape = "a meta-batch is ((inputs, targets), (inputs, targets)) of support and query"
    support, query = _pair(tasks, shape)
    task = Task(*(Examples(*(as_tensors(p, like) for p in _pair(part, shape))) for part in (support, query)))
    meta_batch_size(task)
    for name, examples in task._asdict().items():
        _check_examples(name, examples)
    return task


def _check_graph(what: str, leaf: Any) -> None:
    """Raise for inputs that another network made and that still lead back to it."""
    if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
        raise ValueError(
            f"{what} carry the graph of what made them ({type(leaf.grad_fn).__name__}), which gets no gradient here: "
            "detach them, or put that network into the model"
        )


def _pair(value: Any, expected: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        what = f"{len(value)} parts" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
        raise ValueError(f"{expected}; got {what}")
    first, second = value
    return first, second


def _check_examples(name: str, examples: Examples) -> None:
    """Raise for a support or query set of a meta-batch that cannot be one."""
    single = "Is this a single task? innerloop.stack_tasks([task]) makes a meta-batch of it"
    for what, tree in examples._asdict().items():
        for leaf in pytree.tree_leaves(tree):
            _check_graph(f"the {name} {what}", leaf)
            if isinstance(leaf, torch.Tensor) and leaf.ndim < 2:
                raise ValueError(
                    f"the {name} {what} have shape {list(leaf.shape)}: in a meta-batch a tensor is [tasks, examples, "
                    f"...]. {single}"
                )
            if not isinstance(leaf, (torch.Tensor, *SHARED)):
                raise TypeError(
                    f"the {name} {what} hold a {type(leaf).__name__}: what differs between the tasks of a meta-batch "
                    "must be a tensor [tasks, examples, ...], in a tensor, tuple, list or dict"
                )
    inputs, targets = examples
    if not (isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor)):
        return  # of several tensors, some may be of no example
    if inputs.shape[1] != targets.shape[1]:
        raise ValueError(
            f"the {name} inputs {list(inputs.shape)} hold {inputs.shape[1]} examples a task and the targets "
            f"{list(targets.shape)} {targets.shape[1]}; both are [tasks, examples, ...]. {single}. (If a task's "
            "targets are truly of another number, give the inputs as a tuple: (inputs,))"
        )
    if inputs.ndim == 2:
        warnings.warn(
            f"the {name} inputs {list(inputs.shape)} are read as {inputs.shape[0]} tasks of {inputs.shape[1]} "
            f"examples, each a single number. {single}. If not, [..., None] gives them a dimension of features",
            stacklevel=6,
        )


def meta_batch_size(tasks: Task) -> int:
    """Number of tasks in a meta-batch.

    Raises ``ValueError`` when the tensors' leading dimensions disagree.
    """
    sizes = {int(t.shape[0]) if t.ndim else 0 for t in pytree.tree_leaves(tasks) if isinstance(t, torch.Tensor)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "a meta-batch is a Task whose tensors all start with the same number of tasks, at least one; "
            f"found leading sizes {sorted(sizes)}. Stack single tasks with innerloop.stack_tasks."
        )
    return sizes.pop()


def select_task(tasks: Task, index: int) -> Task:
    """Task ``index`` of a meta-batch, without its leading dimension."""
    selected: Task = pytree.tree_map(lambda t: t[index] if isinstance(t, torch.Tensor) else t, tasks)
    return selected


def stack_tasks(tasks: Sequence[Task]) -> Task:
    """A meta-batch from single tasks of equal shapes."""
    if not tasks:
        raise ValueError("stack_tasks needs at least one task; got an empty sequence")
    return stacked(tasks)


def concatenated(trees: Sequence[Tree]) -> Tree:
    """Nests of equal structure as one, their tensors joined along the first dimension."""
    tree: Tree = pytree.tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0], *trees
    )
    return tree


def stacked(trees: Sequence[Tree]) -> Tree:
    """Nests of equal structure as one whose tensors have a new first dimension; other leaves that differ are lists."""
    tree: Tree = pytree.tree_map(_stacked_leaves, *trees)
    return tree


def _stacked_leaves(*leaves: Any) -> Any:
    if isinstance(leaves[0], torch.Tensor):
        return torch.stack(leaves)
    alike = all(leaf is leaves[0] or (isinstance(leaf, SHARED) and leaf == leaves[0]) for leaf in leaves)
    return leaves[0] if alike else list(leaves)
