"""A classifier's file: what is in it, and files that are none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import innerloop
from innerloop.classify import Classifier, ModelFileError
from innerloop.training.config import Config, DataConfig, NetworkConfig

HEADER = "innerloop_classifier"


@pytest.fixture
def classifier(tmp_path: Path, make_run: Callable[..., Path], support_folder: Path) -> Classifier:
    adaptation = innerloop.load(make_run(tmp_path / "run")).adaptation(support_folder)
    return adaptation.classifier.with_estimate(adaptation.estimate())


@pytest.fixture
def file(tmp_path: Path, classifier: Classifier) -> Path:
    classifier.save(tmp_path / "my.safetensors")
    return tmp_path / "my.safetensors"


def contents(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_it_comes_back_as_it_was(
    file: Path, classifier: Classifier, shapes: Callable[..., Image.Image], tmp_path: Path
) -> None:
    loaded = Classifier.load(file)
    images = [shapes("dot", i) for i in range(5)]
    assert torch.equal(loaded.probabilities(images), classifier.probabilities(images))
    assert loaded.description() == classifier.description()
    assert loaded.estimate == classifier.estimate
    loaded.save(tmp_path / "again.safetensors")
    assert contents(tmp_path / "again.safetensors")[1] == contents(file)[1]  # the checksum among it
    described = json.loads(contents(file)[1][HEADER])
    assert described["version"] == 1
    assert described["classes"] == ["bar", "dot", "post"]
    assert described["preprocessing"]["invert"] is True
    assert described["network"] == {"network": "conv4", "filters": 8, "strided": False}
    assert described["support"] == {"images": 9, "shots": [3, 3, 3], "steps": 3}
    assert set(described["provenance"]) == {"run", "preset", "epoch", "config_sha256", "innerloop", "date"}
    assert described["provenance"]["run"] == "run"  # not where it lay
    assert str(tmp_path) not in contents(file)[1][HEADER]


@pytest.mark.parametrize("normalisation", ["support", "running", "batch"])
@pytest.mark.parametrize(
    "network", [NetworkConfig(filters=8), NetworkConfig(filters=8, strided=True), NetworkConfig("resnet12", filters=8)]
)
def test_every_network_and_normalisation(
    tmp_path: Path,
    make_run: Callable[..., Path],
    support_folder: Path,
    shapes: Callable[..., Image.Image],
    network: NetworkConfig,
    normalisation: Any,
) -> None:
    data = DataConfig(dataset="folder", image_size=20, channels=3)
    trained = innerloop.load(make_run(tmp_path / "run", Config(data=data, network=network)))
    classifier = trained.adapt(support_folder, normalisation=normalisation, steps=1)
    classifier.save(tmp_path / "my.safetensors")
    images = [shapes("dot", i) for i in range(5)]
    loaded = Classifier.load(tmp_path / "my.safetensors")
    assert torch.allclose(loaded.probabilities(images), classifier.probabilities(images), atol=1e-6)


def test_files_that_are_none(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    def said(name: str) -> str:
        with pytest.raises(ModelFileError) as caught:
            Classifier.load(tmp_path / name)
        return str(caught.value)

    with pytest.raises(FileNotFoundError, match="innerloop adapt makes one"):
        Classifier.load(tmp_path / "none.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.ones(2)}, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pkl", "c.bin"):
        assert "looks like a pickle" in said(name)
    (tmp_path / "empty").write_bytes(b"")
    assert "the file is empty" in said("empty")
    (tmp_path / "text.safetensors").write_text("something else")
    assert "damaged, or no safetensors file" in said("text.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "of another program" in said("other.safetensors")
    run = make_run(tmp_path / "run")
    assert "a run to adapt first" in said("run")
    assert "a training checkpoint" in said(str((run / "checkpoints" / "epoch-0001.safetensors").relative_to(tmp_path)))


def rewritten(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """The file with something in it changed, its checksum left as it was."""
    tensors, metadata = contents(file)
    described = json.loads(metadata[HEADER])
    change(tensors, described)
    save_file(tensors, file, {**metadata, HEADER: json.dumps(described, sort_keys=True)})


def one_value(tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> None:
    tensors["head.weight"][0, 0] += 1


def two_names(tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> None:
    described["classes"] = described["classes"][::-1]


def a_tensor_gone(tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> None:
    del tensors["head.bias"]


@pytest.mark.parametrize("change", [one_value, two_names, a_tensor_gone])
def test_what_was_changed_is_noticed(file: Path, change: Callable[..., None]) -> None:
    rewritten(file, lambda tensors, described: None)
    Classifier.load(file)
    rewritten(file, change)
    with pytest.raises(ModelFileError, match="changed after it was written: its checksum does not match"):
        Classifier.load(file)


def test_a_flipped_bit_and_a_cut_off_end(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(ModelFileError, match="checksum"):
        Classifier.load(file)
    file.write_bytes(whole[:-10])
    with pytest.raises(ModelFileError, match="damaged"):
        Classifier.load(file)


def test_a_newer_version(file: Path) -> None:
    def newer(tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> None:
        described["version"] = 2

    rewritten(file, newer)
    with pytest.raises(ModelFileError, match="has format version 2, and this innerloop reads version 1: update"):
        Classifier.load(file)


def test_a_description_that_does_not_fit(file: Path) -> None:
    """Whoever makes the checksum fit still gets an error in words, and no memory is taken for what is not there."""
    from innerloop.classify.model_file import save_model

    tensors, metadata = contents(file)
    described = json.loads(metadata[HEADER])
    del described["version"]
    for change in (
        {"network": {"network": "conv4", "filters": 10**6, "strided": False}},
        {"network": {"network": "mlp", "filters": 8, "strided": False}},
        {"network": {"network": "unheard-of"}},
        {"classes": ["one", "two"]},
        {"normalisation": "none"},
        {"preprocessing": {}},
    ):
        save_model(file, tensors, {**described, **change})
        with pytest.raises(ModelFileError, match="does not hold what a classifier needs"):
            Classifier.load(file)
