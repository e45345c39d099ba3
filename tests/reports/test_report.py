from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from innerloop.cli.main import main
from innerloop.reports.page import Report, write_report
from innerloop.reports.process import write_process

from .synthetic import write_grid, write_run
from .test_process import make_record


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("report")
    grid = write_grid(
        tmp_path / "runs" / "grid",
        {"maml": ("maml", {}), "mamlpp": ("maml_plus_plus", {})},
        {"maml": [0.9, None], "mamlpp": [0.97, 0.98]},
    )
    write_run(tmp_path / "runs" / "going", [0.5, 0.6], seed=5)
    write_run(tmp_path / "runs" / "other", [0.5, 0.6], changes={"outer.iterations": 500}, test=0.8)
    figures = grid / "mamlpp" / "seed-0" / "figures"
    figures.mkdir()
    write_process(figures / "process.json", make_record())
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def reported(runs: Path) -> tuple[Report, list[Path]]:
    return write_report([runs], runs.parent / "out" / "all.html", title="a < b & c")


def test_the_page_needs_nothing_else_and_says_what_was_run(reported: tuple[Report, list[Path]]) -> None:
    report, written = reported
    assert [path.name for path in written[:2]] == ["all.html", "all.md"]
    text = written[0].read_text()
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == len(written) - 2
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\(|@import", text)
    assert "a < b & c" in page.words
    assert "<b>" not in text  # from a run's command
    words = " ".join(page.words)
    assert "innerloop train <b> --seed 1" in words
    assert "6 runs: 4 finished, 1 diverged, 1 not finished." in words
    assert "1 of 3 (seed 1 diverged in epoch 3 of 4; seed 5 not finished: 2 of 4 epochs)" in words
    assert "one task through the inner and the outer loop" in words
    assert len(report.sections) == 2
    targets = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    anchors = {f"#{attributes['id']}" for tag, attributes in page.tags if tag == "h2"}
    assert targets == anchors


def test_the_markdown_has_the_same_tables_and_its_pictures_are_there(reported: tuple[Report, list[Path]]) -> None:
    report, written = reported
    text = written[1].read_text()
    for section in report.sections:
        for block in section.blocks:
            for table in block.tables:
                assert table.markdown() in text
                assert section.schedule.rstrip(".") in table.caption or table.caption == "Commands"
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == len(written) - 2
    assert all((written[1].parent / picture).is_file() for picture in pictures)


def test_the_command_says_what_it_wrote(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = runs / "grid" / "maml" / "seed-0"
    assert main(["report", str(one)]) == 0
    assert f"report: {one / 'report' / 'report.html'}" in capsys.readouterr().out
    assert main(["report", str(one), str(runs / "other"), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["html"]).is_file()
    assert all(Path(path).is_file() for path in said["figures"])
    first, second = said["comparisons"]
    assert first["groups"][0]["accuracy"]["ensemble_batch"] == {
        "mean": pytest.approx(0.9),
        "deviation_over_seeds": None,
        "interval_over_tasks": pytest.approx(0.01),
        "seeds": 1,
        "tasks_per_seed": 600,
    }
    assert second["groups"][0]["runs"][0]["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is not a folder: give run folders"),
        ([], "give at least one run"),
        (["RUN", "--out", "FILE"], "is a file: name a folder, or a file that ends in .html"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    arguments: list[str], says: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(runs / "other"), "FILE": str(runs / "other" / "config.json")}
    try:
        code = main(["report", *(names.get(argument, argument) for argument in arguments)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert says in " ".join(capsys.readouterr().err.split())
