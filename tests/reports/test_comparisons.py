from __future__ import annotations

import csv
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from innerloop.reports import comparison_panels, comparisons, paper, tables
from innerloop.reports.estimates import estimate
from innerloop.reports.groups import Comparison, find_runs, group_runs, method_label, settings
from innerloop.reports.groups import comparisons as compared

from .synthetic import write_grid, write_run

PNG = b"\x89PNG\r\n\x1a\n"
MAML, PLUS = ("maml", {}), ("maml_plus_plus", {})


def one(*runs: Path) -> Comparison:
    (comparison,) = compared(find_runs(runs))
    return comparison


def test_the_papers_figures() -> None:
    column = [figure.text() for figure in paper.FIGURES["omniglot", 20, 1].values()]
    assert column == [
        "91.27 ± 1.07", "91.53 ± 0.69", "95.77 ± 0.38", "95.35 ± 0.23", "93.03 ± 0.44", "92.30 ± 0.55", "95.93 ± 0.38†",
        "97.65 ± 0.05",
    ]  # fmt: skip
    assert list(paper.FIGURES["omniglot", 20, 1]) == list(paper.ABLATION_ROWS)
    texts = {(task, method): f.text() for task, row in paper.FIGURES.items() for method, f in row.items()}
    assert texts[("omniglot", 20, 5), "MAML"] == "98.78"
    assert texts[("omniglot", 20, 5), "Meta-SGD"] == "98.97 ± 0.19†"
    assert texts[("omniglot", 20, 5), "MAML++"] == "99.33 ± 0.03"
    assert texts[("omniglot", 5, 1), "MAML++"] == "99.47"
    assert texts[("omniglot", 5, 5), "MAML++"] == "99.93"
    assert texts[("mini-imagenet", 5, 1), "MAML"] == "48.25 ± 0.62"
    assert texts[("mini-imagenet", 5, 5), "MAML"] == "64.39 ± 0.31"
    assert texts[("mini-imagenet", 5, 5), "MAML++"] == "68.32 ± 0.44"
    assert [f.text() for f in paper.ORIGINAL_MAML.values()] == [
        "95.80 ± 0.30†", "98.90 ± 0.20†", "98.70", "99.90", "48.70 ± 1.84†", "63.11 ± 0.92†",
    ]  # fmt: skip
    steps = [paper.figure(("mini-imagenet", 5, 1), "MAML++", k) for k in range(1, 7)]
    assert [f and f.accuracy for f in steps] == [51.05, 51.49, 51.11, 51.65, 52.15, None]
    assert paper.figure(("omniglot", 20, 1), "MAML", inner_steps=1) is None


def test_an_estimate_keeps_the_two_spreads_apart() -> None:
    found = estimate([0.9, 0.94, 0.95], [0.01, 0.02, 0.02], 600)
    assert found.mean == pytest.approx(0.93)
    assert found.deviation == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.02**2) / 2))
    assert found.interval == pytest.approx(0.03 / 3)
    assert found.scaled(100).over_seeds() == "93.00 ± 2.65"
    assert found.scaled(100).over_tasks() == "± 1.00"
    assert tables.paired(found.scaled(100)) == "93.00 ± 2.65 over seeds, ± 1.00 over tasks"
    alone = estimate([0.9], [0.01], 600)
    assert alone.deviation is None
    assert alone.over_seeds() == "0.90"
    assert tables.paired(alone.scaled(100)) == "90.00 ± 1.00 over tasks"


def test_an_interval_over_the_tasks_of_all_seeds_is_that_of_their_mean() -> None:
    # Simulated: the mean over 3 seeds, fixed but of different accuracy, of 500 tasks each.
    rng = np.random.default_rng(0)
    tasks = np.array([0.9, 0.93, 0.96])[:, None] + 0.05 * rng.standard_normal((4000, 3, 500))
    half = 1.96 * tasks[0].std(axis=1, ddof=1) / math.sqrt(500)
    found = estimate(tasks[0].mean(axis=1).tolist(), half.tolist(), 500)
    assert found.interval == pytest.approx(1.96 * tasks.mean(axis=(1, 2)).std(), rel=0.1)


def test_runs_are_grouped_over_seeds_whatever_the_machine(tmp_path: Path) -> None:
    for seed in (10, 9, 2):
        changes = {"compute.device": f"cuda:{seed}", "compute.threads": seed, "data.data": f"/data/{seed}"}
        # Without DA its epochs have no effect.
        write_run(tmp_path / f"seed-{seed}", [0.5], seed=seed, changes={**changes, "method.da_epochs": seed}, test=0.9)
    runs = find_runs([tmp_path, tmp_path / "seed-2"])
    assert [run.path.name for run in runs] == ["seed-2", "seed-9", "seed-10"]
    (group,) = group_runs(runs)
    assert [run.seed for run in group.runs] == [2, 9, 10]
    figure = group.tested("ensemble")
    assert figure is not None
    assert (figure.mean, figure.deviation) == (pytest.approx(0.9), pytest.approx(0.0))


def test_a_seed_that_was_run_twice_is_no_second_seed(tmp_path: Path) -> None:
    for name in ("before", "after"):
        write_run(tmp_path / name, [0.5], test=0.9)
    labels = [group.label for group in one(tmp_path).groups]
    assert labels == ["MAML (after)", "MAML (before)"]
    assert all(len(group.runs) == 1 for group in one(tmp_path).groups)


def test_records_from_before_a_setting_are_what_its_default_is(tmp_path: Path) -> None:
    for seed, path in ((0, tmp_path / "old"), (1, tmp_path / "new")):
        write_run(path, [0.5], seed=seed, test=0.9)
    text = (tmp_path / "old" / "config.json").read_text()
    for setting in ('"precision": "float32", ', '"adapt_except": [], '):
        assert setting in text
        text = text.replace(setting, "")
    (tmp_path / "old" / "config.json").write_text(text)
    assert len(group_runs(find_runs([tmp_path]))) == 1


@pytest.mark.parametrize(
    ("method", "changes", "label"),
    [
        ("maml", {}, "MAML"),
        ("fomaml", {}, "FOMAML"),
        ("maml", {"compute.mode": "first-order"}, "FOMAML"),
        ("maml", {"method.bnrs": True, "method.bnwb": True}, "MAML + BNWB + BNRS"),
        ("meta_sgd", {}, "Meta-SGD"),
        ("anil", {}, "ANIL"),
        ("boil", {}, "BOIL"),
        ("maml_plus_plus", {}, "MAML++"),
        ("maml_plus_plus", {"method.da": False}, "MAML++ without DA"),
        ("maml_plus_plus", {"method.second_order": False}, "first-order MAML++"),
    ],
)
def test_methods_have_the_papers_names(tmp_path: Path, method: str, changes: dict[str, Any], label: str) -> None:
    (run,) = find_runs([write_run(tmp_path / "run", [0.5], method=method, changes=changes)])
    assert method_label(settings(run)) == label


def test_schedules_and_tasks_are_never_in_one_table(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"outer.iterations": 500, "outer.epochs": 100, "outer.meta_batch": 8},
        {"data.shots": 5},
        {"outer.meta_batch": 2},
        {"evaluation.test_tasks": 100},
    ]
    for place, changed in enumerate(changes):
        write_run(tmp_path / f"run-{place}", [0.5], changes=changed, test=0.9)
    found = compared(find_runs([tmp_path]))
    assert [len(comparison.groups) for comparison in found] == [1] * 5
    captions = [tables.accuracy_table(comparison).caption for comparison in found]
    assert len(set(captions)) == 5
    assert "160 outer updates (reduced; the paper's: 50,000, 8 tasks each)" in captions[0]
    assert captions[1].endswith("50,000 outer updates (the paper's full schedule)")
    assert captions[2].startswith("Omniglot 20-way 5-shot")
    assert captions[4].endswith("test_tasks 100")
    assert len({end for _, end in comparisons._each([tmp_path])}) == 5  # files of their own


def test_centring_is_part_of_a_recipe_and_said_once(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", [0.5], test=0.8)
    centred = write_run(tmp_path / "centred", [0.5], changes={"data.centre": True}, test=0.9)
    both = one(plain, centred)
    assert both.task == "Omniglot 20-way 1-shot"
    assert [group.label for group in both.groups] == ["MAML", "MAML, centred drawings"]
    assert one(centred).task == "Omniglot 20-way 1-shot, centred drawings"
    assert one(centred).groups[0].label == "MAML"


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        find_runs([tmp_path])
    write_run(tmp_path / "run", [0.5])
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        find_runs([tmp_path])


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    rows = {
        "maml": MAML,
        "mamlpp": PLUS,
        "lslr": ("maml", {"method.lslr": True}),
        "bn": ("maml", {"method.bnrs": True}),
    }
    tests = {"maml": [0.9, 0.92, None], "mamlpp": [0.97, 0.98, 0.96], "lslr": [0.95], "bn": [0.5]}
    return write_grid(tmp_path / "grid", rows, tests)


def test_the_table_of_single_repairs(grid: Path, tmp_path: Path) -> None:
    text, numbers, picture = comparisons.write_ablation([grid], tmp_path)
    assert [path.name for path in (text, numbers, picture)] == ["ablation.md", "ablation.csv", "ablation.png"]
    assert picture.read_bytes().startswith(PNG)
    rows = {
        cells[0]: cells[1:]
        for line in text.read_text().splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
        if len(cells) == 7
    }
    assert list(rows) == ["method", *paper.ABLATION_ROWS, "MAML + BNRS"]
    # Deviation over seeds with n - 1; the interval of the mean of two means whose own is ± 1 point.
    deviation = 100 * statistics.stdev([0.9, 0.92])
    assert rows["MAML"] == [
        "2 of 3 (seed 2 diverged in epoch 3 of 4)",
        f"91.00 ± {deviation:.2f}",
        f"± {1 / math.sqrt(2):.2f}",
        f"89.00 ± {deviation:.2f}",
        f"± {1 / math.sqrt(2):.2f}",
        "91.27 ± 1.07",
    ]
    assert rows["MAML + LSLR"] == ["1", "95.00", "± 1.00", "93.00", "± 1.00", "95.77 ± 0.38"]
    assert rows["MAML + CA"] == ["not run", "–", "–", "–", "–", "93.03 ± 0.44"]
    assert rows["MAML + BNRS"][-1] == "–"
    assert "of the survivors" in text.read_text()
    with numbers.open() as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert list(table) == list(rows)[1:]
    assert float(table["MAML++"]["ensemble_batch_mean"]) == pytest.approx(97)
    assert float(table["MAML++"]["ensemble_batch_deviation_over_seeds"]) == pytest.approx(1)
    assert float(table["MAML++"]["best_support_mean"]) == pytest.approx(75)
    assert table["MAML + LSLR"]["ensemble_batch_deviation_over_seeds"] == ""
    assert (table["MAML"]["seeds_run"], table["MAML"]["seeds_finished"], table["MAML"]["seeds_diverged"]) == (
        "3",
        "2",
        "1",
    )
    assert table["Meta-SGD"]["paper_spread_is"] == "as the method's own paper gives it"
    assert table["MAML + CA"]["seeds_run"] == "0"


def test_the_figure_of_single_repairs(grid: Path) -> None:
    axes = Figure().add_subplot()
    comparison = one(grid)
    comparison_panels.rows_panel(axes, comparison, tables.ablation_rows(comparison))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "MAML\n(2 of 3 seeds finished)"
    assert labels[7] == "MAML++"
    dots = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    assert np.allclose(sorted(dots), [[50.0], [91.0], [95.0], [97.0]])
    assert sum(text.get_text() == "not run" for text in axes.texts) == 5
    squares = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "s"]
    assert np.allclose(sorted(squares), np.sort([[g.tested("best").mean] for g in comparison.groups], axis=0) * 100)
    diamonds = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "D")
    assert diamonds == sorted(figure.accuracy for figure in paper.FIGURES["omniglot", 20, 1].values())


def test_other_rows_are_drawn_as_they_are_in_their_grid(tmp_path: Path) -> None:
    centred = {"data.centre": True}
    rows = {
        "plain": PLUS,
        "centre": ("maml_plus_plus", centred),
        "at-once": ("maml_plus_plus", {**centred, "method.da_epochs": 0}),
    }
    grid = write_grid(tmp_path / "grid", rows, {"plain": [0.8], "centre": [0.9], "at-once": [0.95]})
    comparison = one(grid)
    assert [group.tested("ensemble").mean for group in comparison.groups] == [0.8, 0.9, 0.95]
    assert comparisons.fitting(comparison) == ["rows", "stability"]
    names = [path.name for path in comparisons.write_grid([grid], tmp_path / "out")]
    assert names == ["results.md", "rows.png", "stability.png"]
    (grid / "grid.json").write_text("[")
    with pytest.raises(ValueError, match=r"grid\.json is not JSON"):
        find_runs([grid])


def test_normalisations_that_were_not_recorded_are_dashes(tmp_path: Path) -> None:
    write_run(tmp_path / "old", [0.5], test=0.9, scores=("batch", "running"))
    write_run(tmp_path / "new", [0.5], method="maml_plus_plus", test=0.9)
    rows = tables.normalisation_table(one(tmp_path)).rows
    assert [row[2:] for row in rows if row[:2] == ["MAML", "ensemble"]] == [
        ["90.00 ± 1.00 over tasks", "80.00 ± 1.00 over tasks", "–"]
    ]
    assert [row[-1] for row in rows if row[0] == "MAML++"] == ["70.00 ± 1.00 over tasks", "68.00 ± 1.00 over tasks"]


@pytest.mark.parametrize(
    ("single", "five", "says"),
    [
        ([0.95, 0.96], [0.9, 0.91], r"is ahead of five-step MAML .* by 5\.00 points: more than their deviations"),
        ([0.9, 0.91], [0.95, 0.96], r"is behind five-step MAML .* by 5\.00 points: more than their deviations"),
        ([0.9, 0.96], [0.9, 0.94], r"is ahead of .* by 1\.00 points: no more than their deviations"),
        ([0.9], [0.9], r"is level with five-step MAML .*: no more than the 95% interval over tasks of the difference"),
        ([], [0.9], "not both were run"),
    ],
)
def test_one_step_against_five_in_words(tmp_path: Path, single: list[float], five: list[float], says: str) -> None:
    rows = {"maml": MAML, "one": ("maml_plus_plus", {"method.inner_steps": 1}), "five": PLUS}
    grid = write_grid(tmp_path / "grid", rows, {"maml": five, "one": single, "five": [0.97]})
    assert re.search(says, tables.steps_words(one(grid), "ensemble"))
    text, picture = comparisons.write_steps([grid], tmp_path / "out")
    assert picture.read_bytes().startswith(PNG)
    lines = text.read_text().splitlines()
    both = [tables.steps_words(one(grid), which) for which in ("ensemble", "best")]
    assert both[0] != both[1]
    assert set(both) <= set(lines)
    assert any(line.startswith("| MAML++, 2 inner steps | not run |") for line in lines)
    assert any(line.startswith("| MAML++, 5 inner steps | 1 | 97.00 |") for line in lines)


def test_speed_is_counted_to_the_first_epoch_that_was_there(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed-0", [0.5, 0.72, 0.65, 0.8], seed=0, test=0.9)
    write_run(tmp_path / "a" / "seed-1", [0.5, 0.55, 0.6, 0.61], seed=1, test=0.9)
    rows = tables.speed_table(one(tmp_path)).rows
    deviation = f"{statistics.stdev([80, 120]):.0f}"
    assert rows[0] == [
        "MAML",
        "outer updates",
        f"100 ± {deviation}",
        "80 (1 of 2 seeds)",
        "160 (1 of 2 seeds)",
        "not reached",
    ]
    assert rows[1][2:4] == ["25 ± 7", "20 (1 of 2 seeds)"]


def test_curves_end_where_runs_did(grid: Path) -> None:
    comparison = one(grid)
    maml = comparison.groups[0]
    axes = Figure().add_subplot()
    comparison_panels.curves_panel(axes, [maml])
    ends = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "X"]
    assert ends == [(2.0, 10.0)]
    (mean,) = [line for line in axes.lines if line.get_marker() == "s"]
    # As far as all seeds go; of 50, 50, 50 and of 70, 70, 10.
    np.testing.assert_allclose(mean.get_ydata(), [50.0, 50.0])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 2, 1].max() == pytest.approx(50 + statistics.stdev([70, 70, 10]))
    labels = [str(handle.get_label()) for handle in comparison_panels.legend_handles([maml])]
    assert labels == ["MAML: 3 seeds, band: deviation over seeds", "diverged here"]


def test_a_single_seed_has_the_interval_over_tasks(tmp_path: Path) -> None:
    comparison = one(write_run(tmp_path / "run", [0.5, 0.6]))
    axes = Figure().add_subplot()
    comparison_panels.curves_panel(axes, comparison.groups, clock="seconds")
    band = axes.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 20.0, 1].max() == pytest.approx(62)
    labels = [str(handle.get_label()) for handle in comparison_panels.legend_handles(comparison.groups)]
    assert labels == ["MAML: 1 seed, band: 95% interval over tasks", "not finished"]
    assert axes.get_xlabel() == "training time, seconds"


def test_a_grid_gets_what_fits_it(grid: Path, tmp_path: Path) -> None:
    write_run(grid / "maml" / "seed-7", [], seed=7)  # diverged before its first epoch ended
    written = comparisons.write_grid([grid], tmp_path / "out")
    assert all(path.read_bytes().startswith(PNG) for path in written if path.suffix == ".png")
    names = {path.name for path in written}
    assert names == {
        "results.md",
        "ablation.md",
        "ablation.csv",
        "ablation.png",
        "stability.png",
        "speed.md",
        "speed.png",
    }
    speed = (tmp_path / "out" / "speed.md").read_text().splitlines()
    assert {line.split("|")[1].strip() for line in speed if line.startswith("| MAML")} == {"MAML", "MAML++"}
    alone = write_run(tmp_path / "alone", [0.5], method="maml_plus_plus", test=0.9)
    assert comparisons.fitting(one(alone)) == ["stability"]
    write_run(tmp_path / "none", [])
    assert comparisons.fitting(one(tmp_path / "none")) == []
