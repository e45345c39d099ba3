"""A meta-trained run, ready to be adapted to a person's own classes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

import innerloop
from innerloop.classify import weighing as weighed
from innerloop.classify.classifier import Classifier, named
from innerloop.classify.estimate import Estimate, estimate, firsts, folds
from innerloop.classify.images import ImageLike, deep_value, image_name, read_image
from innerloop.classify.support import Support, SupportSource, read_support
from innerloop.classify.weighing import Weighing
from innerloop.data import Preprocessing
from innerloop.data.depth import misfit, misfits
from innerloop.data.preprocessing import Ink
from innerloop.learner import MetaLearner
from innerloop.norm_layers import Normalisation
from innerloop.tasks import Examples
from innerloop.training.building import build_learner, build_preprocessing
from innerloop.training.checkpoints import CheckpointError, load_checkpoint
from innerloop.training.config import ComputeConfig, Config, ConfigError, config_to_json
from innerloop.training.run_folder import RunFolder
from innerloop.update_rules import Tensors

PACKAGED = Path(innerloop.__file__).parent / "checkpoints" / "strokes"
"""The run that comes with the package: meta-trained on drawn strokes, for drawings of any kind."""

InkChoice = Literal["auto", "dark", "bright"]
"""The ink of a person's drawings, ``"auto"`` for what their support images show."""

logger = logging.getLogger(__name__)


def load(run: str | os.PathLike[str] | None = None) -> MetaTrained:
    """A meta-trained run, with its checkpoint best on validation; without an argument, the one that ships.

    >>> trained = innerloop.load("runs/my-run")                 # doctest: +SKIP
    >>> classifier = trained.adapt("my_classes/")               # doctest: +SKIP
    >>> classifier.predict(["a.png", "b.png"])                  # doctest: +SKIP

    Raises:
        ConfigError: it is not a run, a run of regression, or one without a finished epoch.
        CheckpointError: its checkpoint is damaged.
    """
    folder = RunFolder(PACKAGED if run is None else Path(run).expanduser())
    if run is not None and not folder.path.exists():
        raise ConfigError(f"there is no run at {str(folder.path)!r}; innerloop train makes one")
    preset, config = folder.read_config()
    if config.regression:
        raise ConfigError(
            f"{folder.path} is a run of regression ({config.data.dataset}), and a classifier needs one of images; "
            "see innerloop presets"
        )
    checkpoints = sorted((folder.path / "checkpoints").glob("epoch-*.safetensors"))
    loaded = [load_checkpoint(path) for path in checkpoints]
    if not loaded:
        raise ConfigError(f"{folder.path} has no finished epoch; go on: innerloop train --resume {folder.path}")
    for path, (_, header) in zip(checkpoints, loaded, strict=True):
        if not (isinstance(header.get("val"), int | float) and isinstance(header.get("epoch"), int)):
            raise CheckpointError(f"{path} does not say its epoch and how good it is: it is no epoch's checkpoint")
    state, header = max(loaded, key=lambda c: (c[1]["val"], c[1]["epoch"]))
    return MetaTrained(folder.path, preset, config, state, header["epoch"])


@dataclass(frozen=True, eq=False)
class MetaTrained:
    """A meta-trained network and how it is adapted. ``innerloop.load`` reads one from its run.

    Attributes:
        path: folder of the run.
        preset: that it was trained as.
        config: of the run.
        state: of the learner, after the epoch best on validation.
        epoch: which that is, counted from 1.
    """

    path: Path
    preset: str
    config: Config
    state: Tensors
    epoch: int

    @property
    def preprocessing(self) -> Preprocessing:
        """What its images go through; a classifier's may differ from it in ``invert``."""
        return build_preprocessing(self.config)

    @property
    def config_hash(self) -> str:
        """SHA-256 of the run's config."""
        return hashlib.sha256(json.dumps(config_to_json(self.config), sort_keys=True).encode()).hexdigest()

    @property
    def any_ways(self) -> bool:
        """Whether it can be adapted to any number of classes: its head starts from zeros in every task."""
        method = self.config.method
        zeros = all(any(fnmatchcase(n, p) for p in method.zero_init) for n in ("head.weight", "head.bias"))
        return zeros and not method.meta_sgd  # whose rates are as many as the head's weights

    def adapt(
        self,
        support: SupportSource,
        *,
        steps: int | None = None,
        normalisation: Normalisation = "support",
        ink: InkChoice = "auto",
        weighing: Weighing = "classes",
        bits: int | None = None,
        skip_broken: bool = False,
    ) -> Classifier:
        """A classifier of the classes of a support set.

        Args:
            support: a folder with a folder of images for each class, or images by class name. Classes may have
                different numbers of images.
            steps: inner steps; by default as many as in the run's test.
            normalisation: the statistics of the norm layers: ``"support"``: of the support set, ``"running"``: those
                kept in meta-training; an image's answer then is its own. ``"batch"``: of the images asked about
                together, as in the papers' figures.
            ink: of the support images, where the run is of drawings: ``"dark"`` on a light page, ``"bright"`` on a
                dark one. ``"auto"`` goes by what they show.
            weighing: what counts the same in the support loss and in ``Adaptation.estimate``: every class
                (``"classes"``), or every image (``"images"``), by which a class with many images wins.
            bits: that values of 16-bit images use; by default those of the run, or else of the support images.
            skip_broken: leave out images that cannot be read, with a logged warning.

        Raises:
            ConfigError: more classes than a run with a learned head was trained for.
            ValueError: the support set is none; see ``read_support``.
            BrokenImagesError: naming every image that cannot be read.
        """
        return self.adaptation(
            support,
            steps=steps,
            normalisation=normalisation,
            ink=ink,
            weighing=weighing,
            bits=bits,
            skip_broken=skip_broken,
        ).classifier

    def adaptation(
        self,
        support: SupportSource,
        *,
        steps: int | None = None,
        normalisation: Normalisation = "support",
        ink: InkChoice = "auto",
        weighing: Weighing = "classes",
        bits: int | None = None,
        skip_broken: bool = False,
    ) -> Adaptation:
        """The same with every inner step kept, to be watched. Arguments and errors as of ``adapt``."""
        if normalisation not in get_args(Normalisation):
            raise ValueError(
                f"normalisation must be one of {', '.join(get_args(Normalisation))}; got {normalisation!r}"
            )
        if ink not in ("auto", *get_args(Ink)):
            raise ValueError(f"ink must be auto, dark or bright; got {ink!r}")
        if weighing not in get_args(Weighing):
            raise ValueError(f"weighing must be one of {', '.join(get_args(Weighing))}; got {weighing!r}")
        if steps is not None and steps < 0:
            raise ValueError(f"steps must be 0 or more, got {steps}")
        as_they_are = replace(self.preprocessing, invert=False, bits=self.preprocessing.bits if bits is None else bits)
        read = read_support(support, as_they_are, skip_broken=skip_broken)
        preprocessing, notes = self._with_ink(read, ink)
        preprocessing = replace(preprocessing, bits=read.bits)
        learner = self.learner(len(read.classes), weighing)
        pixels = read.pixels.bitwise_not() if preprocessing.invert else read.pixels
        examples = Examples(preprocessing.inputs(pixels), read.targets)
        return Adaptation(
            self,
            learner,
            read,
            examples,
            preprocessing,
            normalisation,
            weighing,
            self.config.test_steps if steps is None else steps,
            (*read.notes, *notes, *weighed.note(read.shots, weighing)),
        )

    def learner(self, ways: int, weighing: Weighing = "classes") -> MetaLearner:
        """The meta-trained learner for a number of classes.

        A head that starts from zeros has one output a class. A learned one has as many as it was trained with, and its
        first ones are taken. The support loss is a mean over images, so that with fewer classes each image moves the
        fast weights further than the inner rates were learned for; it is scaled back to what it was.

        Raises:
            ConfigError: the head is learned, and has fewer outputs.
            CheckpointError: the run's checkpoint does not fit its config.
        """
        trained = self.config.data.ways
        if ways > trained and not self.any_ways:
            raise ConfigError(
                f"{self.path} was trained for {trained} classes, whose outputs are learned, and cannot tell {ways} "
                "apart. Take fewer classes, or a run trained with --zero-init 'head.*', which serves any number"
            )
        config = replace(
            self.config,
            data=replace(self.config.data, ways=ways),
            compute=ComputeConfig(),  # the run's own is that of the machine it was trained on
        )
        # A stranger's config may ask for more than its checkpoint holds, and than there is of memory: shapes first.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            own = build_learner(config, torch.device("meta")).state_dict()
        state = {name: _first_outputs(t, own.get(name)) for name, t in self.state.items()}
        for name in own.keys() | state.keys():
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise CheckpointError(f"the checkpoint of {self.path} does not fit its config.json: {name} differs")
            if own[name].dtype != state[name].dtype:
                raise CheckpointError(
                    f"the checkpoint of {self.path} has numbers of type {state[name].dtype} in {name}"
                )
        scale = min(1.0, ways / trained)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return scale * weighed.cross_entropy(logits, targets, weighing)

        # Weights are drawn and then replaced: not at the cost of a caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            learner = build_learner(config, torch.device("cpu"), loss)
        learner.load_state_dict(state)
        return learner

    def _with_ink(self, support: Support, ink: InkChoice) -> tuple[Preprocessing, list[str]]:
        """The preprocessing that shows the network ink as it knows it, and what is to be said about that."""
        preprocessing = self.preprocessing
        if preprocessing.ink is None:
            if ink != "auto":
                raise ValueError(
                    f"ink {ink!r}: this run does not know drawings from photographs. Leave it at auto, which takes "
                    "images as they are"
                )
            return preprocessing, []
        found = support.ink if ink == "auto" else ink
        if found is None:
            return preprocessing, [
                "the support images do not agree on what is page and what is ink; they are "
                + ("turned over, as dark ink is" if preprocessing.invert else "taken for bright ink on a dark page")
            ]
        invert = found != preprocessing.ink
        notes = [f"the images are {found} ink, and are turned over: this run knows {preprocessing.ink} ink"]
        return replace(preprocessing, invert=invert), notes if invert else []


def _first_outputs(trained: Tensor, own: Tensor | None) -> Tensor:
    """A trained tensor's first entries, where this learner has fewer outputs than were trained."""
    if own is None or trained.shape == own.shape or trained.shape[1:] != own.shape[1:] or not trained.dim():
        return trained  # what does not fit is an error of load_state_dict's
    return trained[: len(own)]


class DivergedError(ValueError):
    """Fast weights became NaN or infinite."""


@dataclass(frozen=True, eq=False)
class Adaptation:
    """An inner loop from the meta-trained network to a person's classifier, step by step.

    Attributes:
        trained: what was adapted.
        learner: for as many classes as there are.
        support: what it is adapted to.
        examples: the same as the network sees it.
        preprocessing: of the support's and of all other images.
        normalisation: the statistics of the norm layers.
        weighing: of the images, in the support loss and in all figures.
        steps: K, inner steps.
        notes: what a person may want to know.
    """

    trained: MetaTrained
    learner: MetaLearner
    support: Support
    examples: Examples
    preprocessing: Preprocessing
    normalisation: Normalisation
    weighing: Weighing
    steps: int
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the outputs."""
        return self.support.classes

    @cached_property
    def fast_weights(self) -> list[Tensors]:
        """theta^0 .. theta^K.

        Raises:
            DivergedError: they are not finite.
        """
        thetas: list[Tensors] = list(self.learner.trajectory(self.examples, self.steps))
        if not all(t.isfinite().all() for t in thetas[-1].values()):
            raise DivergedError(
                f"adapting diverged within {self.steps} inner steps; take fewer, or as many as in training "
                f"({self.learner.method.inner_steps})"
            )
        return thetas

    @cached_property
    def _support_logits(self) -> Tensor:
        return self._logits(self.examples.inputs)

    @property
    def support_losses(self) -> Tensor:
        """``[K + 1]``: mean cross-entropy of the support set after 0 .. K inner steps, weighed as it was adapted."""
        targets = self.examples.targets
        return torch.stack([weighed.cross_entropy(logits, targets, self.weighing) for logits in self._support_logits])

    @property
    def support_accuracies(self) -> Tensor:
        """``[K + 1]``: the fraction of the support set told right after 0 .. K inner steps, weighed in the same way."""
        return weighed.accuracy(self._support_logits.argmax(2), self.examples.targets, self.weighing)

    def probabilities(self, images: Iterable[ImageLike]) -> Tensor:
        """``[K + 1, n, ways]``: what images are taken for after 0 .. K inner steps.

        16-bit images that do not fit the bits in use are said in a logged warning.

        Raises:
            OSError, ValueError: an image cannot be read.
        """
        images, bits = list(images), self.preprocessing.bits
        other = [image_name(image, i) for i, image in enumerate(images, start=1) if misfit(deep_value(image), bits)]
        if other:
            logger.warning(misfits(named(other), bits))
        pixels = [read_image(image, self.preprocessing) for image in images]
        if not pixels:
            return torch.empty(self.steps + 1, 0, len(self.classes))
        return self._logits(self.preprocessing.inputs(torch.from_numpy(np.stack(pixels)))).softmax(2)

    def _logits(self, inputs: Tensor) -> Tensor:
        """``[K + 1, n, ways]``."""
        outputs: list[Tensor] = [
            self.learner.predict(theta, k, inputs, self.normalisation, support=self.examples.inputs)
            for k, theta in enumerate(self.fast_weights)
        ]
        return torch.stack(outputs)

    @cached_property
    def classifier(self) -> Classifier:
        """What the last inner step gives."""
        _ = self.fast_weights
        trained, shots = self.trained, self.support.shots
        return Classifier(
            network=self.learner.adapt(self.examples, self.steps, self.normalisation),
            classes=self.classes,
            preprocessing=self.preprocessing,
            architecture=trained.config.network,
            normalisation=self.normalisation,
            ink=self.support.ink,
            notes=self.notes,
            support={
                "images": sum(shots),
                "shots": list(shots),
                "steps": self.steps,
                **({} if min(shots) == max(shots) else {"weighing": self.weighing}),
            },
            provenance={
                "run": trained.path.resolve().name,
                "preset": trained.preset,
                "epoch": trained.epoch,
                "config_sha256": trained.config_hash,
                "innerloop": innerloop.__version__,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )

    @property
    def estimate_folds(self) -> int:
        """How many adaptations ``estimate`` makes."""
        targets = self.examples.targets
        return len(folds(targets[firsts(targets, self.support.same)]))

    def estimate(self, tick: Callable[[], None] = lambda: None) -> Estimate | None:
        """How good the classifier is, from the support set alone: images are held out in turn, see ``estimate``.

        None where a class has a single image, copies aside: without it there would be no such class. ``tick`` is
        called after each of ``estimate_folds`` adaptations.
        """
        inputs, targets = self.examples

        def predicted(kept: Tensor, held_out: Tensor) -> Tensor:
            network = self.learner.adapt((inputs[kept], targets[kept]), self.steps, self.normalisation)
            with torch.no_grad():
                logits: Tensor = network(inputs[held_out])
            classes: Tensor = logits.argmax(1)
            return classes

        return estimate(targets, predicted, tick, self.weighing, self.support.same)
