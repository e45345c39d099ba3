"""Every reader of files that may come from strangers, and the command line, with what is generated for it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints
from unittest import mock

import numpy as np
import torch
from fuzzing import Target
from generators import (
    IMAGES,
    NUMBERS,
    TEXTS,
    Tensors,
    changed,
    image_bytes,
    json_bytes,
    mutated,
    of_torch,
    other_tensors,
    pickle_bytes,
    safetensors_file,
    zip_bytes,
)
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from innerloop import maml_plus_plus
from innerloop.classify import Classifier, load, model_file
from innerloop.cli import main as command_line
from innerloop.cli.main import COMMANDS
from innerloop.data import ClassImages, image_folder, mini_imagenet, omniglot
from innerloop.data.cache import load_cached, store_cached
from innerloop.methods import METHODS
from innerloop.reports.records import read_run
from innerloop.training.building import build_learner
from innerloop.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from innerloop.training.config import PRESETS, Config, ConfigError, NetworkConfig, config_to_json
from innerloop.training.distributed import ALONE
from innerloop.training.grids import GRIDS
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import Progression, _Training, best_epochs

FOLDER_CONFIG = Config(network=NetworkConfig(filters=2), method=maml_plus_plus(inner_steps=1, zero_init=("head.*",)))


def _write(path: str, data: bytes) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


# --- config.json ------------------------------------------------------------------------------------------------------

_CONFIGS = [
    {"version": 1, "preset": name, "config": config_to_json(preset.config())} for name, preset in PRESETS.items()
]


def _config_file(r: Random) -> bytes:
    document = changed(r, r.choice(_CONFIGS))
    return json_bytes(document, r)


def _read_config(case: bytes) -> None:
    _write("run/config.json", case)
    folder = RunFolder(Path("run"))
    _, config = folder.read_config()
    # What was accepted is a config: it comes back as itself.
    folder.path.joinpath("config.json").unlink()
    folder.create("quickstart", config)
    assert folder.read_config()[1] == config


# --- data sets --------------------------------------------------------------------------------------------------------

_FILE_NAMES = [
    "0.png",
    "1.png",
    "2.JPG",
    "a.webp",
    ".b.png",
    "c.txt",
    "深.png",
    "d\n.png",
    "\udcff.png",
    "e\x1b[2J.gif",
    "f.eps",
]
_FOLDER_NAMES = ["a", "b", "c", "train", "val", "test", "A ", "深", "\udcfe", ".x", "__MACOSX", "y.png", "\x1b[31m"]


def _tree(r: Random) -> dict[str, Any]:
    """Paths and what is there: a file's bytes, or where a link leads."""
    tree: dict[str, Any] = {}
    splits = r.choice([("",), ("",), ("train/", "val/", "test/")])
    for split in splits:
        for c in range(5 if len(splits) == 1 else 1):
            for i in range(2):
                tree[f"{split}{split[:1]}{c}/{i}.png"] = image_bytes(r) if r.randint(0, 5) == 0 else IMAGES[i]
    for _ in range(r.randint(0, 3)):
        folder = "/".join(r.choices(_FOLDER_NAMES, k=r.randint(0, 4)))
        path = f"{folder}/{r.choice(_FILE_NAMES)}".lstrip("/")
        links = [".", "..", "../../canary", "nowhere", "/dev", "/dev/zero", "/proc/self", "0.png"]
        tree[path] = r.choice([image_bytes(r), r.choice(links)])
    return tree


def _plant(tree: dict[str, Any]) -> None:
    Path("data").mkdir()
    for name, content in tree.items():
        path = Path("data", name)
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError, OSError):
            if isinstance(content, bytes) or path.parent.resolve().is_relative_to(Path.cwd()):
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, str):
                    path.symlink_to(content)
                elif path.parent.resolve().is_relative_to(Path.cwd()) and not path.is_symlink():
                    path.write_bytes(content)


def _folder_case(r: Random) -> tuple[dict[str, Any], dict[str, Any]]:
    options = {"size": r.choice([1, 4, 8]), "channels": r.choice([1, 3]), "skip_broken": r.random() < 0.5}
    options |= r.choice([{}, {"invert": True}, {"at_least": 2}, {"at_least": 3}, {"seed": 2**63}, {"seed": -1}])
    return _tree(r), options


def _read_folder(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    tree, options = case
    _plant(tree)
    image_folder("data", cache="cache", **options)


_OMNIGLOT = {"images_background": 3, "images_evaluation": 2}


def _omniglot_names(part: str) -> list[str]:
    return [f"{part}/{part[7:]}_{c % 2}/character{c:02d}/{i}.png" for c in range(_OMNIGLOT[part]) for i in range(2)]


@contextlib.contextmanager
def _small_omniglot() -> Iterator[None]:
    """Omniglot with five characters of two drawings each."""
    module = sys.modules["innerloop.data.omniglot"]  # innerloop.data has a function of that name
    with (
        mock.patch.object(module, "PARTS", {part: (n, "") for part, n in _OMNIGLOT.items()}),
        mock.patch.object(module, "DRAWINGS", 2),
        mock.patch.object(module, "PAPER_CLASSES", {"train": 3, "val": 1, "test": 1}),
        mock.patch.object(module, "BACKGROUND_VAL", 1),
    ):
        yield


def _omniglot_case(r: Random) -> tuple[bytes, bytes, str, bool]:
    background, evaluation = (zip_bytes(r, _omniglot_names(part)) for part in _OMNIGLOT)
    return background, evaluation, r.choice(["paper", "background"]), r.random() < 0.5


def _read_omniglot(case: tuple[bytes, bytes, str, bool]) -> None:
    background, evaluation, split, skip_broken = case
    _write("data/images_background.zip", background)
    _write("data/images_evaluation.zip", evaluation)
    omniglot("data", size=4, split=split, skip_broken=skip_broken, cache=False)  # type: ignore[arg-type]


def _read_pickles(case: tuple[bytes, bool]) -> None:
    data, other = case
    names = [f"mini-imagenet-cache-{split}.pkl" for split in ("train", "val", "test")]
    if other:
        names = [f"miniImageNet_category_split_{split}.pickle" for split in ("train_phase_train", "val", "test")]
    for name in names:
        _write(f"data/{name}", data)
    mini_imagenet("data", size=4, cache=False)


_CSV = "filename,label\nn01.png,n01\nn02.png,n02\n"


def _csv_bytes(r: Random) -> bytes:
    names = ["n01.png", "n02.png", "n03.png", "../n01.png", "/etc/passwd", "~", "..", ".", "", "n01.png\0", "x" * 300]
    rows = [
        (r.choice(names[:3] if r.random() < 0.8 else names), r.choice(["n01", "n02", *TEXTS]))
        for _ in range(r.randint(0, 4))
    ]
    quote = r.choice(["", "", '"'])
    text = "filename,label\n" + "".join(f"{quote}{n}{quote},{quote}{label}{quote}\n" for n, label in rows)
    data = (text if (r.random() < 0.5) else _CSV).encode(r.choice(["utf-8", "utf-8-sig", "utf-16"]), "replace")
    return mutated(data, r) if r.random() < 0.5 else data


def _csv_case(r: Random) -> tuple[list[bytes], bytes, bool]:
    tables = [_CSV.encode()] * 3
    for i in r.sample(range(3), r.choice([0, 1, 1, 1, 2])):
        tables[i] = _csv_bytes(r)
    return tables, image_bytes(r), r.random() < 0.5


def _read_csv(case: tuple[list[bytes], bytes, bool]) -> None:
    tables, image, skip_broken = case
    for name in ("n01.png", "n02.png", "n03.png"):
        _write(f"data/images/{name}", IMAGES[4])
    _write("data/images/n02.png", image)
    for split, table in zip(("train", "val", "test"), tables, strict=True):
        _write(f"data/{split}.csv", table)
    mini_imagenet("data", size=4, skip_broken=skip_broken, cache=False)


@functools.cache
def _cached_images() -> ClassImages:
    return ClassImages(torch.arange(4 * 9, dtype=torch.uint8).view(4, 1, 3, 3), (2, 2), ("a", "b"))


def _images_checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _cache_bytes(r: Random) -> bytes:
    images = _cached_images().images
    tensors: Tensors = other_tensors(r, of_torch({"images": images}))
    data = tensors.get("images", ("U8", [], b""))[2]
    described = changed(r, {"sizes": [2, 2], "names": ["a", "b"], "checksum": _images_checksum(data)})
    header = json_bytes(described, r).decode(errors="surrogateescape")
    file = safetensors_file(tensors, changed(r, {"innerloop": header}, 1), lambda h: h)
    return mutated(file, r) if r.random() < 0.4 else file


def _read_cache(case: bytes) -> None:
    name = f"strokes-{'0' * 32}.safetensors"
    _write(f"cache/{name}", case)
    found = load_cached("cache", "strokes", "0" * 32)
    if found is not None:  # then it is a data set
        assert len(found.select(range(len(found.names))).images) == sum(found.sizes) == len(found.images)
        store_cached("cache", "strokes", "1" * 32, found)


# --- runs: checkpoints and metrics ------------------------------------------------------------------------------------


@functools.cache
def _learner_tensors() -> Tensors:
    return of_torch(build_learner(FOLDER_CONFIG, torch.device("cpu")).state_dict())


@functools.cache
def _checkpoint() -> tuple[Tensors, dict[str, str]]:
    """A checkpoint as this version writes it."""
    learner = build_learner(FOLDER_CONFIG, torch.device("cpu"))
    state = {"epoch": 1, "val": 0.5, "seconds": 1.0, "best": [[0.5, 1]], "sums": {"iterations": 0}}
    path = Path("whole.safetensors")
    save_checkpoint(path, learner.state_dict(), state)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    path.unlink()
    return of_torch(learner.state_dict()), metadata


def _checkpoint_bytes(r: Random) -> bytes:
    tensors, metadata = _checkpoint()
    if r.random() < 0.5:
        tensors = other_tensors(r, tensors)
    state = json.loads(metadata["innerloop"])
    if r.random() < 0.5:
        state["version"] = 1  # which has no checksum: what was changed is not found out
    text = json_bytes(changed(r, state), r).decode(errors="surrogateescape")
    header: Any = {**metadata, "innerloop": text if (r.random() < 0.5) else metadata["innerloop"]}
    change = r.choice([0, 0, 0, 1])
    header = changed(r, header, 1) if change else header
    whole = safetensors_file(tensors, header)
    if r.randint(0, 4) == 0:
        size = int.from_bytes(whole[:8], "little")
        other = json.dumps(changed(r, json.loads(whole[8 : 8 + size]))).encode()
        whole = len(other).to_bytes(8, "little") + other + whole[8 + size :]
    return mutated(whole, r) if r.random() < 0.3 else whole


def _read_checkpoint(case: bytes) -> None:
    _write("run/checkpoints/latest.safetensors", case)
    tensors, state = load_checkpoint(RunFolder(Path("run")).latest)
    assert isinstance(state, dict)
    assert all(t.device.type == "cpu" for t in tensors.values())


@functools.cache
def _state() -> tuple[Tensors, dict[str, Any]]:
    """What a run saves to go on from, and nothing of a checksum: a stranger can make that fit."""
    learner = build_learner(FOLDER_CONFIG, torch.device("cpu"))
    tensors = {f"learner/{name}": t for name, t in learner.state_dict().items()}
    for i, parameter in enumerate(learner.parameters()):
        tensors |= {f"optimizer/{i}/{slot}": torch.zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")}
        tensors[f"optimizer/{i}/step"] = torch.tensor(1.0)
    return of_torch({**tensors, "random/cpu": torch.get_rng_state()}), asdict(Progression(best=[(0.5, 1)]))


def _state_bytes(r: Random) -> bytes:
    tensors, state = _state()
    if r.random() < 0.5:
        tensors = other_tensors(r, tensors)
    state = changed(r, state, 2)
    if isinstance(state, dict):
        state["version"] = 1
    whole = safetensors_file(tensors, {"innerloop": json.dumps(state)})
    return mutated(whole, r) if r.random() < 0.1 else whole


def _resume_case(r: Random) -> tuple[bytes, bytes | None]:
    return _state_bytes(r), _state_bytes(r) if r.random() < 0.3 else None


def _resume(case: tuple[bytes, bytes | None]) -> None:
    """Training, going on from a state."""
    latest, previous = case
    folder = RunFolder(Path("run"))
    folder.create("quickstart", FOLDER_CONFIG)
    _write(str(folder.latest), latest)
    if previous is not None:
        _write(str(folder.previous), previous)
    learner = build_learner(FOLDER_CONFIG, torch.device("cpu"))
    optimizer = torch.optim.Adam(learner.parameters())
    workers: Any = SimpleNamespace(learner=learner)
    training = _Training(folder, FOLDER_CONFIG, workers, optimizer, Progress(shown=False), [], ALONE)
    with contextlib.redirect_stderr(io.StringIO()):
        training.resume()
    for parameter in learner.parameters():  # what it took over, it can go on with
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with contextlib.suppress(CheckpointError):  # there are no checkpoints of epochs here
        best_epochs(folder)


@functools.cache
def _small_support() -> dict[str, list[bytes]]:
    return {"a": [IMAGES[1]], "b": [IMAGES[0]]}


def _adapt(case: tuple[bytes, bytes]) -> None:
    """A stranger's run, adapted to two images."""
    config, checkpoint = case
    _write("run/config.json", config)
    _write("run/checkpoints/epoch-0001.safetensors", checkpoint)
    trained = load("run")
    trained.adapt(_small_support(), steps=1)  # type: ignore[arg-type]


def _stranger_config(r: Random) -> bytes:
    small = {"version": 1, "preset": "quickstart", "config": config_to_json(FOLDER_CONFIG)}
    if r.random() < 0.5:
        section = r.choice(["data", "network", "method"])
        name = r.choice(sorted(small["config"][section]))  # type: ignore[index]
        values = [0, 1, 3, 7, 1000, 10**5, 10**7, 10**9, 10**12, 1e300, "resnet12", "folder", ["*"], True, None]
        small["config"][section][name] = r.choice(values)  # type: ignore[index]
    return json.dumps(small).encode() if r.randint(0, 4) else json_bytes(changed(r, small), r)


_RECORD = {
    "epoch": 1,
    "iterations": 10,
    "outer_lr": 0.001,
    "derivative_order": 1,
    "loss_weights": [0.5, 0.5],
    "train_loss": 1.0,
    "train_accuracy": 0.5,
    "val_loss": 1.0,
    "val_accuracy": 0.5,
    "val_interval": 0.1,
    "val_tasks": 10,
    "val_losses_per_step": [1.0, 0.5, 0.4],
    "val_accuracies_per_step": [0.2, 0.5, 0.6],
    "gradient_norm_mean": 1.0,
    "gradient_norm_max": 2.0,
    "rates": {"head.weight": [0.1, 0.1]},
}


_SUMMARY = {
    "version": 1,
    "preset": "quickstart",
    "seed": 0,
    "epochs": 2,
    "test": {"best": {"batch": {"accuracy": 0.5}}},
}
_GRID = {"version": 1, "runs": [{"row": "maml", "title": "MAML", "seed": 0, "status": "diverged"}]}


def _metrics(r: Random) -> dict[str, bytes]:
    """Files of a run in a grid: what was recorded, and now and then the others."""
    lines = [json.dumps({**_RECORD, "epoch": i + 1}).encode() for i in range(2)]
    if r.random() < 0.9:
        lines[r.randrange(2)] = json_bytes(changed(r, _RECORD), r)
    data = b"\n".join(lines) + b"\n"
    run = "grid/maml/seed-0"
    files = {f"{run}/metrics.jsonl": mutated(data, r) if r.random() < 0.3 else data}
    others = {f"{run}/config.json": r.choice(_CONFIGS), f"{run}/summary.json": _SUMMARY, "grid/grid.json": _GRID}
    return files | {n: json_bytes(changed(r, d), r) for n, d in others.items() if r.random() < 0.3}


def _read_metrics(case: dict[str, bytes]) -> None:
    for name, data in case.items():
        _write(name, data)
    run = read_run(Path("grid/maml/seed-0"))
    _ = run.is_classification, run.ways, run.initial_inner_lr, run.derivative_switches, run.msl_end


# --- classifiers ------------------------------------------------------------------------------------------------------


@functools.cache
def _classifier() -> Classifier:
    folder = RunFolder(Path("trained"))
    folder.create("quickstart", FOLDER_CONFIG)
    learner = build_learner(FOLDER_CONFIG, torch.device("cpu"))
    save_checkpoint(folder.epoch_checkpoint(1), learner.state_dict(), {"epoch": 1, "val": 0.5})
    return load(folder.path).adapt(_small_support(), steps=1)  # type: ignore[arg-type]


@functools.cache
def _model() -> tuple[Tensors, dict[str, Any]]:
    classifier = _classifier()
    return of_torch(classifier.network.state_dict()), {"version": 1, **classifier.description()}


def _model_file(tensors: Tensors, description: str) -> bytes:
    """A classifier's file whose checksum fits, whatever is in it."""
    kinds = {"F32": np.float32, "I64": np.int64, "U8": np.uint8, "F64": np.float64, "I8": np.int8, "F16": np.float16}
    try:
        values = {
            name: torch.from_numpy(np.frombuffer(data, kinds[kind]).reshape(shape).copy())
            for name, (kind, shape, data) in tensors.items()
        }
        checksum = model_file._checksum(values, description)
    except (KeyError, ValueError, UnicodeEncodeError):
        checksum = "0"
    return safetensors_file(tensors, {"innerloop_classifier": description, "checksum": checksum})


def _model_bytes(r: Random) -> bytes:
    tensors, description = _model()
    if r.random() < 0.5:
        tensors = other_tensors(r, tensors)
    document = changed(r, description)
    if r.randint(0, 2) == 0 and isinstance(document, dict):
        section = r.choice(["preprocessing", "network"])
        changes = {
            "size": [1, 15, 16, 10**4, 10**5, 10**9, 2**63],
            "channels": [0, 2, 3, 10**9],
            "mean": [[], [0.5], [0.1, 0.2], [1e308]],
            "std": [[0.0], [1e-320], [-1.0]],
            "fit": ["crop", "stretch"],
            "network": ["resnet12", "mlp", "conv4"],
            "filters": [1, 3, 10**5, 10**9, 2**62],
            "strided": [True],
        }
        name = r.choice(sorted(changes))
        if isinstance(document.get(section), dict):
            document[section] = {**document[section], name: r.choice(changes[name])}
    text = json_bytes(document, r) if r.random() < 0.3 else json.dumps(document).encode()
    whole = _model_file(tensors, text.decode(errors="surrogateescape"))
    if r.random() < 0.05:
        size = int.from_bytes(whole[:8], "little")
        other = json.dumps(changed(r, json.loads(whole[8 : 8 + size]))).encode()
        whole = len(other).to_bytes(8, "little") + other + whole[8 + size :]
    return mutated(whole, r) if r.random() < 0.2 else whole


def _read_model(case: tuple[bytes, bytes]) -> None:
    data, image = case
    _write("model.safetensors", data)
    classifier = Classifier.load("model.safetensors")
    list(classifier.stream([image, IMAGES[0]], threads=1))
    classifier.save("again.safetensors")
    Classifier.load("again.safetensors")


# --- the command line -------------------------------------------------------------------------------------------------


class _Edge(ValueError):
    """Where the long work would begin."""


def _stop(*_: Any, **__: Any) -> Any:
    raise _Edge("the long work would begin here")


@contextlib.contextmanager
def _no_long_work() -> Iterator[None]:
    """Everything up to the long work is real: arguments, configs, devices, the network and its learner, small files."""
    Image.init()
    for name in COMMANDS:  # imported before anything is watched
        importlib.import_module(f"innerloop.cli.{name}")
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("innerloop.serve")
    _import_compiler()
    _trained()
    with contextlib.ExitStack() as stack:
        for name in (
            "innerloop.training.trainer.build_workers",
            "innerloop.training.trainer.RunFolder.create",
            "innerloop.cli.train.launch",
            "innerloop.cli.evaluate.launch",
            "innerloop.cli.evaluate.build_tasks",
            "innerloop.cli.ablate.build_tasks",
            "innerloop.cli.ablate.run_grid",
            "innerloop.cli.bench.measure",
            "innerloop.cli.report.write_report",
            "innerloop.cli.serve._listening",
            "innerloop.classify.export.export",
        ):
            stack.enter_context(mock.patch(name, _stop))
        stack.enter_context(mock.patch("innerloop.training.trainer.build_tasks", return_value=None))
        stack.enter_context(
            mock.patch("innerloop.training.trainer._compiled_or_not", lambda config, learner, *_: (config, learner))
        )
        stack.enter_context(
            mock.patch.dict(os.environ, {"INNERLOOP_CACHE": "cache", "INNERLOOP_DATA": "data", "COLUMNS": "80"})
        )
        yield


def _options(kind: type) -> dict[str, Any]:
    """Names and types of a dataclass's options, those of the dataclasses in it among them."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if name.startswith("__"):
            continue
        if hasattr(hint, "__dataclass_fields__"):
            found |= _options(hint)
        else:
            found[name] = hint
    return found


@functools.cache
def _flags(command: str) -> list[tuple[str, list[str]]]:
    """Options of a command, each with values that could be right."""
    if command == "presets":
        return []
    module = __import__(f"innerloop.cli.{command}", fromlist=["run"])
    kinds = [getattr(module, f"{command.capitalize()}Arguments")]
    kinds += [Config] if command in ("train", "ablate") else []
    found = []
    for kind in kinds:
        for name, hint in _options(kind).items():
            values = [str(a) for a in get_args(hint) if isinstance(a, str | int)]
            found.append((f"--{name.replace('_', '-')}", values or ["1", "2", "0.5", "a", "True", "trained", "cpu"]))
            if hint is bool:
                found.append((f"--no-{name.replace('_', '-')}", [""]))
    return found


_WORDS = [
    *(t for t in TEXTS if "\x00" not in t and len(t) < 400 and not t.startswith(("/", "~", ".."))),
    *(str(n) for n in NUMBERS if not isinstance(n, int) or abs(n) < 10**40),
    *(
        "-",
        "--",
        "-h",
        "--help",
        "--version",
        "--resume",
        "--out",
        "out",
        "trained",
        "my.safetensors",
        "classes",
        "None",
    ),
    *(
        "cuda:99",
        "meta",
        "cuda",
        "mps",
        "xla",
        "conv4",
        "1e9999",
        "1_000",
        "１",
        "0x10",
        "-1",
        "+5",
        "3.",
        "=",
        "--=",
        "@file",
    ),
    *PRESETS,
    *GRIDS,
    *METHODS,
]


def _word(r: Random) -> str:
    if r.random() < 0.8:
        return r.choice(_WORDS)
    return "".join(chr(r.choice([r.randint(32, 126), r.randint(160, 0x2FFF), 0x1F98B])) for _ in range(3)).translate(
        _NO_PATH
    )


_NO_PATH = str.maketrans("/~.", "___")

_POSITIONALS = {
    "train": [["quickstart"], ["sinusoid"], [], ["omniglot-20way-1shot"]],
    "evaluate": [["trained"], []],
    "ablate": [["ablation"], ["steps"], []],
    "presets": [[]],
    "adapt": [["trained", "classes", "--out", "new.safetensors"], ["trained", "classes"]],
    "predict": [["my.safetensors", "classes"], ["my.safetensors", "classes/a/0.png", "classes/b"], ["my.safetensors"]],
    "export": [["my.safetensors", "--out", "new.onnx", "--onnx"], ["my.safetensors", "--out", "new.pt"]],
    "bench": [["omniglot-maml"], []],
}


def _command(r: Random) -> list[str]:
    # Those with the most options take longest: a parser is built for every call.
    command = r.choice([*COMMANDS, "evaluate", "adapt", "predict", "predict", "export", "bench"])
    words = list(r.choice(_POSITIONALS.get(command, [[], ["trained"]])))
    flags = _flags(command)
    for _ in range(r.randint(0, 4)):
        if flags and r.randint(0, 9):
            flag, values = r.choice(flags)
            words.append(flag)
            if r.randint(0, 9):
                words += [v for v in [r.choice([*values, _word(r)])] if v or (r.random() < 0.5)]
        else:
            words.insert(r.randint(0, len(words)), _word(r))
    if r.randint(0, 5) == 0 and words:
        r.shuffle(words)
    return [command, *words] if r.randint(0, 30) else words


@functools.cache
def _trained() -> dict[str, bytes]:
    """A run, a classifier and some images, as files."""
    learner = build_learner(FOLDER_CONFIG, torch.device("cpu"))
    folder = RunFolder(Path("made"))
    folder.create("quickstart", FOLDER_CONFIG)
    state = {"epoch": 1, "val": 0.5}
    save_checkpoint(folder.epoch_checkpoint(1), learner.state_dict(), state)
    save_checkpoint(folder.latest, learner.state_dict(), {**state, "best": [[0.5, 1]], "seconds": 1.0})
    _classifier().save("made/my.safetensors")
    files = {str(p.relative_to("made")): p.read_bytes() for p in Path("made").rglob("*") if p.is_file()}
    model = {"my.safetensors": files.pop("my.safetensors")}
    images = {f"classes/{c}/{i}.png": IMAGES[i] for c in "ab" for i in range(2)}
    return {**{f"trained/{name}": data for name, data in files.items()}, **model, **images}


def _call(case: list[str]) -> None:
    for name, data in _trained().items():
        _write(name, data)
    output, errors = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code: Any = command_line.main(case)
        except SystemExit as stop:
            code = stop.code if stop.code is not None else 0
    torch.set_num_threads(threads)
    assert isinstance(code, int), f"exit code {code!r}"
    assert code in (0, 1, 2, 3, 4, 130, 128 + signal.SIGTERM), f"exit code {code}"
    assert "Traceback" not in output.getvalue() + errors.getvalue()
    if code not in (0, 1):
        assert output.getvalue().strip() or errors.getvalue().strip(), "a refusal without a word"


# --- all --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _warm() -> Iterator[None]:
    """Imports and files that cases share, made before anything is watched."""
    Image.init()
    _checkpoint()
    _classifier()
    _model()
    _state()
    _import_compiler()
    yield


def _import_compiler() -> None:
    """PyTorch's first optimiser imports its compiler, which makes code."""
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])


def _cases(generate: Callable[[Random], Any]) -> st.SearchStrategy[Any]:
    return st.randoms(use_true_random=True).map(generate)


def targets() -> list[Target]:
    """Every target; ``prepare`` runs in the folder of the cases, which is emptied before each."""
    return [
        Target("config", _cases(_config_file), _read_config, (ConfigError,)),
        Target("image folder", _cases(_folder_case), _read_folder, prepare=_warm),
        Target("omniglot zips", _cases(_omniglot_case), _read_omniglot, prepare=_small_omniglot),
        Target("mini-imagenet pickles", _cases(lambda r: (pickle_bytes(r), r.random() < 0.5)), _read_pickles),
        Target("mini-imagenet csv", _cases(_csv_case), _read_csv),
        Target("decoded cache", _cases(_cache_bytes), _read_cache, ()),
        Target("checkpoint", _cases(_checkpoint_bytes), _read_checkpoint, (CheckpointError,), _warm),
        Target("resume", _cases(_resume_case), _resume, prepare=_warm),
        Target("run", _cases(lambda r: (_stranger_config(r), _checkpoint_bytes(r))), _adapt, prepare=_warm),
        Target("classifier", _cases(lambda r: (_model_bytes(r), image_bytes(r))), _read_model, prepare=_warm),
        Target("metrics", _cases(_metrics), _read_metrics),
        Target("command line", _cases(_command), _call, (), _no_long_work),
    ]
