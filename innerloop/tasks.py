"""What an inner loop is given: a task's support set and query set."""

from __future__ import annotations

from collections.abc import Sequence
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


def as_task(tasks: Any) -> Task:
    """``(inputs, targets), (inputs, targets)`` of support and query, plain pairs or not, as a ``Task``."""
    support, query = tasks
    return Task(Examples(*support), Examples(*query))


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
    """Nests of equal structure as one whose tensors have a new first dimension; other leaves are the first nest's."""
    tree: Tree = pytree.tree_map(
        lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0], *trees
    )
    return tree
