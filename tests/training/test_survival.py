"""Runs that survive: damage, full disks, two writers, readers while it is written, kills, orphans."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import StoppingProgress, records, small, start

import innerloop.training.checkpoints as checkpoints_module
import innerloop.training.run_folder as run_folder_module
import innerloop.training.trainer as trainer_module
from innerloop.cli.main import main
from innerloop.reports.records import read_run
from innerloop.training.checkpoints import CheckpointError, WriteError, load_checkpoint
from innerloop.training.config import ConfigError
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import InterruptedRunError, train

TINY = ["--epochs", "2", "--iterations", "3", "--val-tasks", "3", "--test-tasks", "4", "--meta-batch", "2"]
SILENT = Progress(shown=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = start(tmp_path_factory.mktemp("finished") / "run", small())
    train(folder, "sinusoid", small(), SILENT)
    return folder


def copy_of(folder: RunFolder, path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(folder.path, path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def events(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.events.read_text().splitlines()]


@pytest.mark.parametrize(
    ("damage", "says"), [(flip, "checksum"), (cut, "safetensors file"), (Path.unlink, "no checkpoint at")]
)
def test_a_damaged_state_is_found_and_the_one_before_is_gone_on_from(
    tmp_path: Path,
    damage: Callable[[Path], None],
    says: str,
    finished: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer_module, "SAVE_EVERY_SECONDS", 0.0)
    folder = start(tmp_path / "run", small())
    with pytest.raises(InterruptedRunError):
        train(folder, "sinusoid", small(), StoppingProgress(12))
    damage(folder.latest)
    train(folder, "sinusoid", small(), SILENT)
    assert records(folder) == records(finished)
    mine, theirs = load_checkpoint(folder.latest)[0], load_checkpoint(finished.latest)[0]
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    (event,) = [e for e in events(folder) if e["event"] == "damaged"]
    assert says in event["message"]
    assert "latest.safetensors" in event["message"]
    assert "Went on from the state before it" in event["message"]
    assert "previous.safetensors (epoch 2, iteration 4)" in event["message"]
    assert event["message"] in capsys.readouterr().err.replace("\n", "")
    assert folder.latest.with_suffix(".damaged").exists() == (damage is not Path.unlink)
    load_checkpoint(folder.previous)  # and what is kept now is whole


def test_without_a_whole_state_both_are_named(tmp_path: Path, finished: RunFolder) -> None:
    folder = copy_of(finished, tmp_path)
    flip(folder.latest)
    cut(folder.previous)
    with pytest.raises(
        CheckpointError, match=r"no state to go on from: .*latest\S+ is damaged.*previous\S+ is damaged"
    ):
        train(folder, "sinusoid", small(), SILENT)


def test_a_newer_state_is_not_passed_over_for_an_older_one(tmp_path: Path, finished: RunFolder) -> None:
    folder = copy_of(finished, tmp_path)
    tensors, state = load_checkpoint(folder.latest)
    checkpoints_module.save_checkpoint(folder.latest, tensors, state | {"version": 99})
    with pytest.raises(CheckpointError, match="version 99, of a newer innerloop"):
        train(folder, "sinusoid", small(), SILENT)


def test_unknown_fields_of_a_state_are_passed_over(tmp_path: Path, finished: RunFolder) -> None:
    folder = copy_of(finished, tmp_path)
    tensors, state = load_checkpoint(folder.latest)
    state["sums"]["new"] = 1
    checkpoints_module.save_checkpoint(folder.latest, tensors, state | {"new": [2]})
    assert train(folder, "sinusoid", small(), SILENT).summary["epochs"] == 3


def test_a_damaged_best_checkpoint_is_left_out_of_the_test(
    tmp_path: Path, finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(finished, tmp_path)
    first, second = json.loads(folder.summary.read_text())["best_epochs"]
    flip(folder.epoch_checkpoint(first))
    assert main(["evaluate", str(folder.path), "--tasks", "3", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["epochs"] == [second]
    assert "is damaged" in captured.err
    assert "Tested without it" in captured.err
    summary = train(folder, "sinusoid", small(), SILENT).summary
    assert summary["best_epochs"] == [second]
    assert summary["test"]["members"] == 1
    folder.epoch_checkpoint(second).unlink()
    assert main(["evaluate", str(folder.path), "--tasks", "3", "--json"]) == 2
    said = capsys.readouterr().err
    assert "none of the checkpoints of" in said
    assert "Traceback" not in said


def test_what_is_not_among_the_best_or_was_left_by_the_killed_is_removed(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", small())
    with pytest.raises(InterruptedRunError):
        train(folder, "sinusoid", small(), StoppingProgress(10))
    for left in (".latest.safetensors.77.tmp", ".epoch-0002.safetensors.77.tmp", "epoch-0009.safetensors"):
        (folder.checkpoints / left).write_bytes(b"half")
    (folder.path / ".metrics.jsonl.77.tmp").write_bytes(b"half")
    summary = train(folder, "sinusoid", small(), SILENT).summary
    best = {f"epoch-{e:04d}.safetensors" for e in summary["best_epochs"]}
    assert {p.name for p in folder.checkpoints.iterdir()} == {"latest.safetensors", "previous.safetensors", *best}
    assert not list(folder.path.glob(".*"))


def test_a_run_killed_while_it_makes_its_folder_can_be_started_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    (folder.path / ".config.json.77.tmp").write_text("{")
    folder.create("sinusoid", small())
    with pytest.raises(ConfigError, match="exists already"):
        folder.create("sinusoid", small())


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = start(tmp_path / "run", small())
    with folder.one_writer(), pytest.raises(ConfigError, match="another process is training"):
        train(folder, "sinusoid", small(), SILENT)
    with folder.one_writer():
        pass


def test_nothing_draws_from_the_generators_of_python_and_numpy(tmp_path: Path) -> None:
    """So that torch's is all of the randomness that a state has to hold."""
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    train(start(tmp_path / "run", small()), "sinusoid", small(), SILENT)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])


def test_a_full_disk_in_a_run_leaves_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is full: every write of the run fails once, half-way, and the run then goes on to the same end."""
    writes: list[int] = []
    write, failing = os.write, [0]

    def full(descriptor: int, data: bytes) -> int:
        writes.append(descriptor)
        if len(writes) == failing[0]:
            write(descriptor, bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    whole = start(tmp_path / "whole", small())
    writes.clear()
    train(whole, "sinusoid", small(), SILENT)
    for n in range(1, len(writes) + 1):
        folder = start(tmp_path / str(n), small())
        writes.clear()
        failing[0] = n
        with pytest.raises(WriteError, match=r"cannot be written: No space left on device.*free some space"):
            train(folder, "sinusoid", small(), SILENT)
        assert not list(folder.path.rglob(".*"))
        failing[0] = 0
        train(folder, "sinusoid", small(), SILENT)
        assert records(folder) == records(whole)


SMALL_DISK = """
mount -t tmpfs -o size=160k none disk || exit 99
{python} -m innerloop train sinusoid {options} --epochs 12 --out disk/run --quiet
echo "code $?"
ls -A disk/run/checkpoints
mount -o remount,size=10m disk
{python} -m innerloop train --resume disk/run --quiet > out
echo "code $?"
wc -l < disk/run/metrics.jsonl
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small tmpfs of its own: Linux")
def test_a_real_full_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    options = " ".join([*TINY[2:], "--threads", "1", "--ensemble", "20"])
    script = SMALL_DISK.format(python=sys.executable, options=options)
    try:
        ran = subprocess.run(
            ["unshare", "-r", "-m", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if ran.returncode == 99 or "unshare" in ran.stderr:
        pytest.skip(f"no file system of one's own may be mounted here: {ran.stderr.strip()}")
    first, *kept, second, lines = ran.stdout.split("\n")[:-1]
    assert first == "code 4"
    assert "cannot be written: No space left on device" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert {"latest.safetensors", "previous.safetensors"} <= set(kept)
    assert not [name for name in kept if name.endswith(".tmp")]
    assert (second, lines.strip()) == ("code 0", "12")


def test_a_reader_beside_the_writer_sees_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer gets a few bytes at a time to the disk; the reader meets half a line most of the time."""
    folder = start(tmp_path / "run", small())
    frozen = Path(__file__).parents[1] / "frozen" / "run-0.1" / "metrics.jsonl"
    record = json.loads(frozen.read_text().splitlines()[0])
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:97]))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder.append_metrics(record | {"epoch": 1})
    errors: list[Exception] = []
    seen: set[int] = set()
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            try:
                epochs = read_run(folder.path).epochs
                assert [e.epoch for e in epochs] == list(range(1, len(epochs) + 1))
                seen.add(len(epochs))
            except Exception as error:
                errors.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    epoch, deadline = 1, time.monotonic() + 60
    while len(seen) < 8 and time.monotonic() < deadline:
        epoch += 1
        folder.append_metrics(record | {"epoch": epoch})
        time.sleep(0.001)
    ended.set()
    reader.join()
    assert not errors
    assert len(seen) >= 8


def test_a_line_half_written_is_dropped_by_a_resumed_run_and_kept_apart_in_the_events(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", small())
    for epoch in (1, 2):
        folder.append_metrics({"epoch": epoch})
    with folder.metrics.open("a") as file:
        file.write('{"epoch": 3, "val')
    folder.keep_metrics_until(5)
    assert folder.metrics.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    folder.keep_metrics_until(1)
    assert folder.metrics.read_text() == '{"epoch": 1}\n'
    folder.events.write_text('{"half')
    folder.note("resumed", "went on")
    assert json.loads(folder.events.read_text().splitlines()[1])["event"] == "resumed"


def test_events_are_bounded_and_the_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder_module, "EVENTS_BYTES", 5000)
    folder = start(tmp_path / "run", small())
    sizes = []
    for i in range(300):
        folder.note("skipped", "what " * 10, iteration=i)
        sizes.append(folder.events.stat().st_size)
    assert max(sizes) <= 5000
    left = [e["iteration"] for e in events(folder)]
    assert left == list(range(left[0], 300))
    assert len(left) >= 10


def children(pid: int) -> set[int]:
    """All descendants of a process."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_workers_end_when_their_run_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "innerloop", "train", "sinusoid", "--out", str(tmp_path / "run"), "--quiet"]
    run = subprocess.Popen([*command, "--processes", "3", "--threads", "1", "--epochs", "900", "--iterations", "5"])
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(run.pid)
    assert len(workers) >= 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 60
    while not all(map(ended, workers)):
        assert time.monotonic() < deadline, f"{workers} are still there"
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="forks, and kills with SIGKILL")
def test_killed_runs_end_as_one_never_killed() -> None:
    """A few kills; benchmarks/kills.py is for many."""
    program = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    command = [sys.executable, str(program), "--kills", "3", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = json.loads(ran.stdout)
    assert (record["kills"], record["runs_that_ended_otherwise"]) == (3, 0)
