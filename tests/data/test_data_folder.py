from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from innerloop.data import Episodes, folder, image_folder
from innerloop.data.folder import find_classes, images_below


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


def test_classes_in_folders_of_folders(tmp_path, encoded) -> None:
    fill(tmp_path / "Greek", encoded, {"alpha": 10, "beta": 20})
    fill(tmp_path / "Tifinagh", encoded, {"ya": 30})
    fill(tmp_path, encoded, {"flat": 40})
    fill(tmp_path / "flat", encoded, {"more of it": 50})
    fill(tmp_path / "Greek" / "beta", encoded, {"old": 60})
    found = find_classes(tmp_path)
    assert {name: len(images) for name, images in found.classes.items()} == {
        "Greek/alpha": 2,
        "Greek/beta": 4,
        "Tifinagh/ya": 2,
        "flat": 4,
    }
    assert found.empty == found.left_out == []
    assert len(images_below(tmp_path)) == 12
    dataset = image_folder(tmp_path, size=8, channels=1, ratios=(0.5, 0.25, 0.25))
    assert sorted(name for classes in dataset.values() for name in classes.names) == list(found.classes)


def test_what_systems_leave_behind_is_passed_over(tmp_path, encoded) -> None:
    fill(tmp_path, encoded, {"a": 10, "b": 20})
    fill(tmp_path / "__MACOSX", encoded, {"a": 30})
    fill(tmp_path / "a", encoded, {"@eaDir": 30, ".thumbnails": 40})
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "desktop.ini"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "stray.png").write_bytes(encoded())
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    found = find_classes(tmp_path)
    assert {name: len(images) for name, images in found.classes.items()} == {"a": 2, "b": 2}
    assert found.empty == ["empty"]
    assert found.left_out == [
        "1 image ('stray.png') beside the class folders",
        "1 file ('notes.txt') in a that is no image by name",
    ]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_that_lead_back_are_not_followed(tmp_path, encoded) -> None:
    fill(tmp_path / "all", encoded, {"a": 10})
    (tmp_path / "all" / "a" / "up").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "up").symlink_to(tmp_path / "all")
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere", encoded, {"b": 20})
    (tmp_path / "all" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    found = find_classes(tmp_path / "all")
    assert list(found.classes) == ["a", "b"]
    assert len(found.left_out) == 2


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_folders_full_of_links_to_each_other_are_walked_once(tmp_path, encoded) -> None:
    places = [tmp_path / f"f{i:02}" for i in range(30)]  # 30! ways through them
    for place in places:
        place.mkdir()
        for other in places:
            (place / f"to {other.name}").symlink_to(other)
    fill(places[-1], encoded, {"a": 10})
    assert sum(map(len, find_classes(tmp_path).classes.values())) == 2
    assert len(images_below(tmp_path)) == 2


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_to_everything_is_refused(tmp_path, encoded, monkeypatch) -> None:
    fill(tmp_path / "disk", encoded, {f"c{i}/deep": i for i in range(20)})
    fill(tmp_path / "mine", encoded, {"a": 10})
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "disk")
    assert len(find_classes(tmp_path / "mine").classes) == 21
    monkeypatch.setattr(folder, "MAX_FOLDERS", 40)
    with pytest.raises(ValueError, match=r"more than 40 folders in .*mine.*Does a link in it lead to more than images"):
        find_classes(tmp_path / "mine")
    with pytest.raises(ValueError, match="more than 40 folders"):
        images_below(tmp_path / "mine")


def test_folders_nested_for_ever_are_refused(tmp_path, encoded) -> None:
    fill(tmp_path, encoded, {"/".join("a" * 300): 10})
    with pytest.raises(ValueError, match="more than 100 deep"):
        find_classes(tmp_path)


def test_classes_with_too_few_images_are_left_out(tmp_path, encoded, caplog) -> None:
    fill(tmp_path, encoded, {f"c{i}": 10 * i for i in range(6)}, each=3)
    fill(tmp_path, encoded, {"small": 100}, each=2)
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING):
        dataset = image_folder(tmp_path, size=8, channels=1, at_least=3)
    assert sum(len(classes.names) for classes in dataset.values()) == 6
    assert "left out 2 of 8 classes, with fewer than 3 images each" in caplog.text
    assert "small: 2 images" in caplog.text
    assert "empty: 0 images" in caplog.text
    with pytest.raises(ValueError, match=r"no class in .* has 4 images.*the largest has 3"):
        image_folder(tmp_path, at_least=4)


def test_broken_images_can_make_a_class_too_small(tmp_path, encoded, caplog) -> None:
    fill(tmp_path, encoded, {f"c{i}": 10 * i for i in range(6)}, each=3)
    (tmp_path / "c3" / "0.png").write_bytes(b"")
    dataset = image_folder(tmp_path, size=8, channels=1, at_least=3, skip_broken=True)
    names = [name for classes in dataset.values() for name in classes.names]
    assert sorted(names) == ["c0", "c1", "c2", "c4", "c5"]
    assert sum(len(classes.images) for classes in dataset.values()) == 15
    assert "c3: 2 images" in caplog.text


def test_what_was_found_is_said(tmp_path, encoded, capsys) -> None:
    fill(tmp_path, encoded, {f"c{i}": 10 * i for i in range(4)}, each=3)
    fill(tmp_path, encoded, {"c9": 100}, each=7)
    (tmp_path / "c9" / "large.png").write_bytes(encoded(size=(30, 9)))
    (tmp_path / "c9" / "notes.txt").write_text("x")
    image_folder(tmp_path, size=8, channels=1, progress=True)
    said = capsys.readouterr().err
    assert "5 classes, 20 images, 3 to 8 (median 3) a class, 8 to 30 x 8 to 9 pixels" in said
    assert "classes: 3 train, 1 val, 1 test, shared out by chance" in said
    assert "left out: 1 file ('notes.txt') in c9 that is no image by name" in said
