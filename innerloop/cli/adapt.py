"""``innerloop adapt``: a classifier of your own classes, from a meta-trained run and a few labelled images."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field
from rich.console import Console

from innerloop.classify import Adaptation, Estimate, load
from innerloop.classify.meta_trained import InkChoice
from innerloop.classify.weighing import Weighing
from innerloop.cli.arguments import check_out, parsed
from innerloop.norm_layers import Normalisation
from innerloop.training.config import Steps
from innerloop.training.progress import Progress


@dataclass(frozen=True)
class AdaptArguments:
    """Adapt a meta-trained run to your own classes, from a few images of each."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, made by innerloop train."""
    support: tyro.conf.Positional[Path]
    """Folder with a folder of images for each class. One image a class is enough; more are better."""
    out: Path
    """File to write the classifier to, such as my.safetensors."""
    steps: Steps | None = None
    """Inner steps. Default: as many as in the run's test."""
    normalisation: Normalisation = "support"
    """Statistics of the norm layers: of your images (support), of meta-training (running), or of each batch of images
    that is asked about together (batch), which then see each other."""
    ink: InkChoice = "auto"
    """Ink of your images, where the run is of drawings: dark on a light page, bright on a dark one, or as they show."""
    weighing: Weighing = "classes"
    """What counts the same where classes have different numbers of images: every class, or every image, by which a
    class with many wins. The estimate is weighed so too."""
    bits: Annotated[int, Field(ge=8, le=16)] | None = None
    """Bits that values of 16-bit images use, such as 12. Default: those of the run, or else of your images."""
    skip_broken: bool = False
    """Go on without images that cannot be read."""
    estimate: bool = True
    """Estimate the accuracy by adapting up to 20 times without some of the images."""
    overwrite: bool = False
    """Write over a file that is there already."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the result as JSON on standard output, and no progress."""


def run(arguments: Sequence[str]) -> int:
    """Adapt as the command line says."""
    chosen = parsed(AdaptArguments, arguments, "innerloop adapt")
    check_out(chosen.out, chosen.overwrite)
    progress = Progress(shown=not chosen.json)
    trained = load(chosen.run)
    with progress.waiting("reading the images and adapting"):
        adaptation = trained.adaptation(
            chosen.support,
            steps=chosen.steps,
            normalisation=chosen.normalisation,
            ink=chosen.ink,
            weighing=chosen.weighing,
            bits=chosen.bits,
            skip_broken=chosen.skip_broken,
        )
        classifier = adaptation.classifier
    estimate = None
    if chosen.estimate:
        with progress.task("estimating the accuracy", adaptation.estimate_folds) as bar:
            estimate = adaptation.estimate(bar.advance)
        classifier = classifier.with_estimate(estimate)
    classifier.save(chosen.out)
    losses, accuracies = adaptation.support_losses.tolist(), adaptation.support_accuracies.tolist()
    if chosen.json:
        steps = {"support_losses": losses, "support_accuracies": accuracies}
        print(json.dumps({"file": str(chosen.out), **steps, **classifier.description()}))
        return 0
    console = Console()
    lines = [
        *classifier.notes,
        f"{_classes(adaptation)}",
        f"after {adaptation.steps} inner steps: loss on these images {losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"told right {accuracies[0]:.0%} -> {accuracies[-1]:.0%}{_weighed(adaptation)}",
    ]
    lines += [_estimate(estimate, adaptation)] if chosen.estimate else []
    lines += [f"written: {chosen.out}. Use it: innerloop predict {shlex.quote(str(chosen.out))} IMAGES"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _classes(adaptation: Adaptation) -> str:
    shots = adaptation.support.shots
    named = ", ".join(f"{name} ({n})" for name, n in list(zip(adaptation.classes, shots, strict=True))[:20])
    more = f", ... and {len(shots) - 20} more" if len(shots) > 20 else ""
    return f"{len(shots)} classes, {sum(shots)} images: {named}{more}"


def _unequal(adaptation: Adaptation) -> bool:
    return len(set(adaptation.support.shots)) > 1


def _weighed(adaptation: Adaptation) -> str:
    """What the figures are means over, where it makes a difference."""
    return f" (means over {adaptation.weighing}, each counting the same)" if _unequal(adaptation) else ""


def _estimate(found: Estimate | None, adaptation: Adaptation) -> str:
    if found is None:
        return (
            "accuracy: a class with a single image gives no estimate; with two or more of each, no copies, there is one"
        )
    how = "one image held out at a time" if found.kind == "leave-one-out" else "some held out at a time"
    of = f"{found.correct} of {found.images}"
    if found.of_classes:
        of = f"mean over classes, each counting the same; {of} images"
    elif found.weighing == "images" and _unequal(adaptation):
        of += ", a mean over images, each counting the same"
    return (
        f"accuracy on images it was not adapted to: {found.accuracy:.0%} ({of}), "
        f"95% interval {found.low:.0%} to {found.high:.0%} ({found.kind}: {found.folds} adaptations, {how})"
    )
