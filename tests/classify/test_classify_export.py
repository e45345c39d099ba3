"""Exported classifiers, run by other programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import innerloop
from innerloop.classify import Classifier
from innerloop.classify.export import PlainClassifier, export
from innerloop.nn import ConvNormActPool, NormActPool
from innerloop.training.config import Config, DataConfig, NetworkConfig

COLOUR = DataConfig(dataset="folder", image_size=20, channels=3)


@pytest.fixture
def classifier(tmp_path: Path, make_run: Callable[..., Path], support_folder: Path) -> Classifier:
    run = make_run(tmp_path / "run", Config(data=COLOUR, network=NetworkConfig(filters=8)))
    return innerloop.load(run).adapt(support_folder)


def logits(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    """By the formulas: (x - mean) / std, and the adapted network."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        found: torch.Tensor = classifier.network((images - mean) / std)
    return found


@pytest.mark.parametrize(
    "network", [NetworkConfig(filters=8), NetworkConfig(filters=8, strided=True), NetworkConfig("resnet12", filters=8)]
)
def test_plain_modules_compute_the_same(
    tmp_path: Path, make_run: Callable[..., Path], support_folder: Path, network: NetworkConfig
) -> None:
    run = make_run(tmp_path / "run", Config(data=COLOUR, network=network))
    classifier = innerloop.load(run).adapt(support_folder)
    exported = PlainClassifier(classifier, "logits")
    assert not any(isinstance(m, ConvNormActPool | NormActPool) for m in exported.modules())
    assert any(type(m) is nn.BatchNorm2d for m in exported.modules())
    images = torch.rand(3, 3, 20, 20)
    assert torch.allclose(exported(images), logits(classifier, images), atol=1e-5)


def test_onnx(classifier: Classifier, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    done = export(classifier, tmp_path / "my.onnx", "onnx", "logits")
    assert done.difference is not None
    assert done.difference < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "my.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 2, 9):  # any number of images
        images = torch.rand(n, 3, 20, 20)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), logits(classifier, images), atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["bar", "dot", "post"]
    assert about["output"] == "logits"
    assert json.loads(about["innerloop"])["preprocessing"]["size"] == 20


@pytest.mark.parametrize("format", ["torchscript", "torch-export"])
def test_without_innerloop(classifier: Classifier, tmp_path: Path, format: str) -> None:
    """Another process, which must not import innerloop, gives the same probabilities."""
    done = export(classifier, tmp_path / "my.pt2", format)  # type: ignore[arg-type]
    assert done.difference is not None
    assert done.difference < 1e-4
    images = torch.rand(4, 3, 20, 20)
    torch.save(images, tmp_path / "images.pt")
    load = {
        "torchscript": "network = torch.jit.load('my.pt2', _extra_files=extra)",
        "torch-export": "network = torch.export.load('my.pt2', extra_files=extra).module()",
    }
    program = f"""
import json, sys, torch
extra = {{'innerloop.json': ''}}
{load[format]}
with torch.no_grad():
    found = network(torch.load('images.pt'))
assert 'innerloop' not in sys.modules
print(json.dumps([found.tolist(), json.loads(extra['innerloop.json'])['classes']]))
"""
    # From the folder of the file, and without the checkout on the path.
    done_by = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found, classes = json.loads(done_by.stdout.splitlines()[-1])
    assert torch.allclose(torch.tensor(found), logits(classifier, images).softmax(1), atol=1e-4)
    assert json.loads(classes) == ["bar", "dot", "post"]


def test_by_batch_statistics_there_is_nothing_to_export(
    tmp_path: Path, make_run: Callable[..., Path], support_folder: Path
) -> None:
    classifier = innerloop.load(make_run(tmp_path / "run")).adapt(support_folder, normalisation="batch")
    with pytest.raises(ValueError, match="adapt with --normalisation support"):
        export(classifier, tmp_path / "my.onnx", "onnx")
    assert not (tmp_path / "my.onnx").exists()
