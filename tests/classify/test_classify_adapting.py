"""From a run to a classifier, and what the classifier says."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import innerloop
from innerloop import boil, maml, maml_plus_plus, meta_sgd
from innerloop.classify import Adaptation, Classifier, MetaTrained, Unreadable
from innerloop.data import Episodes, omniglot
from innerloop.training.building import build_learner, build_preprocessing
from innerloop.training.config import PRESETS, Config, ConfigError, DataConfig, NetworkConfig

Draw = Callable[..., Image.Image]
MakeRun = Callable[..., Path]
SMALL = NetworkConfig(filters=8)


@pytest.fixture
def trained(tmp_path: Path, make_run: MakeRun) -> MetaTrained:
    return innerloop.load(make_run(tmp_path / "run"))


@pytest.fixture
def any_ways(tmp_path: Path, make_run: MakeRun) -> MetaTrained:
    method = maml(inner_steps=5, inner_lr=0.4, zero_init=("head.*",))
    return innerloop.load(make_run(tmp_path / "zeros", Config(network=SMALL, method=method)))


def new_drawings(shapes: Draw, kinds: tuple[str, ...] = ("bar", "dot", "post"), each: int = 4) -> list[Image.Image]:
    return [shapes(kind, 4 + i) for kind in kinds for i in range(each)]


def test_the_core_is_imported_without_any_of_this() -> None:
    program = (
        "import sys, innerloop; print([m for m in sys.modules if m.startswith(('innerloop.cl', 'PIL', 'pydantic'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "innerloop.classify" not in done.stdout
    assert "PIL" not in done.stdout
    assert "pydantic" not in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = innerloop.nothing


def test_adapting_does_not_wait_for_pytorchs_compiler(tmp_path: Path, make_run: MakeRun, support_folder: Path) -> None:
    run = make_run(tmp_path / "run", Config(network=SMALL, method=maml_plus_plus(zero_init=("head.*",))))
    program = (
        "import sys, innerloop\n"
        f"innerloop.load({str(run)!r}).adapt({str(support_folder)!r}).save({str(tmp_path / 'my.safetensors')!r})\n"
        f"innerloop.Classifier.load({str(tmp_path / 'my.safetensors')!r})\n"
        "print([m for m in ('torch._dynamo', 'sympy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_person_gets_a_classifier_that_works(any_ways: MetaTrained, support_folder: Path, shapes: Draw) -> None:
    classifier = any_ways.adapt(support_folder)
    assert classifier.classes == ("bar", "dot", "post")
    # Much like the support's: the run has learned nothing.
    kinds = [kind for kind in ("bar", "dot", "post") for _ in range(3)]
    found = classifier.predict([shapes(kind, i % 3, ink=60, page=225) for i, kind in enumerate(kinds)])
    assert sum(p.name == kind for p, kind in zip(found, kinds, strict=True)) >= 8
    for prediction in found:
        assert list(prediction.probabilities) == ["bar", "dot", "post"]
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert prediction.probability == max(prediction.probabilities.values())
    one = classifier.probabilities([shapes("bar", ink=60, page=225)])
    assert torch.allclose(one, torch.tensor([list(found[0].probabilities.values())]), atol=1e-5)
    assert classifier.predict([]) == []
    assert classifier.probabilities([]).shape == (0, 3)


@pytest.mark.parametrize("normalisation", ["support", "running", "batch"])
def test_it_is_what_the_learner_gives(
    tmp_path: Path, make_run: MakeRun, support_folder: Path, shapes: Draw, normalisation: str
) -> None:
    """Beside it, the same done by hand: pixels turned over, divided, and given to a learner of as many ways."""
    config = Config(data=DataConfig(ways=3), network=SMALL, method=maml_plus_plus(inner_steps=3))
    trained = innerloop.load(make_run(tmp_path / "run", config))
    learner = build_learner(config, torch.device("cpu"))
    learner.load_state_dict(trained.state)

    def by_hand(images: list[Image.Image]) -> torch.Tensor:
        small = [np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS)) for image in images]
        return 1 - torch.from_numpy(np.stack(small)).float()[:, None] / 255

    files = [Image.open(f) for kind in ("bar", "dot", "post") for f in sorted((support_folder / kind).iterdir())]
    support = by_hand(files), torch.arange(3).repeat_interleave(3)
    network = learner.adapt(support, 3, normalisation)  # type: ignore[arg-type]
    queries = new_drawings(shapes)
    with torch.no_grad():
        wanted = network(by_hand(queries)).softmax(1)
    adaptation = trained.adaptation(support_folder, normalisation=normalisation)  # type: ignore[arg-type]
    found = adaptation.classifier.probabilities(queries)
    assert torch.allclose(found, wanted, atol=1e-4)
    steps = adaptation.probabilities(queries)
    assert steps.shape == (4, 12, 3)
    assert torch.allclose(steps[-1], found, atol=1e-5)
    with torch.no_grad():
        logits = network(by_hand(files))
    assert adaptation.support_losses.shape == adaptation.support_accuracies.shape == (4,)
    assert adaptation.support_losses[-1] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, support[1])), abs=1e-3
    )
    assert adaptation.support_accuracies[-1] == pytest.approx(float((logits.argmax(1) == support[1]).float().mean()))


@pytest.mark.parametrize("normalisation", ["support", "running"])
def test_an_image_is_judged_by_itself(
    any_ways: MetaTrained, support_folder: Path, shapes: Draw, normalisation: str
) -> None:
    classifier = any_ways.adapt(support_folder, normalisation=normalisation)  # type: ignore[arg-type]
    images = new_drawings(shapes, each=60)
    together = classifier.probabilities(images)
    backwards = classifier.probabilities(images[::-1]).flip(0)
    alone = torch.cat([classifier.probabilities([image]) for image in images[::20]])
    assert torch.allclose(together, backwards, atol=1e-5)
    assert torch.allclose(together[::20], alone, atol=1e-5)


def test_by_batch_statistics_images_see_each_other(any_ways: MetaTrained, support_folder: Path, shapes: Draw) -> None:
    classifier = any_ways.adapt(support_folder, normalisation="batch")
    images = new_drawings(shapes, each=60)  # more than are classified together otherwise
    together = classifier.probabilities(images)
    assert torch.allclose(classifier.probabilities(images[::-1]).flip(0), together, atol=1e-4)
    assert not torch.allclose(classifier.probabilities(images[:5]), together[:5], atol=1e-4)


def test_any_number_of_ways(any_ways: MetaTrained, shapes: Draw) -> None:
    assert any_ways.any_ways
    for ways in (2, 5, 13):
        support = {f"class {i}": [shapes("dot", i), shapes("bar", i)][: 1 + i % 2] for i in range(ways)}
        adaptation = any_ways.adaptation(support)
        assert adaptation.classifier.probabilities([shapes("dot")]).shape == (1, ways)
        assert adaptation.support_losses[0] == pytest.approx(np.log(ways), abs=1e-5)  # zeros treat all alike
        assert adaptation.support.shots == tuple(1 + i % 2 for i in range(ways))


@pytest.mark.parametrize(("ways", "share"), [(2, 0.4), (5, 1.0), (8, 1.0)])
def test_with_fewer_classes_an_image_moves_the_weights_as_far_as_in_training(
    any_ways: MetaTrained, shapes: Draw, ways: int, share: float
) -> None:
    """A run of 5-way tasks. From a head of zeros, the biases of the first step by hand."""
    support = {f"class {i}": [shapes("dot", i)] for i in range(ways)}
    support["class 0"].append(shapes("bar"))
    adaptation = any_ways.adaptation(support, weighing="images")
    bias = adaptation.fast_weights[1]["head.bias"]
    images = torch.tensor([2.0] + [1.0] * (ways - 1))
    by_hand = 0.4 * share * (images / (ways + 1) - 1 / ways)  # cross-entropy at equal logits: mean of p - y
    assert torch.allclose(bias, by_hand, atol=1e-6)


@pytest.mark.parametrize("method", [maml_plus_plus(inner_steps=3), meta_sgd(), boil(), maml(bnwb=True)])
def test_a_learned_head_serves_as_many_ways_as_it_has(
    tmp_path: Path, make_run: MakeRun, shapes: Draw, method: innerloop.Method
) -> None:
    trained = innerloop.load(make_run(tmp_path / "run", Config(network=SMALL, method=method)))
    assert not trained.any_ways
    support = {kind: [shapes(kind)] for kind in ("bar", "dot", "post", "slope", "box", "other")}
    few = dict(list(support.items())[:2])
    adaptation = trained.adaptation(few)
    assert adaptation.classifier.probabilities([shapes("dot")]).shape == (1, 2)
    head = trained.state.get("adapted/head.weight", trained.state.get("shared/head.weight"))
    assert head is not None
    assert torch.equal(adaptation.learner.model.head.weight.detach(), head[:2])  # type: ignore[union-attr, index, operator]
    with pytest.raises(ConfigError, match=r"trained for 5 classes.*cannot tell 6 apart.*--zero-init"):
        trained.adapt(support)


def test_steps(trained: MetaTrained, support_folder: Path) -> None:
    assert len(trained.adaptation(support_folder).support_losses) == 4
    assert len(trained.adaptation(support_folder, steps=7).support_losses) == 8
    adaptation = trained.adaptation(support_folder, steps=0)
    assert len(adaptation.support_losses) == 1
    assert adaptation.classifier.support["steps"] == 0
    for options in ({"steps": -1}, {"normalisation": "none"}, {"ink": "red"}):
        with pytest.raises(ValueError, match="must be"):
            trained.adapt(support_folder, **options)  # type: ignore[arg-type]


def test_fast_weights_that_blow_up_are_an_error(tmp_path: Path, make_run: MakeRun, support_folder: Path) -> None:
    config = Config(network=SMALL, method=maml(inner_lr=1e30))
    with pytest.raises(ValueError, match="adapting diverged within 5 inner steps"):
        innerloop.load(make_run(tmp_path / "run", config)).adapt(support_folder)


def test_a_callers_random_numbers_are_left_alone(trained: MetaTrained, support_folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    trained.adapt(support_folder)
    assert torch.equal(torch.rand(3), expected)


def test_adapting_again_gives_the_same(trained: MetaTrained, support_folder: Path, shapes: Draw) -> None:
    one, other = (trained.adapt(support_folder).probabilities([shapes("dot")]) for _ in range(2))
    assert torch.equal(one, other)


def test_an_estimate_is_what_adapting_without_each_image_gives(
    any_ways: MetaTrained, support_folder: Path, shapes: Draw
) -> None:
    adaptation = any_ways.adaptation(support_folder)
    estimate = adaptation.estimate()
    assert estimate is not None
    images = {k: [Image.open(f) for f in sorted((support_folder / k).iterdir())] for k in ("bar", "dot", "post")}
    correct = 0
    for kind, own in images.items():
        for i in range(3):
            kept = {k: v if k != kind else own[:i] + own[i + 1 :] for k, v in images.items()}
            correct += any_ways.adapt(kept).predict([own[i]])[0].name == kind
    assert (estimate.images, estimate.correct, estimate.kind) == (9, correct, "leave-one-out")
    assert any_ways.adaptation({"a": [shapes("dot")], "b": [shapes("bar")]}).estimate() is None


class TestInk:
    """A run of bright ink, and drawings of either."""

    def test_dark_ink_is_turned_over(self, trained: MetaTrained, support_folder: Path, shapes: Draw) -> None:
        classifier = trained.adapt(support_folder)
        assert classifier.preprocessing.invert
        assert "dark ink, and are turned over" in classifier.notes[0]
        bright = {
            kind: [Image.open(f).point(lambda v: 255 - v) for f in sorted((support_folder / kind).iterdir())]
            for kind in ("bar", "dot", "post")
        }
        other = trained.adapt(bright)
        assert not other.preprocessing.invert
        assert other.notes == ()
        dark = shapes("dot", 5)
        assert torch.allclose(
            classifier.probabilities([dark]), other.probabilities([dark.point(lambda v: 255 - v)]), atol=1e-5
        )

    def test_a_query_in_another_ink_is_said(
        self, trained: MetaTrained, support_folder: Path, shapes: Draw, caplog: pytest.LogCaptureFixture
    ) -> None:
        classifier = trained.adapt(support_folder)
        with caplog.at_level(logging.WARNING):
            classifier.predict([shapes("dot"), Image.effect_noise((40, 40), 120)])
            assert caplog.text == ""
            classifier.predict([shapes("dot"), shapes("dot", ink=240, page=5)])
        assert "1 image (image 2) is not in dark ink as the support images are" in caplog.text

    def test_a_person_may_say_what_it_is(self, trained: MetaTrained, support_folder: Path) -> None:
        assert not trained.adapt(support_folder, ink="bright").preprocessing.invert
        assert trained.adapt(support_folder, ink="dark").preprocessing.invert

    def test_what_has_no_page_is_taken_as_the_run_has_it(self, trained: MetaTrained) -> None:
        noise = {name: [Image.effect_noise((40, 40), 120)] for name in ("a", "b")}
        classifier = trained.adapt(noise)
        assert not classifier.preprocessing.invert
        assert "do not agree on what is page" in classifier.notes[0]

    def test_a_run_of_photographs_takes_images_as_they_are(
        self, tmp_path: Path, make_run: MakeRun, support_folder: Path
    ) -> None:
        data = DataConfig(dataset="folder", image_size=32, channels=3)
        trained = innerloop.load(make_run(tmp_path / "run", Config(data=data, network=SMALL)))
        classifier = trained.adapt(support_folder)
        assert not classifier.preprocessing.invert
        assert classifier.notes == ()
        with pytest.raises(ValueError, match="does not know drawings"):
            trained.adapt(support_folder, ink="dark")


class TestRuns:
    """What is loaded, and what is no run."""

    def test_the_checkpoint_best_on_validation(self, tmp_path: Path, make_run: MakeRun) -> None:
        run = make_run(tmp_path / "run", checkpoints=((0.5, 1.0), (0.9, 2.0), (0.9, 3.0), (0.1, 4.0)))
        trained = innerloop.load(run)
        assert trained.epoch == 3  # of two that are as good, the later one, as in the run's own test
        first = innerloop.load(make_run(tmp_path / "other"))
        assert torch.allclose(trained.state["adapted/head.weight"], 3 * first.state["adapted/head.weight"])

    def test_the_one_that_ships(self, tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("innerloop.classify.meta_trained.PACKAGED", make_run(tmp_path / "strokes"))
        assert innerloop.load().path == tmp_path / "strokes"

    def test_what_is_no_run(self, tmp_path: Path, make_run: MakeRun) -> None:
        with pytest.raises(ConfigError, match="there is no run at"):
            innerloop.load(tmp_path / "nowhere")
        (tmp_path / "folder").mkdir()
        with pytest.raises(ConfigError, match=r"has no config\.json"):
            innerloop.load(tmp_path / "folder")
        with pytest.raises(ConfigError, match="a run of regression"):
            innerloop.load(make_run(tmp_path / "sinusoid", PRESETS["sinusoid"].config()))
        with pytest.raises(ConfigError, match="no finished epoch"):
            innerloop.load(make_run(tmp_path / "new", checkpoints=()))

    @pytest.mark.omniglot
    def test_files_are_prepared_as_in_training(self, omniglot_root: Path, tmp_path: Path, make_run: MakeRun) -> None:
        data = DataConfig(dataset="omniglot", data=omniglot_root)
        preprocessing = build_preprocessing(Config(data=data))
        held_out = omniglot(omniglot_root, cache=False)["test"]
        from innerloop.data.omniglot import evaluation_characters

        characters = evaluation_characters(omniglot_root, "paper", 0)
        name = next(iter(characters))
        first = held_out.starts[held_out.names.index(name)]
        for i, drawing in enumerate(characters[name]):
            pixels = torch.from_numpy(preprocessing.pixels(drawing.read()))
            assert torch.equal(pixels, held_out.images[first + i])


def test_inputs_are_those_of_training() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8, generator=generator)
    from innerloop.data import ClassImages

    preprocessing = build_preprocessing(Config(data=DataConfig(dataset="folder", image_size=20, channels=3)))
    dataset = {"test": ClassImages(images, (2, 2), ("a", "b"))}
    assert preprocessing.mean is not None
    source = Episodes(dataset, ways=2, shots=1, queries=1, mean=preprocessing.mean, std=preprocessing.std)  # type: ignore[arg-type]
    task = source.task("test", 0)
    mine = preprocessing.inputs(images)
    for image in torch.cat([task.support.inputs, task.query.inputs]):
        assert any(torch.equal(image, own) for own in mine)


def test_streaming_goes_on_past_what_cannot_be_read(
    any_ways: MetaTrained, support_folder: Path, shapes: Draw, tmp_path: Path
) -> None:
    classifier = any_ways.adapt(support_folder)
    images = [shapes("dot", i) for i in range(300)]
    mixed = [tmp_path / "none.png", *images, b"", b"text", images[0]]
    found = list(classifier.stream(mixed))
    assert [i for i, f in enumerate(found) if isinstance(f, Unreadable)] == [0, 301, 302]
    assert isinstance(found[0], Unreadable)
    assert found[0].name == str(tmp_path / "none.png")
    assert found[303] == found[1]
    with pytest.raises(ValueError, match=r"3 of 304 images cannot be read:\n.*none\.png") as caught:
        classifier.predict(mixed)
    assert "image 302: the file is empty" in str(caught.value)


def test_streaming_reads_only_so_far_ahead(any_ways: MetaTrained, support_folder: Path, shapes: Draw) -> None:
    taken: list[int] = []

    def images():
        for i in range(5000):
            taken.append(i)
            yield shapes("dot", i)

    next(iter(any_ways.adapt(support_folder).stream(images())))
    assert len(taken) < 1000


def test_adaptations_have_what_the_page_shows(trained: MetaTrained, support_folder: Path) -> None:
    adaptation = trained.adaptation(support_folder)
    assert isinstance(adaptation, Adaptation)
    assert isinstance(adaptation.classifier, Classifier)
    assert adaptation.classes == ("bar", "dot", "post")
    assert replace(adaptation.preprocessing, invert=False) == trained.preprocessing
