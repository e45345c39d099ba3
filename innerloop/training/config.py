"""What a training run is: every hyperparameter, with its default and its meaning."""

from __future__ import annotations

import json
import reprlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from innerloop.data.images import MAX_SIZE
from innerloop.learner import Compile
from innerloop.methods import MAX_RATE, METHODS, Method

# More than anybody needs of anything; a config from a stranger could ask for more than there is of memory and time.
MOST = 2**53
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Steps = Annotated[int, Field(ge=0, le=10_000)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Precision = Literal["float32", "tf32", "bf16"]
Rate = Annotated[float, Field(gt=0, le=MAX_RATE)]


MESSAGE = 2000
"""Characters of a message that quotes what it was given, at most."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what to change."""


@dataclass(frozen=True)
class DataConfig:
    """Where tasks come from and what a task is."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dataset: Literal["strokes", "omniglot", "mini-imagenet", "folder", "sinusoid"] = "strokes"
    """strokes and sinusoid are made here; the others are read from --data."""
    data: Path | None = None
    """Folder of the data set (omniglot: also the folder of its two zips)."""
    download: bool = False
    """Download Omniglot if it is not there yet."""
    ways: Positive = 5
    """N, classes in a task."""
    shots: Positive = 1
    """K-shot: support images of each class (sinusoid: support points)."""
    queries: Positive = 1
    """Query images of each class (sinusoid: query points)."""
    image_size: Annotated[int, Field(ge=1, le=MAX_SIZE)] = 28
    """Height and width that images are resized to."""
    channels: Literal[1, 3] = 1
    """1: grey, 3: colour. (omniglot and strokes are grey, mini-imagenet is colour.)"""
    rotations: bool = False
    """In training, turn every sampled class by a random multiple of 90 degrees: rotated characters are new classes."""
    split: Literal["paper", "background"] = "paper"
    """Omniglot's classes: shuffled 1150/50/423 (paper), or the public background and evaluation alphabets."""
    train_classes: Positive = 1000
    """Training classes of strokes, which are endless."""
    ratios: tuple[Share, Share, Share] = (0.6, 0.2, 0.2)
    """Shares of a folder's classes for training, validation and test, where it has no train, val and test folders."""
    invert: bool = False
    """A folder's images are dark ink on a light page: turn them over, so that ink is bright."""
    bits: Annotated[int, Field(ge=0, le=16)] = 0
    """Bits that values of 16-bit images use, such as 12 (0: found over all images of the data set, and recorded)."""
    centre: bool = False
    """Drawings are cut to their ink and laid in the middle at one size, wherever and however large they were drawn."""
    splits_dir: Path | None = None
    """Folder of mini-ImageNet's train.csv, val.csv and test.csv, where they do not lie with the images."""
    skip_broken: bool = False
    """Go on without images that cannot be read."""


@dataclass(frozen=True)
class NetworkConfig:
    """The model."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    network: Literal["conv4", "resnet12", "mlp"] = "conv4"
    """conv4 and resnet12 take images, mlp takes sinusoid points."""
    filters: Positive = 64
    """Filters of conv4's convolutions; the first block's width of resnet12."""
    strided: bool = False
    """conv4 with stride-2 convolutions and global average pooling in place of max-pooling."""


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    meta_batch: Positive = 8
    """Tasks in a meta-batch."""
    epochs: Positive = 100
    """Epochs; validation and a checkpoint follow each."""
    iterations: Positive = 500
    """Outer updates in an epoch."""
    outer_lr: Rate = 1e-3
    """beta, rate of the outer Adam; where cosine annealing (--ca) starts."""
    outer_lr_min: Annotated[float, Field(ge=0, le=MAX_RATE)] = 1e-5
    """Where cosine annealing ends."""
    clip: Annotated[float, Field(ge=0, le=MAX_RATE)] = 0.0
    """Clamp every element of the meta-gradient to +-clip (0: do not)."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """At a NaN or infinite loss or meta-gradient: stop; skip the update; or go back to the epoch's start with half
    the outer rate."""
    max_skips: Positive = 10
    """Updates skipped in a row before the run stops after all."""
    max_rollbacks: Positive = 5
    """Times a run goes back before it stops after all."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation after each epoch and the test at the end."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    val_tasks: Positive = 600
    """Validation tasks, the same ones after every epoch."""
    test_tasks: Positive = 600
    """Test tasks at the end, from classes held out of training."""
    test_steps: Steps = 0
    """Inner steps in validation and test (0: as many as in training)."""
    ensemble: Positive = 5
    """How many of the epochs best on validation are kept and averaged."""


@dataclass(frozen=True)
class ComputeConfig:
    """Where and how it is computed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    seed: Count = 0
    """Seed of the initialisation, the class split and all tasks."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    threads: Threads = 0
    """CPU threads of each process (0: the cores shared out over the processes)."""
    processes: Threads = 0
    """Processes that the tasks of a meta-batch are shared out to, on a CPU (0: one for each core that helps)."""
    mode: Literal["auto", "reverse", "mixed", "first-order"] = "auto"
    """How meta-gradients are computed: reverse and mixed are exact and agree, mixed needs less memory at many steps."""
    stored_steps: Steps = 5
    """Inner steps whose graphs mixed mode keeps; fewer take less memory and, at 0, a fifth more arithmetic."""
    precision: Precision = "float32"
    """Of convolutions; tf32 (a GPU's, and of matrix products too) and bf16 are faster and round more."""
    cuda_graph: bool = True
    """On a GPU, record the meta-gradient as a CUDA graph (not for networks with dropout)."""
    compile: Compile = "auto"
    """Compile the functions that an inner step repeats, by PyTorch's Inductor; auto: where that saves time."""
    compile_timeout: Positive = 300
    """Seconds that one of them may take to compile; they go on without after that."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: Method = field(default_factory=Method)
    outer: OuterConfig = field(default_factory=OuterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    @property
    def regression(self) -> bool:
        """Whether targets are numbers (mean squared error), not classes (cross-entropy and accuracy)."""
        return self.data.dataset == "sinusoid"

    @property
    def test_steps(self) -> int:
        """Inner steps in validation and test."""
        return self.evaluation.test_steps or self.method.inner_steps


_ADAPTER = TypeAdapter(Config)


def validated(config: Config) -> Config:
    """``config`` with every value checked.

    Raises:
        ConfigError: a value is of the wrong type or out of range, or values do not fit each other.
    """
    return config_from_json(config_to_json(config))


def problems(error: ValidationError) -> str:
    """What pydantic found wrong, by the names of the command line's options, values quoted."""
    found = [
        f"--{str(e['loc'][-1]).replace('_', '-') if e['loc'] else 'config'} {_QUOTED.repr(e['input'])}: {e['msg']}"
        for e in error.errors()
    ]
    return "; ".join(found)[:MESSAGE]


_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = 200


def config_to_json(config: Config) -> dict[str, Any]:
    """Plain JSON values of a config."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return values


def config_from_json(values: dict[str, Any]) -> Config:
    """The config that ``config_to_json`` wrote.

    Raises:
        ConfigError: it is not a config of this version.
    """
    try:
        config = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ConfigError(problems(error)) from None
    if config.regression != (config.network.network == "mlp"):
        raise ConfigError(
            f"--dataset {config.data.dataset} and --network {config.network.network} do not fit: "
            "sinusoid points need mlp, and images conv4 or resnet12"
        )
    if config.data.dataset in ("strokes", "omniglot") and config.data.channels != 1:
        raise ConfigError(f"--dataset {config.data.dataset} has grey images: --channels 1, not {config.data.channels}")
    if config.data.dataset == "mini-imagenet" and config.data.channels != 3:
        raise ConfigError("--dataset mini-imagenet has colour images: --channels 3, not 1")
    if 0 < config.data.bits < 8:
        raise ConfigError(f"--bits {config.data.bits}: values of 16-bit images use 8 to 16 bits; 0 finds how many")
    if config.data.bits and config.data.dataset not in ("folder", "mini-imagenet"):
        raise ConfigError(f"--bits is for 16-bit images, and --dataset {config.data.dataset} has none")
    if config.data.centre and config.data.dataset in ("mini-imagenet", "sinusoid"):
        raise ConfigError(f"--centre is for drawings, and --dataset {config.data.dataset} has none")
    return config


@dataclass(frozen=True)
class Preset:
    """A named experiment: settings that differ from the defaults, and the method that it runs by default."""

    about: str
    method: str = "maml_plus_plus"
    method_settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    outer: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    def config(self, method: str | None = None) -> Config:
        """The preset's config, with another method of ``METHODS`` if one is named."""
        base = Config(method=METHODS[method or self.method](**self.method_settings))
        return replace(
            base,
            data=replace(base.data, **self.data),
            network=replace(base.network, **self.network),
            outer=replace(base.outer, **self.outer),
            evaluation=replace(base.evaluation, **self.evaluation),
        )


def _omniglot(ways: int, shots: int) -> Preset:
    return Preset(
        about=f"Omniglot {ways}-way {shots}-shot, the paper's full schedule (50,000 iterations)",
        data={"dataset": "omniglot", "ways": ways, "shots": shots, "rotations": True},
    )


def _mini_imagenet(shots: int) -> Preset:
    return Preset(
        about=f"mini-ImageNet 5-way {shots}-shot, the paper's full schedule (50,000 iterations)",
        method_settings={"inner_lr": 0.01, "msl_epochs": 15},
        data={
            "dataset": "mini-imagenet",
            "ways": 5,
            "shots": shots,
            "queries": 15,
            "image_size": 84,
            "channels": 3,
        },
        network={"filters": 48},
        outer={"meta_batch": 2, "clip": 10.0},
    )


def _improved(ways: int, meta_batch: int, **evaluation: int) -> Preset:
    """The recipe that does best in the recorded grid ``recipe``, for half as many updates again."""
    return Preset(
        about=f"Omniglot {ways}-way 1-shot, 1,200 updates with a head of zeros and centred drawings",
        method_settings={"msl_epochs": 2, "da_epochs": 0, "zero_init": ("head.*",)},
        data={"dataset": "omniglot", "ways": ways, "rotations": True, "centre": True},
        network={"filters": 32},
        outer={"epochs": 20, "iterations": 60, "meta_batch": meta_batch, "outer_lr": 3e-3},
        evaluation=evaluation,
    )


PRESETS: dict[str, Preset] = {
    "quickstart": Preset(
        about="MAML++ on embedded strokes, 5-way 1-shot: no data needed, two to four minutes on two cores",
        # Few updates for its minutes: a head of zeros, centred drawings and second order throughout learn fastest.
        method_settings={"msl_epochs": 2, "da_epochs": 0, "inner_steps": 3, "zero_init": ("head.*",)},
        data={"queries": 3, "centre": True},
        network={"filters": 32},
        outer={"meta_batch": 2, "epochs": 6, "iterations": 120, "outer_lr": 3e-3},
        evaluation={"val_tasks": 100, "ensemble": 3},
    ),
    "strokes": Preset(
        about="the checkpoint that ships: MAML++ with a head of zeros on embedded strokes, 20-way 1-shot",
        method_settings={"msl_epochs": 2, "da_epochs": 15, "zero_init": ("head.*",)},
        data={"ways": 20, "rotations": True, "train_classes": 2000, "centre": True},
        network={"filters": 32},
        outer={"meta_batch": 2, "epochs": 20, "iterations": 60, "outer_lr": 2e-3},
        evaluation={"val_tasks": 30, "test_tasks": 200},
    ),
    "omniglot-5way-1shot": _omniglot(5, 1),
    "omniglot-5way-5shot": _omniglot(5, 5),
    "omniglot-20way-1shot": _omniglot(20, 1),
    "omniglot-20way-5shot": _omniglot(20, 5),
    "omniglot-5way-1shot-short": replace(
        _omniglot(5, 1),
        about="Omniglot 5-way 1-shot in under 40 minutes on two cores",
        method_settings={"msl_epochs": 6, "da_epochs": 19},
        outer={"epochs": 21, "iterations": 300, "outer_lr": 2e-3},
        evaluation={"val_tasks": 100},
    ),
    "omniglot-20way-1shot-short": replace(
        _omniglot(20, 1),
        about="Omniglot 20-way 1-shot, a short schedule to compare methods on two cores",
        method_settings={"msl_epochs": 3, "da_epochs": 8},
        outer={"epochs": 10, "iterations": 40, "meta_batch": 4},
        evaluation={"val_tasks": 50, "test_tasks": 200},
    ),
    "omniglot-20way-1shot-reduced": replace(
        _omniglot(20, 1),
        about="Omniglot 20-way 1-shot, 800 updates of 2 tasks with 32 filters: all rows of a table on two cores",
        # Epochs: the paper's shares of the schedule. At its outer rate, 1e-3, this few updates leave all rows at the
        # start of their curves, and those that lower the rate (CA) at the back.
        method_settings={"msl_epochs": 2, "da_epochs": 10},
        network={"filters": 32},
        outer={"epochs": 20, "iterations": 40, "meta_batch": 2, "outer_lr": 3e-3},
        evaluation={"val_tasks": 30, "test_tasks": 120},
    ),
    "omniglot-5way-1shot-improved": _improved(5, 8, val_tasks=50),
    "omniglot-20way-1shot-improved": _improved(20, 2, val_tasks=30, test_tasks=120),
    "mini-imagenet-5way-1shot": _mini_imagenet(1),
    "mini-imagenet-5way-5shot": _mini_imagenet(5),
    "folder": Preset(
        about="any folder of class folders, 5-way 1-shot",
        data={"dataset": "folder", "queries": 5, "image_size": 84, "channels": 3},
        method_settings={"inner_lr": 0.01, "msl_epochs": 15},
        outer={"meta_batch": 4, "clip": 10.0},
    ),
    "sinusoid": Preset(
        about="MAML's sinusoid regression, 10 points, 1 inner step in training and 10 at test",
        method="maml",
        method_settings={"inner_lr": 0.01, "inner_steps": 1},
        data={"dataset": "sinusoid", "shots": 10, "queries": 10, "ways": 1},
        network={"network": "mlp"},
        outer={"meta_batch": 25, "epochs": 20, "iterations": 500},
        evaluation={"test_steps": 10},
    ),
}
