from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from innerloop import schedules
from innerloop.reports import run_panels, task_panels
from innerloop.reports.figures import (
    CurveTask,
    TaskPicture,
    draw_adapted_curves,
    draw_overview,
    draw_task,
    write_run_figures,
)
from innerloop.reports.records import read_run

PNG = b"\x89PNG\r\n\x1a\n"
NAMES = [f"blocks.{b}.{m}.{p}" for b in range(4) for m in (0, 1) for p in ("weight", "bias")]
NAMES += ["head.weight", "head.bias"]


def epoch_line(epoch: int, *, steps: int, names: list[str], regression: bool, **changed: Any) -> dict[str, Any]:
    accuracy = 0.97 - 0.5 * math.exp(-epoch / 4)
    line = {
        "epoch": epoch,
        "iterations": 500 * epoch,
        "seconds": 10.0 * epoch,
        "tasks_per_second": 8.0,
        "outer_lr": 1e-3,
        "derivative_order": 1 if epoch <= 4 else 2,
        "loss_weights": schedules.multi_step_loss_weights(steps, epoch - 1, 3),
        "train_loss": 3 / epoch,
        "train_accuracy": None if regression else accuracy + 0.01,
        "val_loss": 4 / epoch,
        "val_accuracy": None if regression else accuracy,
        "val_interval": 0.005,
        "val_tasks": 600,
        "val_losses_per_step": [9 / (k + epoch) for k in range(steps + 1)],
        "val_accuracies_per_step": None
        if regression
        else [0.05 + (accuracy - 0.05) * k / steps for k in range(steps + 1)],
        "gradient_norm_mean": 2.0 / epoch,
        "gradient_norm_max": 5.0 / epoch,
        "rates": {name: [0.1 + 0.001 * i - 0.01 * k for k in range(steps)] for i, name in enumerate(names)},
    }
    return {**line, **changed}


def make_run(
    run: Path,
    epochs: int = 8,
    *,
    steps: int = 5,
    names: list[str] = NAMES,
    regression: bool = False,
    changes: dict[int, dict[str, Any]] | None = None,
) -> Path:
    run.mkdir()
    data = {} if regression else {"ways": 20, "shots": 1}
    config = {"version": 1, "preset": "test", "config": {"data": data, "method": {"inner_lr": 0.1}}}
    (run / "config.json").write_text(json.dumps(config))
    lines = [
        json.dumps(epoch_line(e, steps=steps, names=names, regression=regression, **(changes or {}).get(e, {})))
        for e in range(1, epochs + 1)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def make_task(ways: int = 5, shots: int = 1, queries: int = 2, steps: int = 3, channels: int = 1) -> TaskPicture:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(ways), queries)
    table = np.full((steps + 1, len(labels), ways), 0.1 / max(ways - 1, 1))
    table[:, np.arange(len(labels)), labels] = 0.9
    table[0] = 1 / ways  # before adaptation: all alike, so every guess is class 0
    return TaskPicture(
        support_images=rng.integers(0, 256, (ways * shots, channels, 12, 12), dtype=np.uint8),
        support_labels=np.repeat(np.arange(ways), shots),
        query_images=rng.integers(0, 256, (len(labels), channels, 12, 12), dtype=np.uint8),
        query_labels=labels,
        probabilities=table,
        title="a task",
    )


def lines_of(axes: Any) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}


def assert_png(path: Path) -> None:
    assert path.read_bytes().startswith(PNG)


def test_a_run_gets_its_five_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    paths = write_run_figures(run)
    names = ["accuracy", "inner_steps", "rates", "msl_weights", "gradient_norm"]
    assert paths == [run / "figures" / f"{name}.png" for name in names]
    for path in paths:
        assert_png(path)
    assert sorted(p.name for p in (run / "figures").iterdir()) == sorted(p.name for p in paths)


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    before = [path.read_bytes() for path in write_run_figures(run)]
    assert [path.read_bytes() for path in write_run_figures(run)] == before


def test_pyplot_and_its_settings_are_left_alone(tmp_path: Path) -> None:
    import matplotlib as mpl

    settings = dict(mpl.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    write_run_figures(make_run(tmp_path / "run", 1))
    assert dict(mpl.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == loaded


@pytest.mark.parametrize(
    ("epochs", "steps", "tensors", "regression"),
    [(1, 5, 18, False), (1, 1, 2, True), (3, 1, 48, False), (3, 30, 0, True)],
)
def test_unusual_runs(tmp_path: Path, epochs: int, steps: int, tensors: int, regression: bool) -> None:
    names = [f"a_rather_long_module_name.blocks.{i}.convolution.weight" for i in range(tensors)]
    run = make_run(tmp_path / "run", epochs, steps=steps, names=names, regression=regression)
    written = {path.name for path in write_run_figures(run)}
    assert ("loss.png" in written) == regression
    assert ("accuracy.png" in written) != regression
    assert ("rates.png" in written) == (tensors > 0)


@pytest.mark.parametrize(("bad", "regression"), [(math.inf, True), (None, False)])
def test_values_that_are_not_finite(tmp_path: Path, bad: object, regression: bool) -> None:
    lost = dict.fromkeys(("train_loss", "val_loss", "val_interval", "gradient_norm_max", "gradient_norm_mean"), bad)
    arrays = {"val_losses_per_step": [bad] * 6, "rates": {name: [bad] * 5 for name in NAMES}}
    run = make_run(tmp_path / "run", 3, regression=regression, changes={3: {**lost, **arrays}})
    for path in write_run_figures(run):
        assert_png(path)
    axes = Figure().add_subplot()
    run_panels.gradient_norm_panel(axes, read_run(run))
    assert lines_of(axes)["not a finite number"].shape == (1,)


def test_run_with_nothing_finite(tmp_path: Path) -> None:
    lost = {
        "train_accuracy": math.nan,
        "val_accuracy": math.nan,
        "gradient_norm_max": 0,
        "gradient_norm_mean": 0,
    }
    arrays = {"val_accuracies_per_step": [math.nan] * 6}
    write_run_figures(make_run(tmp_path / "run", 1, changes={1: {**lost, **arrays}}))


def test_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in (whole[:-40], whole + b'{"epoch": 4, "it', whole + b'{"epoch": 4, "x": "\xc3'):
        path.write_bytes(cut)
        assert [record.epoch for record in read_run(run).epochs] == ([1, 2] if len(cut) < len(whole) else [1, 2, 3])
    write_run_figures(run)


@pytest.mark.parametrize("bad", [math.nan, None, "nan", "NaN"])
def test_lost_numbers_are_nan(tmp_path: Path, bad: object) -> None:
    changed = {"val_loss": bad, "val_losses_per_step": [bad, 1]}
    record = read_run(make_run(tmp_path / "run", 1, changes={1: changed})).epochs[0]
    assert math.isnan(record.val_loss)
    assert math.isnan(record.val_losses_per_step[0])


def test_an_epoch_recorded_again_counts_as_the_later_record(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    again = epoch_line(2, steps=5, names=NAMES, regression=False, val_accuracy=0.123)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    records = read_run(run).epochs
    assert [record.epoch for record in records] == [1, 2, 3]
    assert records[1].val_accuracy == 0.123


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1')
    with pytest.raises(ValueError, match="no finished epoch"):
        read_run(tmp_path)
    path.write_text("oops\n{}\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_run(tmp_path)
    path.write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match="line 1 has no 'val_accuracies_per_step'"):
        read_run(tmp_path)


def test_accuracy_panel_plots_percent_and_marks_the_best_epoch(tmp_path: Path) -> None:
    records = read_run(make_run(tmp_path / "run", changes={6: {"val_accuracy": 0.99}}))
    axes = Figure().add_subplot()
    run_panels.accuracy_panel(axes, records)
    lines = lines_of(axes)
    expected = [100 * (record.val_accuracy or 0) for record in records.epochs]
    np.testing.assert_allclose(lines["validation, 95% interval (600 tasks)"], expected)
    np.testing.assert_allclose(lines["best: 99.0% in epoch 6"], [99.0])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 6, 1].min() == pytest.approx(98.5)
    assert band[band[:, 0] == 6, 1].max() == pytest.approx(99.5)
    assert {text.get_text() for text in axes.texts} == {"second-order from here", "multi-step loss ends"}
    assert (records.derivative_switches, records.msl_end) == ([5], 4)
    assert axes.get_xlabel() == "epoch (500 iterations each)"


def test_loss_panel_is_logarithmic(tmp_path: Path) -> None:
    axes = Figure().add_subplot()
    run_panels.loss_panel(axes, read_run(make_run(tmp_path / "run", regression=True)))
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(lines_of(axes)["training tasks"], 3 / np.arange(1, 9))


def test_inner_steps_panel_shows_first_and_last_epoch_and_chance(tmp_path: Path) -> None:
    records = read_run(make_run(tmp_path / "run", 40))
    axes = Figure().add_subplot()
    run_panels.inner_steps_panel(axes, records)
    lines = lines_of(axes)
    assert {"epoch 1", "epoch 40"} <= lines.keys()
    last = records.epochs[-1].val_accuracies_per_step
    assert last is not None
    np.testing.assert_allclose(lines["epoch 40"], 100 * np.array(last))
    assert [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 2] == [[5.0, 5.0]]
    assert max(axes.get_yticks()) <= 100


def test_rates_panel_keeps_network_order_and_centres_on_the_initial_rate(tmp_path: Path) -> None:
    records = read_run(make_run(tmp_path / "run", 2))
    axes = Figure(figsize=(6, 6)).add_subplot()
    run_panels.rates_panel(axes, records)
    image = axes.images[0]
    assert isinstance(image, AxesImage)
    np.testing.assert_allclose(np.asarray(image.get_array()), list(records.epochs[-1].rates.values()))
    assert (image.norm.vmin + image.norm.vmax) / 2 == pytest.approx(0.1)
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first tensor on top
    assert len(axes.texts) == 18 * 5
    assert axes.texts[4].get_text() == "0.060"


def test_rates_are_not_printed_where_they_do_not_fit(tmp_path: Path) -> None:
    names = [f"layer{i}.weight" for i in range(60)]
    axes = Figure(figsize=(4, 3)).add_subplot()
    run_panels.rates_panel(axes, read_run(make_run(tmp_path / "run", 1, names=names)))
    assert not axes.texts


def test_msl_weights_panel_has_a_line_for_every_step(tmp_path: Path) -> None:
    records = read_run(make_run(tmp_path / "run"))
    axes = Figure().add_subplot()
    run_panels.msl_weights_panel(axes, records)
    lines = lines_of(axes)
    assert list(lines) == ["step 1", "step 2", "step 3", "step 4", "step 5 (last)"]
    np.testing.assert_allclose(lines["step 5 (last)"], [r.loss_weights[-1] for r in records.epochs])
    shade = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (shade.x0, shade.x1) == (pytest.approx(0.5), pytest.approx(4.5))


@pytest.mark.parametrize(("ways", "shots", "channels"), [(5, 1, 1), (2, 20, 3), (20, 5, 1)])
def test_draw_task(tmp_path: Path, ways: int, shots: int, channels: int) -> None:
    task = make_task(ways, shots, channels=channels)
    fields = {name: getattr(task, name) for name in TaskPicture.__dataclass_fields__}
    assert_png(draw_task(tmp_path / "new" / "task.png", TaskPicture(**fields)))


def test_task_panel_counts_all_query_images_and_says_what_it_leaves_out() -> None:
    axes = Figure().add_subplot()
    task_panels.task_panel(axes, make_task(20, 7, queries=3))
    texts = [text.get_text() for text in axes.texts]
    assert "right, of 60 query images:" in texts
    assert "5%" in texts
    assert texts.count("100%") == 3
    assert "shown: 10 of 20 classes, 5 of 7 shots" in texts
    assert texts.count("0.90") == 30
    assert len(axes.images) == 10 * 6
    markers = [line.get_marker() for line in axes.lines]
    assert (markers.count("X"), markers.count("o")) == (9 + 1, 31 + 1)  # and one of each in the key


def test_a_class_without_a_query_image_has_an_empty_row() -> None:
    task = make_task(3, queries=1)
    few = TaskPicture(
        task.support_images, task.support_labels, task.query_images[:2], [0, 1], np.full((2, 2, 3), 1 / 3)
    )
    axes = Figure().add_subplot()
    task_panels.task_panel(axes, few)
    assert len(axes.images) == 3 + 2


def test_task_picture_says_what_does_not_fit() -> None:
    good = make_task()
    fields = {name: getattr(good, name) for name in TaskPicture.__dataclass_fields__}
    for changed, message in (
        ({"query_labels": [0]}, r"query_labels must be \[10\]"),
        ({"query_labels": [5] * 10}, "query_labels must be from 0 to 4"),
        ({"probabilities": np.ones((4, 3, 5))}, r"probabilities must be \[K\+1, 10, ways\]"),
        ({"support_images": np.zeros((5, 28, 28), np.uint8)}, r"support_images must be \[n, C, H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskPicture(**{**fields, **changed})


def curve_task() -> CurveTask:
    x = np.linspace(-5, 5, 50)[:, None]
    return CurveTask(x[::5], np.sin(x[::5]), x, np.sin(x), {0: 0 * x, 1: np.sin(x) + 0.5, 10: np.sin(x) + 0.1})


def test_adapted_curves(tmp_path: Path) -> None:
    assert_png(draw_adapted_curves(tmp_path / "one.png", tasks=[curve_task()]))
    assert_png(draw_adapted_curves(tmp_path / "four.png", tasks=[curve_task()] * 4))
    with pytest.raises(ValueError, match="tasks is empty"):
        draw_adapted_curves(tmp_path / "none.png", tasks=[])
    axes = Figure().add_subplot()
    task_panels.curve_panel(axes, curve_task())
    lines = lines_of(axes)
    assert {
        "target",
        "after 1 step: MSE 0.25",
        "after 10 steps: MSE 0.01",
        "support (10 points)",
    } <= lines.keys()
    np.testing.assert_allclose(lines["after 1 step: MSE 0.25"], np.sin(np.linspace(-5, 5, 50)) + 0.5)


@pytest.mark.parametrize("regression", [False, True])
def test_overview(tmp_path: Path, regression: bool) -> None:
    run = make_run(tmp_path / "run", regression=regression)
    path = draw_overview(tmp_path / "overview.png", run, task=make_task())
    assert_png(path)
    header = path.read_bytes()[16:24]
    assert (int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) == (1920, 688)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_adapted_curves(path, tasks=[curve_task()])
    before = path.read_bytes()
    broken = curve_task()._replace(predictions={0: [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"predictions\[0\] must have 50 values"):
        draw_adapted_curves(path, tasks=[broken])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
