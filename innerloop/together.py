"""Elementwise work on many tensors at once: on a GPU, to start it for each of them takes longer than to do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from innerloop.closed_forms import triton_block


def pays(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are better laid end to end: of one kind, vmapped (which ``torch._foreach`` is not), on a GPU."""
    given = list(tensors.values())
    return (
        len(given) > 2
        and torch._C._are_functorch_transforms_active()
        and triton_block.on_gpu(given[0])
        and all(t.dtype == given[0].dtype and t.device == given[0].device for t in given)
        and not given[0].is_complex()
    )


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Their values end to end, those of convolutions' weights channels-last."""
    return torch.cat([(t.permute(0, 2, 3, 1) if t.ndim == 4 else t).reshape(-1) for t in tensors])


def unpacked(values: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: views, in the shapes of ``like``."""
    made = {}
    parts = torch.split(values, [t.numel() for t in like.values()])
    for (name, t), part in zip(like.items(), parts, strict=True):
        if t.ndim == 4:
            made[name] = part.view(*(t.shape[d] for d in (0, 2, 3, 1))).permute(0, 3, 1, 2)
        else:
            made[name] = part.view(t.shape)
    return made


def summed(of_tasks: Sequence[Tensor]) -> list[Tensor]:
    """Each summed over its first dimension, the tasks."""
    first = of_tasks[0]
    if not triton_block.on_gpu(first) or any(t.dtype != first.dtype for t in of_tasks):
        return [t.sum(0) for t in of_tasks]
    like = {str(i): t[0] for i, t in enumerate(of_tasks)}
    return list(unpacked(torch.func.vmap(packed)(list(of_tasks)).sum(0), like).values())


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, or of theirs together."""
    made = dict(tensors)
    for kind in {t.dtype for t in tensors.values()}:
        alike = {name: t for name, t in tensors.items() if t.dtype == kind}
        made |= (
            unpacked(packed(list(alike.values())), alike) if pays(alike) else {n: t.clone() for n, t in alike.items()}
        )
    return made


def each(function: Callable[..., Tensor], *groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An elementwise function of the tensors that the groups have by each name of the first."""
    first, *others = groups
    alike = all(o[n].shape == t.shape and o[n].dtype == t.dtype for o in others for n, t in first.items())
    if not (pays(first) and alike):
        return {n: function(t, *(o[n] for o in others)) for n, t in first.items()}
    return unpacked(function(*(packed([group[n] for n in first]) for group in groups)), first)
