"""A stranger's classes: characters of Omniglot's evaluation alphabets as folders of PNG files, adapted to and told.

python experiments/stranger.py RUN --data OMNIGLOT    writes experiments/results/stranger/RUN-20way-1shot.json

Each draw takes new characters that the run has not seen in training, writes one drawing of each into a folder of its
own, adapts to the folder, and classifies all their other drawings from files. Beside it stands the run's own meta-test
in the same setting (the same ways, shots and normalisation), and the time that a person waits.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import innerloop
from innerloop.classify import MetaTrained
from innerloop.data.omniglot import evaluation_characters
from innerloop.training.building import build_tasks
from innerloop.training.checkpoints import write_json
from innerloop.training.config import ConfigError
from innerloop.training.environment import environment
from innerloop.training.evaluation import Score, confidence_interval, score
from innerloop.training.progress import Progress

RESULTS = Path(__file__).parent / "results" / "stranger"
REPEATS = 7

Drawings = dict[str, list[bytes]]


def characters(trained: MetaTrained, data: Path) -> Drawings:
    """The evaluation alphabets' characters that the run has not been trained or validated on, by name."""
    config = trained.config
    own = config.data.dataset == "omniglot"
    # A run of another data set has seen none of them: all of the authors' evaluation alphabets are new to it.
    held_out = evaluation_characters(data, config.data.split if own else "background", config.compute.seed)
    return {name: [drawing.read() for drawing in drawings] for name, drawings in held_out.items()}


def write_folders(root: Path, classes: Drawings, names: list[str], shots: int) -> tuple[Path, list[Path], list[str]]:
    """A support folder, and the other drawings' files with the class of each."""
    queries: list[Path] = []
    answers: list[str] = []
    for name in names:
        own = name.replace("/", " ")
        for folder in (root / "support" / own, root / "query" / own):
            folder.mkdir(parents=True)
        for i, drawing in enumerate(classes[name]):
            path = root / ("support" if i < shots else "query") / own / f"{i:02d}.png"
            path.write_bytes(drawing)
            if i >= shots:
                queries.append(path)
                answers.append(own)
    return root / "support", queries, answers


def stranger_accuracies(
    trained: MetaTrained, classes: Drawings, ways: int, shots: int, draws: int, seed: int, tick: Callable[[], None]
) -> tuple[list[float], int, int]:
    """Accuracy of each draw; how many support sets gave an estimate of it, and in how many its interval held it."""
    generator = random.Random(seed)
    accuracies: list[float] = []
    covered = estimated = 0
    for _ in range(draws):
        with tempfile.TemporaryDirectory() as folder:
            names = generator.sample(sorted(classes), ways)
            for name in names:
                generator.shuffle(classes[name])
            support, queries, answers = write_folders(Path(folder), classes, names, shots)
            adaptation = trained.adaptation(support)
            found = adaptation.classifier.predict(queries)
            accuracies.append(statistics.mean(p.name == a for p, a in zip(found, answers, strict=True)))
            estimate = adaptation.estimate()
        if estimate is not None:
            estimated += 1
            covered += estimate.low <= accuracies[-1] <= estimate.high
        tick()
    return accuracies, estimated, covered


def meta_test(trained: MetaTrained, data: Path, ways: int, shots: int, tasks: int, tick: Callable[[], None]) -> Score:
    """The run's own test in the same setting: its held-out classes, one query image a class."""
    own = trained.config.data
    place = data if own.dataset == "omniglot" else own.data
    config = replace(trained.config, data=replace(own, data=place, ways=ways, shots=shots, queries=1))
    source = build_tasks(config, torch.device("cpu"))
    learner = trained.learner(ways)
    outputs, targets = [], []
    for i in range(tasks):
        support, query = source.task("test", i)
        with torch.no_grad():
            outputs.append(learner.adapt(support, config.test_steps, "support")(query.inputs))
        targets.append(query.targets)
        tick()
    return score(torch.stack(outputs), torch.stack(targets), regression=False)


def times(run: Path | None, classes: Drawings, ways: int, shots: int) -> dict[str, Any]:
    """Seconds that a person waits: in a program that runs already, and for whole commands. Medians."""
    names = sorted(classes)[:ways]
    trained = innerloop.load(run)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        support, queries, _ = write_folders(root, classes, names, shots)
        many = (queries * (5000 // len(queries) + 1))[:5000]
        model = root / "model.safetensors"
        python = [sys.executable, "-m", "innerloop"]
        adapt = [*python, "adapt", str(trained.path), str(support), "--out", str(model), "--overwrite"]
        predict = [*python, "predict", str(model), str(root / "query"), "--csv"]
        result = {
            "load": _median(lambda: innerloop.load(run)),
            "adapt": _median(lambda: trained.adapt(support)),
            "import torch, a process": _median(lambda: _call([sys.executable, "-c", "import torch"])),
            "innerloop adapt, a process": _median(lambda: _call(adapt)),
            "innerloop predict, a process": _median(lambda: _call(predict)),
            "images predicted by it": len(queries),
        }
        classifier = trained.adapt(support)
        classifier.predict(many[:500])
        result["predict, images/s"] = len(many) / _median(lambda: classifier.predict(many), 3)
    return result


def _median(call: Callable[[], object], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Measure, write the record, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of the run; without it, the one that ships")
    parser.add_argument("--data", type=Path, required=True, help="folder of Omniglot")
    parser.add_argument("--ways", type=int, default=20)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--draws", type=int, default=100, help="sets of characters")
    parser.add_argument("--tasks", type=int, default=600, help="tasks of the meta-test (0: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--times", action=argparse.BooleanOptionalAction, default=True, help="measure the times as well"
    )
    parser.add_argument("--out", type=Path, help="file of the record")
    chosen = parser.parse_args()
    trained = innerloop.load(chosen.run)
    classes = characters(trained, chosen.data)
    ways, shots = chosen.ways, chosen.shots
    try:
        trained.learner(ways)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    progress = Progress()
    with progress.task("a stranger's folders", chosen.draws) as bar:
        accuracies, estimated, covered = stranger_accuracies(
            trained, classes, ways, shots, chosen.draws, chosen.seed, bar.advance
        )
    tested = None
    if chosen.tasks:
        with progress.task("meta-test", chosen.tasks) as bar:
            tested = meta_test(trained, chosen.data, ways, shots, chosen.tasks, bar.advance)
    with progress.waiting("times"):
        waited = times(chosen.run, classes, ways, shots) if chosen.times else None
    mean, interval = statistics.mean(accuracies), confidence_interval(torch.tensor(accuracies))
    record = {
        "version": 1,
        "run": trained.path.resolve().name,
        "preset": trained.preset,
        "trained_on": f"{trained.config.data.dataset} {trained.config.data.ways}-way {trained.config.data.shots}-shot",
        "epoch": trained.epoch,
        "ways": ways,
        "shots": shots,
        "normalisation": "support",
        "characters": len(classes),
        "draws": chosen.draws,
        "seed": chosen.seed,
        "accuracy": mean,
        "interval": interval,
        "lowest": min(accuracies),
        "estimates": {"made": estimated, "interval_held_the_accuracy": covered},
        "meta_test": None if tested is None else asdict(tested),
        "seconds": waited,
        "environment": environment(torch.device("cpu"), 1),
    }
    out = chosen.out or RESULTS / f"{record['run']}-{ways}way-{shots}shot.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    print(f"a stranger's {ways} classes, {shots} image(s) each: {mean:.2%} ± {interval:.2%} ({chosen.draws} draws)")
    if tested is not None:
        print(f"meta-test, the same setting: {tested.accuracy:.2%} ± {tested.interval:.2%} ({tested.tasks} tasks)")
    if waited is not None:
        print(json.dumps({k: round(v, 3) for k, v in waited.items()}, indent=2))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
