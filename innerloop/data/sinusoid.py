"""Sinusoid regression, the first experiment of MAML (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.data._random import check_whole, raw_words, uniform
from innerloop.data.classes import SPLITS, Split
from innerloop.tasks import Examples, Task, select_task

_Number = TypeVar("_Number", float, NDArray[np.float64])

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)


class Sinusoids:
    """Tasks ``y = A sin(x - phi)``: fit a sine wave from a few of its points.

    ``A`` is uniform on [0.1, 5], ``phi`` on [0, pi] (radians), each ``x`` on [-5, 5]. A task depends only on
    ``(seed, split, index)``; making it takes constant time in ``index``. Inputs and targets are both
    ``dtype [n, 1]`` with ``n = shots`` in the support set and ``n = queries`` in the query set.

    Raises ``ValueError`` for arguments out of range.
    """

    def __init__(
        self,
        *,
        shots: int = 10,
        queries: int = 10,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_whole("shots", shots, at_least=1)
        check_whole("queries", queries, at_least=1)
        check_whole("seed", seed, at_least=0)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type such as torch.float32; got {dtype}")
        self.shots, self.queries, self.seed = int(shots), int(queries), int(seed)
        self.device, self.dtype = torch.device(device), dtype
        self.input_shape: tuple[int, ...] = (1,)

    def parameters(self, split: Split, index: int) -> tuple[float, float]:
        """Amplitude ``A`` and phase ``phi`` (radians) of task ``index``."""
        amplitude, phase = self._draw(split, index, 1, 2)[0].tolist()
        return _between(amplitude, AMPLITUDES), _between(phase, PHASES)

    def task(self, split: Split, index: int) -> Task:
        """Task ``index`` (0 or more, below 2**63) of a split."""
        return select_task(self.meta_batch(split, index, 1), 0)

    def meta_batch(self, split: Split, start: int, size: int) -> Task:
        """Tasks ``start .. start + size - 1``, stacked: inputs and targets ``[size, n, 1]``."""
        check_whole("meta-batch size", size, at_least=1)
        draws = self._draw(split, start, size, 2 + self.shots + self.queries)
        amplitudes = _between(draws[:, 0:1], AMPLITUDES)
        phases = _between(draws[:, 1:2], PHASES)
        x = _between(draws[:, 2:], INPUTS)
        y = amplitudes * np.sin(x - phases)
        inputs, targets = (
            torch.from_numpy(values)[..., None].to(device=self.device, dtype=self.dtype) for values in (x, y)
        )
        return Task(
            support=Examples(inputs[:, : self.shots], targets[:, : self.shots]),
            query=Examples(inputs[:, self.shots :], targets[:, self.shots :]),
        )

    def _draw(self, split: Split, start: int, size: int, count: int) -> NDArray[np.float64]:
        """Uniform numbers ``[size, count]`` in [0, 1): the first ``count`` of each task."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)}; got {split!r}")
        check_whole("task index", start, at_least=0)
        stream = f"sinusoids/{split}"
        return uniform(np.stack([raw_words(self.seed, stream, start + t, count) for t in range(size)]))


def _between(unit: _Number, limits: tuple[float, float]) -> _Number:
    low, high = limits
    return low + (high - low) * unit
