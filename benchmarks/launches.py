"""Count what a GPU would be told to start in an Omniglot MAML++ step, by operation, without a GPU.

    TRITON_INTERPRET=1 python benchmarks/launches.py            # with the Triton block
    INNERLOOP_KERNELS=0 python benchmarks/launches.py           # with PyTorch's operations alone

An operation of PyTorch's that makes no view and more than empty room counts as one launch, and each start of a Triton
kernel as one. The kernels are not run: what they would write is left as it is.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from innerloop import MetaLearner, maml_plus_plus
from innerloop.bench.launches import Launches
from innerloop.closed_forms import triton_block
from innerloop.nn import Conv4


@contextmanager
def kernels_counted(counts: Counter[str]) -> Iterator[None]:
    """In this block Triton's kernels are counted and not started."""
    if not triton_block.usable(torch.empty(0)):
        yield
        return
    from innerloop.closed_forms import triton_launches

    start = triton_launches.launch

    def count(kernel: Any, *_: Any, **__: Any) -> None:
        counts[f"Triton: {kernel.fn.__name__}"] += 1

    triton_launches.launch = count
    try:
        yield
    finally:
        triton_launches.launch = start


def step(filters: int = 64, tasks: int = 8, ways: int = 20) -> Counter[str]:
    """The launches of one step, all six repairs in force, second order."""
    torch.manual_seed(0)
    model = Conv4(ways, filters=filters).to(memory_format=torch.channels_last)
    learner = MetaLearner(model, F.cross_entropy, maml_plus_plus(da=False), "mixed", parallel="vmap")
    images, labels = torch.randn(tasks, ways, 1, 28, 28), torch.arange(ways).repeat(tasks, 1)
    batch: tuple[tuple[Tensor, Tensor], ...] = ((images, labels), (images, labels))
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    learner.task_gradients(batch, 0.0)  # the model is looked at in the first
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted
    with Launches() as seen, kernels_counted(seen.counts):
        learner.task_gradients(batch, 0.0)
    return seen.counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, default=64)
    counts = step(parser.parse_args().filters)
    for name, count in counts.most_common():
        print(f"{count:6} {name}")
    print(
        f"{counts.total():6} launches in all, {sum(c for n, c in counts.items() if n.startswith('Triton'))} of Triton's"
    )


if __name__ == "__main__":
    main()
