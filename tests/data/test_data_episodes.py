from __future__ import annotations

import hashlib
import time
from collections import Counter

import numpy as np
import pytest
import torch

from innerloop.data import ClassImages, Episodes
from innerloop.data._random import choose, raw_words, shuffled, uniform
from innerloop.tasks import select_task


def same(a, b) -> bool:
    return all(
        torch.equal(x, y)
        for one, other in ((a.support, b.support), (a.query, b.query))
        for x, y in zip(one, other, strict=True)
    )


def numbers(inputs) -> torch.Tensor:
    """Which images of the `numbered` fixture these are."""
    pixels = (inputs.double() * 255).round().long()
    return pixels[..., 0, 0, 0] + 256 * pixels[..., 0, 0, 1]


def test_shapes_types_and_order(numbered) -> None:
    episodes = Episodes(numbered(shape=(3, 4, 4)), ways=5, shots=2, queries=3)
    tasks = episodes.meta_batch("train", 7, 4)
    assert tasks.support.inputs.shape == (4, 10, 3, 4, 4)
    assert tasks.query.inputs.shape == (4, 15, 3, 4, 4)
    assert tasks.support.inputs.dtype == torch.float32
    assert tasks.support.inputs.is_contiguous()
    assert tasks.support.targets.dtype == torch.int64
    assert tasks.support.targets[3].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert tasks.query.targets[0].tolist() == [c for c in range(5) for _ in range(3)]
    assert episodes.input_shape == (3, 4, 4)
    assert 0 <= tasks.support.inputs.min() <= tasks.support.inputs.max() <= 1


@pytest.mark.parametrize("rotations", [False, True])
def test_a_task_does_not_depend_on_its_meta_batch_or_on_what_came_before(numbered, rotations) -> None:
    dataset = numbered()
    episodes = Episodes(dataset, ways=4, shots=1, queries=2, seed=3, rotations=rotations)
    batch = episodes.meta_batch("train", 5, 6)
    fresh = Episodes(dataset, ways=4, shots=1, queries=2, seed=3, rotations=rotations)
    for offset in (5, 0, 3):
        assert same(select_task(batch, offset), fresh.task("train", 5 + offset))
    assert same(select_task(episodes.meta_batch("train", 0, 8), 6), fresh.task("train", 6))


def test_any_index_takes_the_same_time(numbered) -> None:
    episodes = Episodes(numbered(), ways=4, shots=1, queries=1)
    episodes.task("train", 0)
    begun = time.perf_counter()
    task = episodes.task("train", 10**15)
    assert time.perf_counter() - begun < 1
    assert not torch.equal(task.support.inputs, episodes.task("train", 10**15 + 1).support.inputs)
    assert same(task, episodes.task("train", 10**15))


def test_the_very_tasks_are_pinned(numbered) -> None:
    # Runs must be comparable across versions: this hash may only change with a note in the changelog.
    episodes = Episodes(numbered(), ways=5, shots=1, queries=2, seed=42, rotations=True)
    digest = hashlib.sha256()
    for split, index in (("train", 0), ("train", 1), ("val", 0), ("test", 123456789)):
        rows, turns = episodes._draw(split, index, 1)
        digest.update(rows.astype("<i8").tobytes() + turns.astype("<i8").tobytes())
    assert digest.hexdigest() == "2aad2c69e371ae37f41b0564d1f7bf36565f325d039a4c18cfc176b7eedfff00"
    pixels = (episodes.meta_batch("train", 0, 3).query.inputs * 255).round().to(torch.uint8)
    assert (
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        == "18ea407b286fc13ab10c2e3782e968c8bb8c51402c639a3ef22595acd2023fe6"
    )


def test_images_of_a_task_are_distinct_and_of_their_class(numbered) -> None:
    episodes = Episodes(numbered(classes=12, per_class=6), ways=12, shots=2, queries=4)
    for index in range(20):
        task = episodes.task("train", index)
        support, query = numbers(task.support.inputs), numbers(task.query.inputs)
        assert len(set(support.tolist()) | set(query.tolist())) == 72
        classes_of_support = (support // 6).view(12, 2)
        classes_of_query = (query // 6).view(12, 4)
        assert (classes_of_support == classes_of_support[:, :1]).all()
        assert (classes_of_query == classes_of_support[:, :1]).all()
        assert sorted(classes_of_support[:, 0].tolist()) == list(range(12))


def test_splits_and_seeds_differ(numbered) -> None:
    dataset = numbered()
    shared = dict.fromkeys(("train", "val", "test"), dataset["train"])
    episodes = Episodes(shared, ways=5, shots=1, queries=1)
    drawn = {tuple(episodes._draw(split, 0, 4)[0]) for split in shared}
    assert len(drawn) == 3
    other = Episodes(shared, ways=5, shots=1, queries=1, seed=1)
    assert tuple(other._draw("train", 0, 4)[0]) not in drawn
    assert numbers(Episodes(dataset, ways=5, shots=1, queries=1).task("val", 0).support.inputs).min() >= 72


def test_classes_of_different_sizes() -> None:
    sizes = (3, 7, 4)
    images = torch.zeros(14, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(14, dtype=torch.uint8)
    episodes = Episodes({"test": ClassImages(images, sizes, ("a", "b", "c"))}, ways=3, shots=1, queries=2)
    seen = Counter()
    for index in range(300):
        rows, _ = episodes._draw("test", index, 1)
        seen.update(rows.tolist())
    assert set(seen) == set(range(14))


def test_rotations_turn_whole_classes_in_training_only() -> None:
    images = torch.randint(0, 256, (8 * 4, 2, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classes = ClassImages(images, (4,) * 8, tuple("abcdefgh"))
    dataset = {"train": classes, "val": classes}
    plain = Episodes(dataset, ways=5, shots=2, queries=2)
    turned = Episodes(dataset, ways=5, shots=2, queries=2, rotations=True)
    seen = Counter()
    for index in range(40):
        before, after = plain.task("train", index), turned.task("train", index)
        for way in range(5):
            one = torch.cat([before.support.inputs[2 * way :][:2], before.query.inputs[2 * way :][:2]])
            other = torch.cat([after.support.inputs[2 * way :][:2], after.query.inputs[2 * way :][:2]])
            fits = [k for k in range(4) if torch.equal(torch.rot90(one, k, (2, 3)), other)]
            assert len(fits) == 1
            seen.update(fits)
    assert all(25 <= seen[k] <= 75 for k in range(4))
    assert same(plain.task("val", 3), turned.task("val", 3))


def test_normalisation(numbered) -> None:
    dataset = numbered(shape=(3, 4, 4))
    arguments = {"ways": 3, "shots": 1, "queries": 1}
    plain = Episodes(dataset, **arguments).task("train", 0).support.inputs
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    scaled = Episodes(dataset, **arguments, mean=mean, std=std).task("train", 0).support.inputs
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(scaled, expected)
    double = Episodes(dataset, **arguments, dtype=torch.float64).task("train", 0).support.inputs
    assert double.dtype == torch.float64
    assert set((double * 255).round().unique().tolist()) >= {0.0, 200.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_bits_on_every_device(numbered) -> None:
    arguments = {"ways": 5, "shots": 2, "queries": 2, "rotations": True, "mean": (0.1,), "std": (0.3,)}
    here = Episodes(numbered(), **arguments).meta_batch("train", 9, 4)
    there = Episodes(numbered(), **arguments, device="cuda").meta_batch("train", 9, 4)
    assert there.query.inputs.is_cuda
    assert torch.equal(here.query.inputs, there.query.inputs.cpu())
    assert torch.equal(here.support.targets, there.support.targets.cpu())


def test_choices_are_uniform() -> None:
    # 20 000 ordered choices of 2 of 5: each of the 20 is expected 1000 times; chi-square below its 0.1% point
    counts = Counter(tuple(choose(raw_words(0, "uniform", i, 2).tolist(), 5)) for i in range(20_000))
    assert len(counts) == 20
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 43.8


def test_random_words_are_pinned() -> None:
    assert raw_words(7, "pinned", 2**62, 2).tolist() == [5340163555233831894, 3033640248651169353]
    assert shuffled(6, 0, "pinned") == [5, 2, 0, 3, 4, 1]
    assert sorted(shuffled(100, 5, "any")) == list(range(100))
    numbers = uniform(raw_words(0, "unit", 0, 20_000))
    assert 0 <= numbers.min() < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert uniform(np.array([2**64 - 1], dtype=np.uint64))[0] < 1


def test_sampling_is_fast() -> None:
    classes = ClassImages(torch.zeros(400 * 20, 1, 28, 28, dtype=torch.uint8), (20,) * 400, ("c",) * 400)
    episodes = Episodes({"train": classes}, ways=20, shots=1, queries=1, rotations=True)
    times = []
    for i in range(30):
        begun = time.perf_counter()
        episodes.meta_batch("train", 8 * i, 8)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.005


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 0}, "ways must be a whole number, at least 1"),
        ({"shots": 1.5}, r"shots must be a whole number.*got 1\.5"),
        ({"queries": True}, "queries must be a whole number"),
        ({"seed": -1}, "seed must be a whole number, at least 0.*got -1"),
        ({"ways": 13}, r"13-way tasks need 13 classes, and split 'train' has 12"),
        (
            {"shots": 5, "queries": 2},
            r"5 shots \+ 2 queries = 7 images.*class 'train0' of split 'train' has 6",
        ),
        ({"dtype": torch.int64}, "floating-point"),
        ({"mean": (0.1, 0.2)}, r"mean must be one number, or one for each of 1 channels; got \(0.1, 0.2\)"),
        ({"std": (0.0,)}, "std must be finite and positive"),
    ],
)
def test_bad_arguments(numbered, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        Episodes(numbered(), **{"ways": 5, "shots": 1, "queries": 1, **change})


def test_bad_datasets(numbered) -> None:
    arguments = {"ways": 2, "shots": 1, "queries": 1}
    with pytest.raises(ValueError, match=r"must map some of .* got the keys \['training'\]"):
        Episodes({"training": numbered()["train"]}, **arguments)
    with pytest.raises(ValueError, match="must map some of"):
        Episodes({}, **arguments)
    mixed = {"train": numbered()["train"], "val": numbered(shape=(1, 5, 5))["val"]}
    with pytest.raises(ValueError, match="one shape"):
        Episodes(mixed, **arguments)
    with pytest.raises(ValueError, match=r"square images; these are 4 x 6 \(height x width\)"):
        Episodes(numbered(shape=(1, 4, 6)), **arguments, rotations=True)


def test_bad_requests(numbered) -> None:
    episodes = Episodes({"train": numbered()["train"]}, ways=2, shots=1, queries=1)
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        episodes.task("test", 0)
    with pytest.raises(ValueError, match="task index must be a whole number, at least 0"):
        episodes.task("train", -1)
    with pytest.raises(ValueError, match="meta-batch size must be a whole number, at least 1"):
        episodes.meta_batch("train", 0, 0)


def test_class_images_check_themselves() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ClassImages(torch.zeros(2, 1, 2, 2), (2,), ("a",))
    with pytest.raises(ValueError, match="do not fit"):
        ClassImages(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), (1,), ("a",))
    classes = ClassImages(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), (2, 1, 2), ("a", "b", "c"))
    picked = classes.select([2, 0])
    assert picked.images.flatten().tolist() == [3, 4, 0, 1]
    assert (picked.sizes, picked.names) == ((2, 2), ("c", "a"))
    assert len(classes.select([]).images) == 0
