from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch

from innerloop.data import BrokenImagesError, mini_imagenet

SPLITS = ("train", "val", "test")
NAMES = {"train": ("n01", "n02"), "val": ("n03",), "test": ("n04",)}


def write_csv(folder: Path, encoded, images: Path | None) -> None:
    for s, split in enumerate(SPLITS):
        lines = ["filename,label"]
        for c, name in enumerate(NAMES[split]):
            for i in range(3):
                lines.append(f"{name}{i:08d}.jpg,{name}")
                if images is not None:
                    images.mkdir(exist_ok=True, parents=True)
                    data = encoded((60 * s, 20 * c, 10 * i), "RGB", (12, 8), "PNG")
                    (images / f"{name}{i:08d}.jpg").write_bytes(data)
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


def check(dataset, size: int = 8) -> None:
    assert {split: classes.names for split, classes in dataset.items()} == NAMES
    assert dataset["train"].images.shape == (6, 3, size, size)
    for s, split in enumerate(SPLITS):
        colours = dataset[split].images[:, :, 0, 0].tolist()
        assert colours == [[60 * s, 20 * c, 10 * i] for c in range(len(NAMES[split])) for i in range(3)]


def test_split_folders(tmp_path, encoded) -> None:
    for s, split in enumerate(SPLITS):
        for c, name in enumerate(NAMES[split]):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                data = encoded((60 * s, 20 * c, 10 * i), "RGB", (12, 8), "PNG")
                (tmp_path / split / name / f"{name}{i}.png").write_bytes(data)
    check(mini_imagenet(tmp_path, size=8))
    (tmp_path / "val" / "n03" / f"{NAMES['val'][0]}0.png").write_bytes(b"bad")
    with pytest.raises(BrokenImagesError, match="1 of 3"):
        mini_imagenet(tmp_path, size=8)
    assert mini_imagenet(tmp_path, size=8, skip_broken=True)["val"].sizes == (2,)


def test_csv_and_an_images_folder(tmp_path, encoded) -> None:
    write_csv(tmp_path, encoded, tmp_path / "images")
    check(mini_imagenet(tmp_path, size=8))


def test_csv_elsewhere_and_images_in_the_root(tmp_path, encoded) -> None:
    write_csv(tmp_path / "splits", encoded, tmp_path / "root")
    check(mini_imagenet(tmp_path / "root", size=8, splits_dir=tmp_path / "splits"))


def test_csv_lists_files_that_are_not_there(tmp_path, encoded) -> None:
    write_csv(tmp_path, encoded, tmp_path / "images")
    for path in (tmp_path / "images").glob("n0[12]*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"6 of the 12 images .* are not in") as caught:
        mini_imagenet(tmp_path)
    assert "n0200000002.jpg" in str(caught.value)
    write_csv(tmp_path, encoded, tmp_path / "images")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"val.csv' does not exist"):
        mini_imagenet(tmp_path)


def test_bad_csv(tmp_path, encoded) -> None:
    write_csv(tmp_path, encoded, tmp_path / "images")
    (tmp_path / "train.csv").write_text("file,class\na.jpg,n01\n")
    with pytest.raises(ValueError, match=r"must have the columns filename,label; it has \['file', 'class'\]"):
        mini_imagenet(tmp_path)
    (tmp_path / "train.csv").write_text("filename,label\n../../etc/passwd,n01\n")
    with pytest.raises(ValueError, match=r"row 2 of .*'\.\./\.\./etc/passwd'"):
        mini_imagenet(tmp_path)
    (tmp_path / "train.csv").write_text("filename,label\n")
    with pytest.raises(ValueError, match="lists no images"):
        mini_imagenet(tmp_path)


def pixels(split: str, size: int = 8) -> np.ndarray:
    s = SPLITS.index(split)
    colours = [[60 * s, 20 * c, 10 * i] for c in range(len(NAMES[split])) for i in range(3)]
    return np.broadcast_to(np.array(colours, dtype=np.uint8)[:, None, None], (len(colours), size, size, 3)).copy()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cache_pickles(tmp_path, protocol) -> None:
    for split in SPLITS:
        rows = {name: list(range(3 * c, 3 * c + 3)) for c, name in enumerate(NAMES[split])}
        content = {"image_data": pixels(split), "class_dict": rows}
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, protocol))
    check(mini_imagenet(tmp_path, size=8))
    check(mini_imagenet(tmp_path, size=4), size=4)


def test_a_pickle_from_python_2(tmp_path) -> None:
    # Python 2 wrote byte strings as STRING/BINSTRING; NumPy's module was numpy.core then.
    for split in SPLITS:
        images = pixels(split)
        raw = images.tobytes()
        out = io.BytesIO()
        out.write(b"\x80\x02}(U\nimage_datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt")
        out.write(b"R(K\x01(" + b"".join(b"K" + bytes([n]) for n in images.shape) + b"t")
        out.write(b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
        out.write(b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tbU\nclass_dict}(")
        for c, name in enumerate(NAMES[split]):
            rows = b"".join(b"K" + bytes([row]) for row in range(3 * c, 3 * c + 3))
            out.write(b"U" + bytes([len(name)]) + name.encode() + b"](" + rows + b"e")
        out.write(b"uu.")
        pickletools.dis(out.getvalue(), out=io.StringIO())
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(out.getvalue())
    check(mini_imagenet(tmp_path, size=8))


@pytest.mark.parametrize("as_list", [False, True])
def test_category_split_pickles(tmp_path, as_list) -> None:
    names = {"train": "train_phase_train", "val": "val", "test": "test"}
    first = 0
    for split in SPLITS:
        images = pixels(split)
        labels = np.repeat(np.arange(len(NAMES[split])) + first, 3)
        content = {
            "data": list(images) if as_list else images,
            "labels": labels.tolist() if as_list else labels,
            "catname2label": {name: first + c for c, name in enumerate(NAMES[split])},
        }
        first += len(NAMES[split])
        (tmp_path / f"miniImageNet_category_split_{names[split]}.pickle").write_bytes(pickle.dumps(content))
    check(mini_imagenet(tmp_path, size=8))


def test_labels_without_names(tmp_path) -> None:
    for split in SPLITS:
        content = {"data": pixels(split), "labels": [0, 1, 0] * len(NAMES[split])}
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    dataset = mini_imagenet(tmp_path, size=8)
    assert dataset["val"].names == ("class0", "class1")
    assert dataset["val"].sizes == (2, 1)
    assert dataset["val"].images[:, 2, 0, 0].tolist() == [0, 20, 10]


class Calls:
    """Pickles to a call of a function, as attackers do."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refuse(tmp_path: Path, content: object, message: str) -> None:
    for split in SPLITS:
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(
            content if isinstance(content, bytes) else pickle.dumps(content)
        )
    with pytest.raises(ValueError, match=message):
        mini_imagenet(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda proof: Calls(os.system, f"touch {proof}"), r"(posix|nt)\.system"),
        (lambda proof: Calls(builtins.eval, f"open({str(proof)!r}, 'w')"), r"builtins\.eval"),
        (lambda proof: Calls(np.load, str(proof), None, True), r"numpy(\.lib\..*)?\.load"),
        (lambda proof: collections.OrderedDict(a=1), r"collections\.OrderedDict"),
    ],
)
def test_nothing_in_a_pickle_is_run(tmp_path, make, named, nested) -> None:
    proof = tmp_path / "proof"
    content = make(proof)
    if nested:
        content = {"image_data": pixels("val"), "class_dict": {"n": [0]}, "more": [({"deep": content},)]}
    refuse(tmp_path, content, f"is refused: it names {named}")
    assert not proof.exists()


def test_a_hand_written_attack(tmp_path) -> None:
    proof = tmp_path / "proof"
    for attack in (
        f"cos\nsystem\n(S'touch {proof}'\ntR.",
        f"(S'touch {proof}'\nios\nsystem\n.",
        f"cnumpy.core.multiarray\nos.system\n(S'touch {proof}'\ntR.",
    ):
        refuse(tmp_path, attack.encode(), "is refused: it names (os.system|numpy.core.multiarray.os.system)")
    # Building blocks that are allowed, put together wrongly.
    for attack in (
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'utf-7'\ntR.",
        b"cnumpy.core.numeric\n_frombuffer\n(S'x'\nS'O8'\n(I1\ntS'C'\ntR.",
    ):
        refuse(tmp_path, attack, "is refused: it (holds an array|encodes)")
    assert not proof.exists()


def test_arrays_of_objects_are_refused(tmp_path) -> None:
    images = np.array([Calls(os.system, f"touch {tmp_path / 'proof'}")], dtype=object)
    refuse(tmp_path, {"image_data": images, "class_dict": {}}, "is refused")
    refuse(tmp_path, {"image_data": np.array([None, 1]), "class_dict": {}}, "dtype 'O8'")
    assert not (tmp_path / "proof").exists()


def test_forged_array_state_is_refused(tmp_path) -> None:
    honest = pickle.dumps({"image_data": pixels("val"), "class_dict": {"n": [0]}}, 2)
    refuse(tmp_path, honest[: len(honest) // 2], "is not a whole pickle")
    refuse(tmp_path, b"", "is not a whole pickle")
    # A shape larger than the bytes that are there.
    forged = honest.replace(b"(K\x03K\x08K\x08K\x03t", b"(K\x7fK\x08K\x08K\x03t").replace(
        b"K\x03K\x08K\x08K\x03", b"K\x7fK\x08K\x08K\x03"
    )
    refuse(tmp_path, forged, "is not a whole pickle")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dict; it holds a list"),
        ({"x": 1}, r"must hold the keys image_data and class_dict.*\['x'\]"),
        ({"image_data": np.zeros((2, 4), np.uint8), "class_dict": {"n": [0]}}, "must hold uint8 images"),
        ({"image_data": [np.zeros((2, 4)), 1], "class_dict": {"n": [0]}}, "is refused"),
        (
            {"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"n": [0, 2]}},
            "must number its 2 images",
        ),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {}}, "must number|values"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": 3}, "not its values"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, message) -> None:
    refuse(tmp_path, content, message)


def test_a_missing_pickle(tmp_path) -> None:
    content = {"image_data": pixels("train"), "class_dict": {"n": [0]}}
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"mini-imagenet-cache-val.pkl' does not exist"):
        mini_imagenet(tmp_path)


def test_nothing_that_fits(tmp_path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no mini-ImageNet; expected train, val and test folders"):
        mini_imagenet(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; expected one of mini-ImageNet's layouts"):
        mini_imagenet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="size must be at least 1"):
        mini_imagenet(tmp_path, size=0)
    (tmp_path / "train" / "n01").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="val' does not exist; expected the class folders"):
        mini_imagenet(tmp_path)


def test_images_are_torch_uint8(tmp_path) -> None:
    for split in SPLITS:
        content = {
            "image_data": pixels(split).astype(">i2").astype(np.uint8),
            "class_dict": {"n": np.arange(3)},
        }
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    images = mini_imagenet(tmp_path, size=8)["val"].images
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
