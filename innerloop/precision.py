"""Convolutions in lower precision than the rest of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Precision = Literal["float32", "bf16"]


_ROUNDS: ContextVar[bool] = ContextVar("convolutions round to bfloat16", default=False)


def rounds_convolutions() -> bool:
    """Whether ``Bfloat16Convolutions`` is in force."""
    return _ROUNDS.get()


class Bfloat16Convolutions(TorchFunctionMode):
    """Within it, convolutions round their inputs to bfloat16 and give their result in the inputs' own precision.

    So do their derivatives. Weights, updates, normalisation and losses stay as they are.
    """

    def __enter__(self) -> Any:
        """Let ``rounds_convolutions`` know."""
        self._token = _ROUNDS.set(True)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """The end of it."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _ROUNDS.reset(self._token)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Divert ``F.conv1d``, ``conv2d`` and ``conv3d``."""
        if func not in _CONVOLUTIONS:
            return func(*args, **(kwargs or {}))

        def rounded(value: Any) -> Any:
            return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value

        precision = args[0].dtype
        result: Tensor = func(*map(rounded, args), **{n: rounded(v) for n, v in (kwargs or {}).items()})
        return result.to(precision)


class MixedBatchNorm(TorchFunctionMode):
    """Within it, norm layers take inputs of a lower precision than their statistics, as ``torch.autocast`` makes them.

    PyTorch's do by themselves, but not under ``vmap``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Divert normalisation."""
        if func not in _NORMS or args[0].dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **(kwargs or {}))
        others = [*args[1:], *(kwargs or {}).values()]
        if all(t.dtype == args[0].dtype for t in others if isinstance(t, Tensor)):
            return func(*args, **(kwargs or {}))
        result: Tensor = func(args[0].float(), *args[1:], **(kwargs or {}))
        return result.to(args[0].dtype)


_NORMS: tuple[Callable[..., Any], ...] = (F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm)
_CONVOLUTIONS: tuple[Callable[..., Any], ...] = (F.conv1d, F.conv2d, F.conv3d)
