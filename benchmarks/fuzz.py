"""Feed hostile input to every reader and to the command line.

python benchmarks/fuzz.py                               10,000 cases each; makes benchmarks/results/fuzz.json
python benchmarks/fuzz.py --targets config metrics --cases 500 --seed 1

The targets and what is generated for them: tests/fuzz. A case that fails is printed, with its traceback; the exit code
is 1 then.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))

from fuzzing import Outcome, fuzz  # noqa: E402
from targets import targets  # noqa: E402

from innerloop.training.checkpoints import write_json  # noqa: E402
from innerloop.training.environment import environment  # noqa: E402
from innerloop.training.progress import Progress  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
PACKAGES = ("hypothesis", "torch", "numpy", "safetensors", "pydantic", "tyro", "pillow")


def main() -> int:
    """Fuzz, print and record."""
    every = {target.name: target for target in targets()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", choices=list(every), default=list(every), metavar="TARGET")
    parser.add_argument("--out", type=Path, default=RESULTS, help="targets that it has already are replaced")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    progress = Progress()
    failed = False
    # In memory where there is such a folder: files are synced to the disk, which would take most of the time.
    fast = Path("/dev/shm")
    for name in chosen.targets:
        with (
            tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as folder,
            progress.task(name, chosen.cases) as bar,
        ):
            found = fuzz(every[name], chosen.cases, Path(folder, "sandbox"), chosen.seed, bar.advance)
        failed |= bool(found.failures)
        print(
            f"{name}: {found.cases} cases in {found.seconds:.0f} s, {found.refused} refused in words, the slowest "
            f"{found.slowest:.2f} s, {len(found.failures)} kinds of failure",
            flush=True,
        )
        for failure in found.failures:
            print(f"  {failure.times} x {failure.what} ({failure.where})\n{failure.traceback}\n  {failure.case}\n")
        record(chosen.out, found, chosen.seed)
    return int(failed)


def record(out: Path, found: Outcome, seed: int) -> None:
    """Put a target's outcome into the file."""
    known: dict[str, Any] = json.loads(out.read_text())["targets"] if out.exists() else {}
    known[found.name] = {
        "cases": found.cases,
        "refused": found.refused,
        "seconds": round(found.seconds, 1),
        "slowest": round(found.slowest, 3),
        "failures": [{"what": f.what, "where": f.where, "times": f.times} for f in found.failures],
        "seed": seed,
        "environment": environment(torch.device("cpu"), 1),
        "versions": {package: version(package) for package in PACKAGES},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"version": 1, "targets": known})


if __name__ == "__main__":
    sys.exit(main())
