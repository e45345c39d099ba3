"""A classifier for programs that know nothing of innerloop: ONNX, TorchScript, torch.export."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from innerloop.classify.classifier import Classifier
from innerloop.data.preprocessing import per_channel
from innerloop.nn import ConvNormActPool, NormActPool
from innerloop.training.checkpoints import write_atomically

Format = Literal["onnx", "torchscript", "torch-export"]
Output = Literal["probabilities", "logits"]

INPUT = "images"
TOLERANCE = 1e-4
"""Largest difference from the classifier's own outputs that an exported file may have."""


class ExportError(RuntimeError):
    """What was exported does not compute what the classifier does."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: of the file.
        output: what its graph returns.
        difference: largest difference from the classifier's own outputs, on random images; None where there was no
            program to run it with.
    """

    path: Path
    output: Output
    difference: float | None


class PlainClassifier(nn.Module):
    """Normalisation, network and softmax of ordinary modules: ``[n, C, size, size]`` in [0, 1] to ``[n, ways]``."""

    mean: Tensor | None
    inverse_std: Tensor | None

    def __init__(self, classifier: Classifier, output: Output) -> None:
        super().__init__()
        preprocessing = classifier.preprocessing
        self.register_buffer("mean", per_channel("mean", preprocessing.mean, preprocessing.channels))
        self.register_buffer("inverse_std", per_channel("std", preprocessing.std, preprocessing.channels))
        self.network = plain(copy.deepcopy(classifier.network).to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
        self.softmax = nn.Softmax(1) if output == "probabilities" else nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities or logits ``[n, ways]``."""
        if self.mean is not None:
            images = images - self.mean
        if self.inverse_std is not None:
            images = images * self.inverse_std
        outputs: Tensor = self.softmax(self.network(images))
        return outputs


def plain(module: nn.Module) -> nn.Module:
    """The same network with innerloop's fused blocks taken apart into the ordinary modules that they stand for."""
    if isinstance(module, ConvNormActPool):
        conv, norm = module
        return nn.Sequential(conv, plain(norm))
    if isinstance(module, NormActPool):
        batch_norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
        batch_norm.load_state_dict(module.state_dict())
        pool = nn.Identity() if module.pool is None else nn.MaxPool2d(module.pool)
        return nn.Sequential(batch_norm, nn.LeakyReLU(module.negative_slope), pool).eval()
    for name, child in module.named_children():
        setattr(module, name, plain(child))
    return module


def export(classifier: Classifier, path: str | Path, format: Format, output: Output = "probabilities") -> Exported:
    """Write a classifier as a file that runs without innerloop, and run it to see that it computes the same.

    Its input, ``images``, is float32 ``[n, C, size, size]`` with values in [0, 1], for any n, ink as the network knows
    it (``invert`` of the preprocessing, done before), 16-bit images divided by ``2**bits - 1`` (``bits`` of the
    preprocessing). Mean and deviation are part of the graph. Classes and preprocessing go along as JSON:
    ``metadata_props`` of ONNX, the extra file ``innerloop.json`` of the others.

    Raises:
        ImportError: ONNX needs ``pip install 'innerloop[export]'``.
        ValueError: a classifier by batch statistics, whose answer on one image depends on others.
        ExportError: the file computes something else.
    """
    if classifier.normalisation == "batch":
        raise ValueError(
            "this classifier normalises by the batch that it is given, so that an image's answer depends on its "
            "neighbours: adapt with --normalisation support to export it"
        )
    path = Path(path)
    network = PlainClassifier(classifier, output)
    described = {
        "classes": json.dumps(list(classifier.classes)),
        "output": output,
        "input": "float32 [n, channels, size, size], values in [0, 1]; mean and std are part of the graph",
        "innerloop": json.dumps(classifier.description()),
    }
    side, channels = classifier.preprocessing.size, classifier.preprocessing.channels
    images = torch.rand(7, channels, side, side, generator=torch.Generator().manual_seed(0))
    with _quiet():
        data, again = _WRITERS[format](network, images[:2], described)
    difference: float | None = None
    if again is not None:
        difference = 0.0
        for part in (images[:1], images):
            with torch.no_grad():
                wanted = classifier.network(classifier.preprocessing.inputs(255 * part))
                wanted = wanted.softmax(1) if output == "probabilities" else wanted
                difference = max(difference, float((again(part) - wanted).abs().max()))
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the exported {format} differs by {difference:.1e} from the classifier; nothing was written"
            )
    write_atomically(path, data)
    return Exported(path, output, difference)


Run = Callable[[Tensor], Tensor]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporters say of themselves: deprecations, and libraries that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _onnx(network: nn.Module, example: Tensor, described: dict[str, str]) -> tuple[bytes, Run | None]:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX needs {' and '.join(missing)}: pip install 'innerloop[export]'")
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[described["output"]],
        dynamic_shapes={INPUT: {0: torch.export.Dim("n", min=1)}},
    )
    assert program is not None
    model = program.model_proto
    for key, value in described.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    data: bytes = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return data, None
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _torchscript(network: nn.Module, example: Tensor, described: dict[str, str]) -> tuple[bytes, Run]:
    traced = torch.jit.freeze(torch.jit.trace(network, example))  # type: ignore[no-untyped-call]
    file = io.BytesIO()
    torch.jit.save(traced, file, _extra_files={"innerloop.json": json.dumps(described)})
    return file.getvalue(), cast(Run, torch.jit.load(io.BytesIO(file.getvalue())))  # type: ignore[no-untyped-call]


def _torch_export(network: nn.Module, example: Tensor, described: dict[str, str]) -> tuple[bytes, Run]:
    n = torch.export.Dim("n", min=1)
    program = torch.export.export(network, (example,), dynamic_shapes={INPUT: {0: n}})
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"innerloop.json": json.dumps(described)})
    return file.getvalue(), cast(Run, torch.export.load(io.BytesIO(file.getvalue())).module())


_WRITERS: dict[Format, Callable[[nn.Module, Tensor, dict[str, str]], tuple[bytes, Any]]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "torch-export": _torch_export,
}
