"""Support sets of unequal classes: fifteen drawings of one character and one of each of four others.

python experiments/unequal.py RUN --data OMNIGLOT    writes experiments/results/unequal/RUN.json

Each draw takes five characters that the run has not seen, and judges five more drawings of each, with every class and
with every image counting the same, and, beside them, the small classes' drawings repeated fifteen times.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from stranger import characters

import innerloop
from innerloop.norm_layers import Normalisation
from innerloop.training.checkpoints import write_json
from innerloop.training.environment import environment
from innerloop.training.progress import Progress

LARGE, WAYS, QUERIES = 15, 5, 5
NORMALISATIONS: tuple[Normalisation, ...] = ("support", "running", "batch")


def main() -> None:
    """Measure a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "unequal")
    chosen = parser.parse_args()
    trained, generator = innerloop.load(chosen.run), random.Random(0)
    drawings = characters(trained, chosen.data)
    counts: dict[tuple[str, str], list[int]] = {}
    with Progress(shown=True).task("draws", chosen.draws) as bar:
        for _ in range(chosen.draws):
            names = generator.sample(sorted(drawings), WAYS)
            own = {name: generator.sample(drawings[name], LARGE + QUERIES) for name in names}
            support = {name: own[name][: LARGE if name == names[0] else 1] for name in names}
            repeated = {name: (own[name][:1] * LARGE if name != names[0] else own[name][:LARGE]) for name in names}
            asked = [(name, image) for name in names for image in own[name][LARGE:]]
            for normalisation in NORMALISATIONS:
                for how, examples, weighing in (
                    ("every class", support, "classes"),
                    ("every image", support, "images"),
                    ("small classes repeated", repeated, "classes"),
                ):
                    classifier = trained.adapt(examples, normalisation=normalisation, weighing=weighing)
                    found = [p.name for p in classifier.predict([image for _, image in asked])]
                    small = [(n, f) for (n, _), f in zip(asked, found, strict=True) if n != names[0]]
                    tally = counts.setdefault((how, normalisation), [0, 0, 0])
                    tally[0] += sum(n == f for n, f in small)
                    tally[1] += sum(f == names[0] for _, f in small)
                    tally[2] += len(small)
            bar.advance(1)
    rows = [
        {
            "counts the same": how,
            "normalisation": n,
            "small classes right": a / of,
            "taken for the large": b / of,
        }
        for (how, n), (a, b, of) in counts.items()
    ]
    command = f"python experiments/unequal.py RUN --data DIR --draws {chosen.draws}"
    chosen.out.mkdir(parents=True, exist_ok=True)
    record = {"command": command, "run": chosen.run.name, "draws": chosen.draws, "rows": rows}
    measured_on = environment(torch.device("cpu"), 1)
    measured_on.pop("arguments")  # a folder of this machine is among them
    write_json(chosen.out / f"{chosen.run.name}.json", {**record, "environment": measured_on})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
