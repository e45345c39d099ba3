from __future__ import annotations

from pathlib import Path

import pytest

from innerloop.data import Episodes, image_folder


def fill(root: Path, encoded, classes: dict[str, int], each: int = 2) -> None:
    for name, shade in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(encoded(shade + i))


def test_split_by_chance(tmp_path, encoded) -> None:
    fill(tmp_path, encoded, {f"c{i}": 10 * i for i in range(10)})
    dataset = image_folder(tmp_path, size=8, channels=1)
    assert {split: len(classes.names) for split, classes in dataset.items()} == {
        "train": 6,
        "val": 2,
        "test": 2,
    }
    names = [name for classes in dataset.values() for name in classes.names]
    assert sorted(names) == [f"c{i}" for i in range(10)]
    for classes in dataset.values():
        for c, name in enumerate(classes.names):
            assert classes.images[2 * c, 0, 0, 0] == 10 * int(name[1:])
    again = image_folder(tmp_path, size=8, channels=1)
    assert again["test"].names == dataset["test"].names
    assert any(image_folder(tmp_path, size=8, seed=s)["test"].names != dataset["test"].names for s in (1, 2, 3))
    Episodes(dataset, ways=2, shots=1, queries=1).task("test", 0)


def test_three_classes_are_enough(tmp_path, encoded) -> None:
    fill(tmp_path, encoded, {"a": 0, "b": 50, "c": 100})
    dataset = image_folder(tmp_path, size=8, ratios=(1 / 3, 1 / 3, 1 / 3))
    assert [len(classes.names) for classes in dataset.values()] == [1, 1, 1]
    assert dataset["train"].images.shape == (2, 3, 8, 8)


def test_too_few_classes(tmp_path, encoded) -> None:
    fill(tmp_path, encoded, {"a": 0, "b": 50})
    with pytest.raises(ValueError, match=r"2 classes split by ratios \(0.6, 0.2, 0.2\) give \(1, 1, 0\)"):
        image_folder(tmp_path)


@pytest.mark.parametrize("ratios", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5), (-0.5, 1.0, 0.5)])
def test_bad_ratios(tmp_path, encoded, ratios) -> None:
    fill(tmp_path, encoded, {"a": 0, "b": 50, "c": 100})
    with pytest.raises(ValueError, match="three positive numbers"):
        image_folder(tmp_path, ratios=ratios)


def test_split_by_the_user(tmp_path, encoded) -> None:
    for shade, split in enumerate(("train", "val", "test")):
        fill(tmp_path / split, encoded, {f"{split}-a": 20 * shade, f"{split}-b": 20 * shade + 10})
    dataset = image_folder(tmp_path, size=8, channels=1, invert=True)
    assert dataset["val"].names == ("val-a", "val-b")
    assert dataset["val"].images[:, 0, 0, 0].tolist() == [235, 234, 225, 224]


def test_a_missing_split(tmp_path, encoded) -> None:
    fill(tmp_path / "train", encoded, {"a": 0})
    fill(tmp_path / "test", encoded, {"b": 0})
    with pytest.raises(ValueError, match=r"class folders in \['train', 'test'\] but none in \['val'\]"):
        image_folder(tmp_path)


def test_a_class_in_two_splits(tmp_path, encoded) -> None:
    fill(tmp_path / "train", encoded, {"a": 0, "b": 0})
    fill(tmp_path / "val", encoded, {"c": 0})
    fill(tmp_path / "test", encoded, {"b": 0})
    with pytest.raises(ValueError, match=r"1 classes are in both 'train' and 'test'.*\['b'\]"):
        image_folder(tmp_path)


def test_a_class_called_train(tmp_path, encoded) -> None:
    fill(tmp_path, encoded, {"boat": 0, "car": 20, "train": 40, "tram": 60, "bus": 80})
    dataset = image_folder(tmp_path, size=8)
    assert sum(len(classes.names) for classes in dataset.values()) == 5
