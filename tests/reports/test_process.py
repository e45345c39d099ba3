from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from innerloop import MetaLearner, maml, maml_plus_plus
from innerloop.data import ClassImages, Episodes
from innerloop.nn import Conv4
from innerloop.reports.process import (
    Moment,
    ProcessRecord,
    decoded_image,
    encoded_image,
    read_process,
    write_process,
)
from innerloop.reports.process_panel import draw_process, process_panel
from innerloop.training.figures import process_record

from .synthetic import write_run


def make_record(steps: int = 3, classes: int = 5, channels: int = 1) -> ProcessRecord:
    rng = np.random.default_rng(0)
    images = [encoded_image(rng.integers(0, 256, (channels, 9, 9), dtype=np.uint8)) for _ in range(classes)]
    return ProcessRecord(
        method="MAML++",
        task="Omniglot 20-way 1-shot, test task 0",
        checkpoint_epoch=7,
        ways=20,
        shots=1,
        queries=1,
        support_images=[[image] for image in images],
        query_images=images,
        support_losses=[2.0 / (k + 1) for k in range(steps + 1)],
        query_losses=[3.0 / (k + 1) for k in range(steps + 1)],
        query_accuracies=[k / steps for k in range(steps + 1)],
        rates={"a": [0.1] * steps, "b": [-0.02] * steps},
        start=Moment(1, [1 / steps] * steps, 1),
        end=Moment(10, [0.0] * (steps - 1) + [1.0], 2),
        first_order_epochs=4,
        learned=["inner rates"],
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_comes_back_as_it_was(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (channels, 7, 5), dtype=np.uint8)
    back = decoded_image(encoded_image(image))
    np.testing.assert_array_equal(back if channels == 3 else back[..., None], np.moveaxis(image, 0, -1))


def test_a_record_is_drawn_again_from_its_file(tmp_path: Path) -> None:
    record = make_record()
    path = write_process(tmp_path / "process.json", record)
    assert read_process(path) == record
    picture = draw_process(tmp_path / "process.png", record)
    again = draw_process(tmp_path / "again.png", read_process(path))
    assert again.read_bytes() == picture.read_bytes()


def test_a_damaged_record_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "process.json"
    values = asdict(make_record())
    for changed, says in (
        ({**values, "version": 2}, "version 2"),
        ({**values, "support_losses": [1.0]}, "support_losses must have 4 values for 3 inner steps, got 1"),
        ({**values, "rates": {"a": [0.1]}}, r"rates\['a'\] must have 3 values"),
        ({**values, "colour": "red"}, "colour"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=says):
            read_process(path)
    with pytest.raises(FileNotFoundError):
        read_process(tmp_path / "nowhere.json")


def test_the_outer_loss_is_the_weighted_sum() -> None:
    record = make_record()
    assert record.outer_loss(record.start) == pytest.approx((1.5 + 1.0 + 0.75) / 3)
    assert record.outer_loss(record.end) == pytest.approx(0.75)


def texts(record: ProcessRecord) -> list[str]:
    axes = Figure().add_subplot()
    process_panel(axes, record)
    return [text.get_text() for text in axes.texts]


def test_the_picture_shows_losses_weights_rates_and_orders() -> None:
    record = make_record()
    shown = texts(record)
    assert [text for text in shown if text.startswith("query loss")] == [
        "query loss 3.00", "query loss 1.50", "query loss 1.00", "query loss 0.75",
    ]  # fmt: skip
    assert [text for text in shown if text.startswith("support loss")] == [
        "support loss 2.00", "support loss 1.00", "support loss 0.67",
    ]  # fmt: skip
    assert shown.count("0.33") == 3  # the first epoch's weights
    assert (shown.count("1.00"), shown.count("0"), shown.count("×")) == (1, 2, 2)  # the last's
    assert shown.count("α 0.040 (−0.020 to 0.10)") == 3
    words = " ".join(shown)
    assert "first order in the first 4 epochs" in words
    assert "Learned with $\\theta^0$: inner rates." in words
    plain = replace(record, start=replace(record.end, epoch=1), method="MAML", learned=[])
    shown = texts(plain)
    assert shown.count("1.00") == 1
    assert "Only the query loss after the last inner step, $\\theta^{3}$, enters the outer loss." in " ".join(shown)
    assert "Nothing but $\\theta^0$ is learned." in " ".join(shown)


@pytest.mark.parametrize(("steps", "classes", "channels"), [(1, 2, 3), (12, 5, 1)])
def test_unusual_sizes_are_drawn(tmp_path: Path, steps: int, classes: int, channels: int) -> None:
    record = make_record(steps, classes, channels)
    assert draw_process(tmp_path / "process.png", record).stat().st_size > 10_000
    chain = [text for text in texts(record) if text.startswith("$\\theta^{")]
    assert chain[-1] == f"$\\theta^{{{steps}}}$"
    assert len(chain) == min(steps + 1, 5)


@pytest.fixture
def episodes() -> Episodes:
    images = torch.randint(0, 256, (24, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = ClassImages(images, (4,) * 6, tuple("abcdef"))
    return Episodes({"train": split, "val": split, "test": split}, ways=3, shots=1, queries=2)


def test_a_record_of_plain_maml_is_what_a_naive_loop_gives(episodes: Episodes, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3))
    run = write_run(tmp_path / "run", [0.5], test=0.9)
    record = process_record(run, MetaLearner(model, F.cross_entropy, maml(inner_steps=3, inner_lr=0.2)), episodes)
    (x, y), (query, targets) = episodes.task("test", 0)
    weight, bias = (p.detach().clone() for p in model.parameters())
    for k in range(4):
        outputs = query.flatten(1) @ weight.T + bias
        assert record.query_losses[k] == pytest.approx(float(F.cross_entropy(outputs, targets)), rel=1e-5)
        assert record.query_accuracies[k] == pytest.approx(float((outputs.argmax(1) == targets).float().mean()))
        weight.requires_grad_(), bias.requires_grad_()
        loss = F.cross_entropy(x.flatten(1) @ weight.T + bias, y)
        assert record.support_losses[k] == pytest.approx(float(loss.detach()), rel=1e-5)
        steps = torch.autograd.grad(loss, (weight, bias))
        weight, bias = (p.detach() - 0.2 * g for p, g in zip((weight, bias), steps, strict=True))
    assert record.start.loss_weights == record.end.loss_weights == [0.0, 0.0, 1.0]
    assert record.rates["1.weight"] == pytest.approx([0.2] * 3)
    assert (record.queries, len(record.query_images), len(record.support_images)) == (2, 3, 3)
    assert record.learned == []
    np.testing.assert_array_equal(
        decoded_image(record.support_images[1][0]), episodes.images("test", 0).support.inputs[1, 0]
    )


def test_a_record_of_maml_plus_plus_has_the_weights_and_orders_of_its_schedule(
    episodes: Episodes, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    method = maml_plus_plus(inner_steps=2, msl_epochs=3, da_epochs=2)
    run = write_run(tmp_path / "run", [0.5] * 4, method="maml_plus_plus", changes={"method.inner_steps": 2}, test=0.9)
    record = process_record(run, MetaLearner(Conv4(3, 1, 16, 4), F.cross_entropy, method), episodes, index=3)
    assert record.start == Moment(1, [0.5, 0.5], 1)
    assert record.end == Moment(4, [0.0, 1.0], 2)
    assert record.first_order_epochs == 2
    assert record.method == "MAML++"
    assert record.task.endswith("test task 3")
    assert len(record.learned) == 3
    result = MetaLearner(Conv4(3, 1, 16, 4), F.cross_entropy, method)
    assert len(record.rates) == len(result.meta.adapted)


def test_the_support_loss_is_the_one_that_training_descends(episodes: Episodes, tmp_path: Path) -> None:
    torch.manual_seed(0)
    learner = MetaLearner(Conv4(3, 1, 16, 4), F.cross_entropy, maml_plus_plus(inner_steps=2))
    with torch.no_grad():
        for tensor in learner.meta.per_step.values():  # so that the steps' norm layers differ
            tensor.add_(0.3 * torch.randn_like(tensor))
    run = write_run(tmp_path / "run", [0.5] * 4, method="maml_plus_plus", changes={"method.inner_steps": 2}, test=0.9)
    record = process_record(run, learner, episodes)
    task = episodes.meta_batch("test", 0, 1)
    trained = learner.task_gradients(task, epoch=0)
    np.testing.assert_allclose(record.support_losses[:2], trained.support_losses[0].detach(), rtol=1e-4)
    np.testing.assert_allclose(record.query_losses[1:], trained.query_losses[0].detach(), rtol=1e-4)
