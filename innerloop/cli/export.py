"""``innerloop export``: a classifier as a file for programs that know nothing of innerloop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from innerloop.classify import Classifier
from innerloop.cli.arguments import check_out, parsed
from innerloop.training.config import ConfigError


@dataclass(frozen=True)
class ExportArguments:
    """Write a classifier as ONNX, TorchScript or torch.export, and check that it computes the same.

    The file takes images as float32 [n, channels, size, size] with values in [0, 1], for any n, ink as the network
    knows it, and gives probabilities [n, classes]. Mean and deviation are part of it.
    """

    model: tyro.conf.Positional[Path]
    """File of the classifier, made by innerloop adapt."""
    out: Path
    """File to write."""
    onnx: bool = False
    """ONNX, for onnxruntime and many others; needs pip install 'innerloop[export]'."""
    torchscript: bool = False
    """TorchScript, for libtorch; PyTorch itself has deprecated it."""
    torch_export: bool = False
    """A torch.export program (.pt2)."""
    logits: bool = False
    """Give logits in place of probabilities."""
    overwrite: bool = False
    """Write over a file that is there already."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the result as JSON on standard output."""


def run(arguments: Sequence[str]) -> int:
    """Export as the command line says."""
    from innerloop.classify.export import Format, export

    chosen = parsed(ExportArguments, arguments, "innerloop export")
    formats: dict[Format, bool] = {
        "onnx": chosen.onnx,
        "torchscript": chosen.torchscript,
        "torch-export": chosen.torch_export,
    }
    asked = [name for name, wanted in formats.items() if wanted]
    if len(asked) != 1:
        raise ConfigError(f"name one of --onnx, --torchscript and --torch-export; got {len(asked)} of them")
    check_out(chosen.out, chosen.overwrite)
    classifier = Classifier.load(chosen.model)
    try:
        done = export(classifier, chosen.out, asked[0], "logits" if chosen.logits else "probabilities")
    except ImportError as error:
        raise ConfigError(str(error)) from None
    preprocessing = classifier.preprocessing
    shape = ["n", preprocessing.channels, preprocessing.size, preprocessing.size]
    if chosen.json:
        values = {"file": str(done.path), "format": asked[0], "output": done.output, "difference": done.difference}
        first = {"invert": preprocessing.invert, "bits": preprocessing.bits}
        print(json.dumps({**values, "input": shape, "classes": classifier.classes, **first}))
        return 0
    ways = len(classifier.classes)
    print(f"written: {done.path}. images [{', '.join(map(str, shape))}] in [0, 1] -> {done.output} [n, {ways}]")
    if preprocessing.bits:
        print(f"divide 16-bit images by {2**preprocessing.bits - 1}; what is above is 1")
    if preprocessing.invert:
        print("turn images over first (1 - value): the network knows bright ink on a dark page")
    if done.difference is None:
        print("not checked: onnxruntime is not installed")
    else:
        print(f"checked: differs by {done.difference:.1e} at most from the classifier, on random images")
    return 0
