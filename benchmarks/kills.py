"""Kill a small run at random moments, go on with it, and compare its end, bit for bit, with that of one never stopped.

python benchmarks/kills.py                    50 kills; writes benchmarks/results/kills.json
python benchmarks/kills.py --processes 2      with a worker process, of which none may outlive the run that is killed
python benchmarks/kills.py --kills 3 --json   print the record and write nothing

The run is MAML++ on strokes (per-step batch norm, LSLR, MSL, DA, CA), a few epochs of a few updates. It is trained in a
process of its own, which gets a SIGKILL: half-way through writing a checkpoint or a line of metrics.jsonl, between the
renames, before a sync, inside an inner step, in validation, in the test, or at any time at all. Needs POSIX.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from innerloop.network import Network
from innerloop.training import trainer
from innerloop.training.checkpoints import load_checkpoint, write_json
from innerloop.training.config import PRESETS, Config
from innerloop.training.environment import environment
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.workers import Workers

RESULTS = Path(__file__).parent / "results"
CLOCK = {"seconds", "tasks_per_second"}
KINDS: dict[str, int] = {
    "inner step": 60,
    "validation": 12,
    "half-written state": 3,
    "half-written epoch checkpoint": 1,
    "half-written metrics": 1,
    "before a sync": 8,
    "before a rename": 6,
    "any time": 0,
    "test": 16,
}
"""Where a run is killed: at an occasion of this kind, drawn from the first so many."""
DELAYED = ("inner step", "validation", "test")
"""Killed by the parent up to 20 ms after the occasion; elsewhere the process kills itself right at it."""


def config_of(processes: int) -> Config:
    """The run: seconds long, with all that MAML++ has in its state."""
    base = PRESETS["quickstart"].config()
    return replace(
        base,
        data=replace(base.data, ways=3, queries=2, image_size=16, train_classes=20),
        network=replace(base.network, filters=4),
        method=replace(base.method, inner_steps=2, msl_epochs=2, da_epochs=1),
        outer=replace(base.outer, epochs=3, iterations=8, meta_batch=2),
        evaluation=replace(base.evaluation, val_tasks=6, test_tasks=8, ensemble=2),
        compute=replace(base.compute, device="cpu", processes=processes, threads=1),
    )


class Saboteur:
    """Counts the occasions of one kind in this process, and has it killed at the n-th."""

    def __init__(self, kind: str, at: int, tell: Callable[..., None], chance: random.Random) -> None:
        self.kind, self.left, self.tell, self.chance = kind, at, tell, chance
        self.stage, self.files = "start", dict[int, str]()

    def occasion(self, kind: str, before: Callable[[], object] = lambda: None) -> None:
        """One has come; ``before`` is done on the way out."""
        if not kind or kind != self.kind:
            return
        self.left -= 1
        if self.left == 0:
            if kind in DELAYED:
                self.tell("now")
            else:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Watch what the trainer does."""
        write, sync, rename, open_file = os.write, os.fsync, os.replace, os.open
        loss, workers, update = Network.loss, Workers.__init__, trainer._Training._outer_update

        def named(descriptor: int) -> str:
            name = self.files.get(descriptor, "")
            if "latest" in name:
                return "half-written state"
            if "metrics" in name:
                return "half-written metrics"
            return "half-written epoch checkpoint" if "epoch" in name else ""

        def opening(path: Any, *rest: Any) -> int:
            descriptor = open_file(path, *rest)
            self.files[descriptor] = Path(path).name
            return descriptor

        def writing(descriptor: int, data: Any) -> int:
            part = bytes(data)[: self.chance.randrange(len(data))]
            self.occasion(named(descriptor), lambda: write(descriptor, part))
            return write(descriptor, data)

        def syncing(descriptor: int) -> None:
            self.occasion("before a sync")
            sync(descriptor)

        def renaming(old: Any, new: Any) -> None:
            self.occasion("before a rename")
            rename(old, new)

        def losing(network: Network, *rest: Any) -> Any:
            self.occasion(self.stage)
            return loss(network, *rest)

        def hiring(self_: Workers, *rest: Any, **more: Any) -> None:
            workers(self_, *rest, **more)
            self.tell("workers", *(p.pid for p in self_._processes))

        def updating(training: trainer._Training, iteration: int) -> None:
            self.tell("iteration", iteration)
            update(training, iteration)

        def staged(method: str, stage: str) -> None:
            plain = getattr(trainer._Training, method)

            def within(*arguments: Any) -> Any:
                self.stage, before = stage, self.stage
                try:
                    return plain(*arguments)
                finally:
                    self.stage = before

            setattr(trainer._Training, method, within)

        os.open, os.write, os.fsync, os.replace = opening, writing, syncing, renaming  # type: ignore[assignment]
        Network.loss = losing  # type: ignore[method-assign]
        Workers.__init__ = hiring  # type: ignore[method-assign]
        trainer._Training._outer_update = updating  # type: ignore[method-assign]
        staged("run_epoch", "inner step")
        staged("_validate", "validation")
        staged("test", "test")


class Life:
    """The run in a process of its own, until it ends or is killed."""

    def __init__(self, folder: RunFolder, config: Config, kind: str, at: int, seed: int, save_every: float) -> None:
        self.iteration, self.workers = -1, list[int]()
        chance = random.Random(seed)
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            code = 1
            try:
                saboteur = Saboteur(kind, at, lambda *words: _tell(writing, words), chance)
                saboteur.install()
                trainer.SAVE_EVERY_SECONDS = save_every
                trainer.train(folder, "quickstart", config, Progress(shown=False))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        # At any time: the start, which is reading the data, counts too.
        deadline = time.monotonic() + chance.uniform(0.0, 2.0) if kind == "any time" else None
        self.killed = self._watch(reading, deadline, chance)
        os.close(reading)

    def _watch(self, reading: int, deadline: float | None, chance: random.Random) -> bool:
        rest = b""
        while True:
            if deadline is not None and time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                deadline = None
            ready, _, _ = select.select([reading], [], [], 0.02)
            if not ready:
                continue
            data = os.read(reading, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                word, *values = json.loads(line)
                if word == "iteration":
                    self.iteration = values[0]
                elif word == "workers":
                    self.workers = values
                else:
                    time.sleep(chance.uniform(0.0, 0.02))
                    os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status) == signal.SIGKILL
        if os.WEXITSTATUS(status):
            raise SystemExit(f"a run ended with exit code {os.WEXITSTATUS(status)}")
        return False

    def orphans_seconds(self) -> float:
        """How long workers outlived the killed run.

        Raises:
            SystemExit: one does not end.
        """
        started = time.monotonic()
        while any(_alive(pid) for pid in self.workers):
            if time.monotonic() > started + 60:
                raise SystemExit(f"workers {self.workers} are still there a minute after their run was killed")
            time.sleep(0.01)
        return time.monotonic() - started


def _tell(descriptor: int, words: tuple[Any, ...]) -> None:
    data = (json.dumps(words) + "\n").encode()
    while data:
        data = data[_write(descriptor, data) :]


_write = os.write


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def fingerprint(folder: RunFolder) -> str:
    """A hash of all that a run ends with, but what a clock measured."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value, sort_keys=True).encode())

    for path in sorted(folder.checkpoints.glob("*.safetensors")):
        if path == folder.previous:  # where the last but one was saved, the clock decided
            continue
        tensors, state = load_checkpoint(path)
        for name in sorted(tensors):
            digest.update(f"{path.name}/{name}".encode() + tensors[name].numpy().tobytes())
        add({k: v for k, v in state.items() if k not in CLOCK})
    for line in folder.metrics.read_text().splitlines():
        add({k: v for k, v in json.loads(line).items() if k not in CLOCK})
    summary = json.loads(folder.summary.read_text())
    add([summary["test"], summary["best_epochs"]])
    return digest.hexdigest()


def main(kills: int, processes: int, seed: int, shown: bool) -> dict[str, Any]:
    """Kill runs until ``kills`` kills have been survived, or were not."""
    torch.set_num_threads(1)
    config, chance = config_of(processes), random.Random(seed)
    done: list[dict[str, Any]] = []
    runs = differing = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = RunFolder(Path(scratch) / "whole")
        started = time.monotonic()
        Life(whole, config, "", 0, 0, 30.0)
        expected = fingerprint(whole)
        epochs = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
        save_every = 2.5 * epochs[-1]["seconds"] / epochs[-1]["iterations"]
        kinds = list(KINDS)
        with Progress(shown).task(f"{kills} kills", kills) as bar:
            while len(done) < kills:
                folder = RunFolder(Path(scratch) / f"run-{runs}")
                runs += 1
                # The rarest first; the test comes last in a run.
                counts = Counter(k["kind"] for k in done)
                drawn = sorted(kinds, key=lambda k: (counts[k], chance.random()))[: min(5, kills - len(done))]
                for kind in [*sorted(drawn, key=lambda k: k == "test"), ""]:
                    at = chance.randint(1, KINDS[kind]) if KINDS.get(kind) else 1
                    life = Life(folder, config, kind, at, chance.getrandbits(32), save_every)
                    if not life.killed:
                        break
                    done.append(_described(folder, kind, life))
                    bar.advance()
                else:
                    raise SystemExit("the last life of a run was killed by somebody else")
                differing += fingerprint(folder) != expected
    lost = [k["updates_lost"] for k in done if k["updates_lost"] is not None]
    record = {
        "version": 1,
        "kills": len(done),
        "runs": runs,
        "runs_that_ended_otherwise": differing,
        "kinds": dict(Counter(k["kind"] for k in done)),
        "updates_of_a_run": config.outer.epochs * config.outer.iterations,
        "updates_lost_and_done_again": {"kills": sum(n > 0 for n in lost), "updates": sum(lost), "most": max(lost)},
        "processes": processes,
        "seed": seed,
        "seconds": round(time.monotonic() - started),
        "fingerprint": expected,
        "environment": environment(torch.device("cpu"), processes),
    }
    if processes > 1:
        record["workers_outlived_by_seconds"] = round(max(k["orphans"] for k in done), 2)
    return record


def _described(folder: RunFolder, kind: str, life: Life) -> dict[str, Any]:
    """A kill, and how many updates it cost (None where it came before the first or after the last)."""
    lost = None
    if life.iteration >= 0:
        state = folder.load_state().values if folder.started else {"epoch": 0, "sums": {"iterations": 0}}
        saved = state["epoch"] * 8 + state["sums"]["iterations"]
        lost = max(0, life.iteration + 1 - saved)
    return {"kind": kind, "updates_lost": lost, "orphans": life.orphans_seconds()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    result = main(chosen.kills, chosen.processes, chosen.seed, not chosen.json)
    if chosen.json:
        print(json.dumps(result))
    else:
        write_json(RESULTS / ("kills.json" if chosen.processes == 1 else "kills-workers.json"), result)
        print(
            f"{result['kills']} kills in {result['runs']} runs, {result['runs_that_ended_otherwise']} ended otherwise"
        )
    sys.exit(1 if result["runs_that_ended_otherwise"] else 0)
