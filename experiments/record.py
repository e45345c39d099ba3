"""Keep a run's records in the repository, and quote the recorded figures in the README.

python experiments/record.py RUN NAME    copy a finished run to experiments/results/NAME, and quote it
python experiments/record.py             quote what is recorded
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: python experiments/record.py -->", "<!-- end of results -->"

REPAIRS = ("msl", "da", "bnrs", "bnwb", "lslr", "ca")


def record(run: Path, name: str) -> None:
    """Copy what is small of a finished run: all but its checkpoints.

    Where the data lay is a matter of the machine it ran on: of that path only the last part is kept.
    """
    if not (run / "summary.json").is_file():
        raise SystemExit(f"{run} is not a finished run: it has no summary.json")
    target = RESULTS / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints"))
    data = json.loads((run / "config.json").read_text())["config"]["data"]["data"]
    for file in (target / "config.json", target / "summary.json") if data else ():
        file.write_text(file.read_text().replace(data, Path(data).name))


def quoted() -> str:
    """The README's tables: a row for each recorded run."""
    runs = [(path.parent, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/summary.json"))]
    configs = {folder: json.loads((folder / "config.json").read_text())["config"] for folder, _ in runs}
    classification = [(f, s) for f, s in runs if configs[f]["data"]["dataset"] != "sinusoid"]
    regression = [(f, s) for f, s in runs if configs[f]["data"]["dataset"] == "sinusoid"]
    lines = [
        "| run | task | method | updates x tasks | training | test tasks | transductive: best, ensemble | inductive |",
        "|---|---|---|---|---|---|---|---|",
        *(_classification_row(f, s, configs[f]) for f, s in classification),
        "",
        "Regression: mean squared error after a number of inner steps.",
        "",
        "| run | method | test tasks | support points | before | 1 step | 10 steps |",
        "|---|---|---|---|---|---|---|",
        *(_regression_row(f, s, configs[f]) for f, s in regression),
    ]
    machines = {
        f"{s['environment']['device']}, {s['environment']['cores']} cores, torch {s['environment']['torch']}"
        for _, s in runs
    }
    lines += ["", f"One seed each. Machine: {'; '.join(sorted(machines))}."]
    return "\n".join(lines)


def _classification_row(folder: Path, summary: dict[str, Any], config: dict[str, Any]) -> str:
    data, test = config["data"], summary["test"]
    best, ensemble = test["best"], test["ensemble"]
    cells = [
        f"[{folder.name}](experiments/results/{folder.name})",
        f"{data['dataset']} {data['ways']}-way {data['shots']}-shot",
        _method(config["method"]),
        f"{summary['iterations']} x {config['outer']['meta_batch']}",
        f"{summary['train_seconds'] / 60:.1f} min",
        str(best["batch"]["tasks"]),
        f"{_percent(best['batch'])}, {_percent(ensemble['batch'])}",
        _percent(best["running"]),
    ]
    return f"| {' | '.join(cells)} |"


def _regression_row(folder: Path, summary: dict[str, Any], config: dict[str, Any]) -> str:
    steps = summary["test"]["per_step"]
    cells = [
        f"[{folder.name}](experiments/results/{folder.name})",
        _method(config["method"]),
        str(summary["test"]["best"]["batch"]["tasks"]),
        str(config["data"]["shots"]),
        *(f"{steps[k]['loss']:.3f} ± {steps[k]['interval']:.3f}" for k in (0, 1, 10)),
    ]
    return f"| {' | '.join(cells)} |"


def _method(method: dict[str, Any]) -> str:
    on = [switch.upper() for switch in REPAIRS if method[switch]]
    if len(on) == len(REPAIRS):
        return "MAML++"
    base = "Meta-SGD" if method["meta_sgd"] else "MAML" if method["second_order"] else "FOMAML"
    return " + ".join([base, *on])


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.2f} ± {100 * score['interval']:.2f}%"


def quote(text: str) -> str:
    """The README's text with the tables of today's records."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{quoted()}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) == 3:
        record(Path(sys.argv[1]), sys.argv[2])
    elif len(sys.argv) != 1:
        raise SystemExit(__doc__)
    README.write_text(quote(README.read_text()))
