"""What sampling the tasks takes of a training step, on the real Omniglot.

python benchmarks/sampling.py OMNIGLOT_FOLDER    writes benchmarks/results/sampling.json
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from innerloop.bench.cases import CASES
from innerloop.bench.measuring import measure
from innerloop.data import Episodes, omniglot
from innerloop.training.checkpoints import write_json
from innerloop.training.environment import environment
from innerloop.training.workers import available_cores

RESULTS = Path(__file__).parent / "results" / "sampling.json"
CASE = "omniglot-mamlpp"
ROUNDS = 15


def main(folder: str) -> None:
    """Time the sampling of a meta-batch by one process, and a step on as many tasks."""
    case = CASES[CASE]
    images = omniglot(folder, size=case.size, split="paper", seed=0)
    source = Episodes(images, ways=case.ways, shots=case.shots, queries=case.queries, seed=0, rotations=True)
    seconds = []
    for i in range(ROUNDS + 2):
        started = time.perf_counter()
        source.meta_batch("train", i * case.tasks, case.tasks)
        seconds.append(time.perf_counter() - started)
    step = measure(case, ["innerloop"], ROUNDS)["innerloop"]
    record = {
        "version": 1,
        "case": CASE,
        "sampling": statistics.median(seconds[2:]),
        "step": step.median,
        "share": statistics.median(seconds[2:]) / step.median,
        "environment": environment(torch.device("cpu"), available_cores()),
    }
    write_json(RESULTS, record)
    print(
        f"sampling {1e3 * record['sampling']:.2f} ms of a step of {1e3 * record['step']:.0f} ms: {record['share']:.2%}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
