"""Quote the recorded benchmarks in docs/performance.md and README.md.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from innerloop.bench.contenders import FLOORS

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
FIGURES = ("<!-- figures: python benchmarks/tables.py -->", "<!-- end of figures -->")
SPEED = ("<!-- speed: python benchmarks/tables.py -->", "<!-- end of speed -->")

TITLES = {
    "omniglot-mamlpp": "MAML++ step: Omniglot 20-way 1-shot, 8 tasks, 5 steps, 64 filters, MSL, second order",
    "omniglot-maml": "MAML step: the same shape, last step's loss",
    "mini-imagenet-maml": "MAML step: mini-ImageNet 5-way 1-shot, 15 queries, 84x84x3, 48 filters, 2 tasks",
    "resnet12-maml": "MAML step: ResNet-12, 5-way 1-shot, 5 queries, 84x84x3, 1 task",
    "resnet12-small-images-maml": "MAML step: ResNet-12, 5-way 1-shot, 5 queries, 32x32x3, 2 tasks",
    "transformer-maml": "MAML step: a two-layer transformer of width 64, sequences of 32, 5-way 1-shot, 8 tasks",
    "transformer-wide-maml": "MAML step: the same of width 128, sequences of 64, 5-way 5-shot, 4 tasks",
    "sinusoid-maml": "MAML step: sinusoids, the paper's network, 25 tasks, 10 and 10 points, 1 inner step",
    "sinusoid-maml-5-steps": "MAML step: the same, 5 inner steps",
}
FILES = ("mamlpp.json", "maml.json", "sinusoid.json")
"""Records of the steps on a CPU; those that are there are quoted."""
GPU = "cuda.json"


def quoted() -> str:
    """The page's figures."""
    steps, others = (json.loads((RESULTS / file).read_text()) for file in ("mamlpp.json", "maml.json"))
    scaling = json.loads((RESULTS / "scaling.json").read_text())
    sampling = json.loads((RESULTS / "sampling.json").read_text())
    parts = [
        "## Figures",
        "\n\n".join(f"`{_command(record)}`" for record in _records(FILES)),
        f"{_machine(steps)}. float32 unless it says otherwise. {steps['rounds']} rounds of the first case, "
        f"{others['rounds']} of the others, each "
        "contender in a process of its own, in turn; medians, with the least and the most. Ratios are taken round by "
        "round. Memory is the peak of resident memory of all a contender's processes above what they hold with the "
        "libraries imported, then the same with it.",
        *(_case(name, record) for name, record in _cases().items()),
        "### Inner steps",
        f"{_machine(scaling)}; `python benchmarks/scaling.py`: MAML, Omniglot 20-way 1-shot, 2 tasks, one to each "
        "process; peak memory as above, then seconds of a step.",
        _inner_steps(scaling),
        "![Time and memory over inner steps, tasks, ways and filters](images/scaling.png)",
        "### Sampling",
        f"{_machine(sampling)}; `python benchmarks/sampling.py`: one process draws the 8 tasks of a MAML++ step from "
        f"the real Omniglot in {1e3 * sampling['sampling']:.1f} ms, {100 * sampling['share']:.2f}% of the step's "
        f"{1e3 * sampling['step']:.0f} ms. In training each process draws its own.",
    ]
    for gpu in _records((GPU,)):
        parts += [
            "### On a GPU",
            f"{_machine(gpu)}; `{_command(gpu)}`. Times between CUDA events, {gpu['rounds']} rounds; peak memory of "
            "the GPU's tensors, and kernels that it runs for a step.",
            *(_case(name, record) for name, record in gpu["cases"].items()),
        ]
    return "\n\n".join(parts)


def _case(name: str, record: dict[str, Any]) -> str:
    contenders = record["contenders"]
    on_gpu = any(m.get("kernels") is not None for m in contenders.values())
    columns = "peak memory of the GPU | kernels" if on_gpu else "peak memory | with libraries"
    lines = [
        f"### {TITLES[name]}",
        "",
        f"| | s/step | times innerloop's | {columns} |",
        "|---|---|---|---|---|",
    ]
    for who, m in contenders.items():
        ratio = m["times_innerloop"]
        cells = [
            who,
            _spread({"median": m["median"], "min": min(m["seconds"]), "max": max(m["seconds"])}, _digits(m["median"])),
            "" if ratio is None else _spread(ratio, 2),
            *((_megabytes(m["device_memory"]), str(m["kernels"])) if on_gpu else ()),
            *(() if on_gpu else (_megabytes(m["memory"]), _megabytes(m["memory_total"]))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for who, m in contenders.items():
        if m.get("compile_seconds") is not None:
            lines += ["", f"{who}: {m['compile_seconds']:.0f} s of compiling before, once."]
    for who, of in FLOORS.items():
        if who in contenders and "innerloop" in contenders:
            floor, ours = contenders[who]["seconds"], contenders["innerloop"]["seconds"]
            share = statistics.median(a / b for a, b in zip(floor, ours, strict=True))
            lines += ["", f"The {of} alone take {100 * share:.0f}% of innerloop's step."]
    return "\n".join(lines)


def _digits(seconds: float) -> int:
    """Decimals that show a time of this size."""
    return 3 if seconds >= 0.05 else 5


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"


def _inner_steps(scaling: dict[str, Any]) -> str:
    points = [p for p in scaling["points"] if p["axis"] == "inner_steps"]
    steps = sorted({p["value"] for p in points})
    lines = [f"| | {' | '.join(f'K = {k}' for k in steps)} |", "|---" * (len(steps) + 1) + "|"]
    for who in dict.fromkeys(p["contender"] for p in points):
        of = {p["value"]: p for p in points if p["contender"] == who}
        lines.append(f"| {who} | {' | '.join(_point(of[k]) for k in steps)} |")
    return "\n".join(lines)


def _point(point: dict[str, Any]) -> str:
    return f"{point['memory'] / 1e6:.0f} MB, {point['median']:.2f} s"


def _spread(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def _command(record: dict[str, Any]) -> str:
    return shlex.join(["innerloop", *record["environment"]["arguments"]])


def _machine(record: dict[str, Any]) -> str:
    where = record["environment"]
    return f"{where['device']}, {where['cores']} cores, torch {where['torch']}, commit {where['commit']}"


def _records(files: Sequence[str]) -> list[dict[str, Any]]:
    return [json.loads((RESULTS / file).read_text()) for file in files if (RESULTS / file).exists()]


def _cases() -> dict[str, Any]:
    return {name: case for record in _records(FILES) for name, case in record["cases"].items()}


def summary() -> str:
    """The README's paragraph and table."""
    cases, machine = _cases(), _machine(json.loads((RESULTS / "mamlpp.json").read_text()))
    rivals = ["plain loop", "higher", "torchopt"]
    if any("parallel-metalearn" in record["contenders"] for record in cases.values()):
        rivals.append("parallel-metalearn")
    lines = [
        "How many times as long the same step takes elsewhere (median over rounds; "
        f"`innerloop bench`, {machine}; [docs/performance.md](docs/performance.md)):",
        "",
        f"| step | s/step | {' | '.join(rivals)} |",
        "|---" * (len(rivals) + 2) + "|",
    ]
    for name, record in cases.items():
        contenders = record["contenders"]
        ratios = [contenders.get(who, {}).get("times_innerloop") for who in rivals]
        seconds = contenders["innerloop"]["median"]
        cells = [
            TITLES[name],
            f"{seconds:.{_digits(seconds)}f}",
            *(f"{r['median']:.2f}" if r else "" for r in ratios),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    plain, ours = (cases["omniglot-mamlpp"]["contenders"][who]["memory"] for who in ("plain loop", "innerloop"))
    lines += [
        "",
        f"Memory of the first: {ours / 1e6:.0f} MB above the libraries, of the plain loop {plain / 1e6:.0f} MB.",
    ]
    return "\n".join(lines)


def quote(text: str, markers: tuple[str, str], quotation: str) -> str:
    """A page's text with a quotation between its markers."""
    before, rest = text.split(markers[0])
    after = rest.split(markers[1])[1]
    return f"{before}{markers[0]}\n{quotation}\n{markers[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(quote(PAGE.read_text(), FIGURES, quoted()))
    README.write_text(quote(README.read_text(), SPEED, summary()))
