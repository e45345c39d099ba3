"""The papers' figures, to stand beside measured ones: accuracy in percent on test tasks.

Sources: Antoniou et al. 2019 (MAML++; also its authors' replication of MAML), Finn et al. 2017 (MAML), Li et al. 2017
(Meta-SGD). All were obtained with the query set normalised by its own batch's statistics (transductive). Those of
MAML++ and of the replication are the test accuracy of an ensemble of five checkpoints, mean and deviation over three
seeds.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Spread = Literal["deviation over seeds", "as the method's own paper gives it"]

SCHEDULE = {"epochs": 100, "iterations": 500}
"""The outer loop of all of MAML++'s experiments."""
META_BATCH: dict[object, int] = {"omniglot": 8, "mini-imagenet": 2}


class PaperFigure(NamedTuple):
    """One figure of a table.

    Attributes:
        accuracy: percent.
        spread: what stands after the ±, percent; None where nothing does.
        spread_is: what the ± is. A deviation over seeds is not an interval over tasks.
    """

    accuracy: float
    spread: float | None = None
    spread_is: Spread = "deviation over seeds"

    def text(self) -> str:
        """As it is printed in a table, without the percent sign; † marks a ± that is no deviation over seeds."""
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        mark = "†" if self.spread is not None and self.spread_is != "deviation over seeds" else ""
        return f"{self.accuracy:.2f}{spread}{mark}"


def _original(accuracy: float, spread: float | None = None) -> PaperFigure:
    return PaperFigure(accuracy, spread, "as the method's own paper gives it")


ABLATION_ROWS = (
    "MAML",
    "MAML + MSL",
    "MAML + LSLR",
    "MAML + BNWB + BNRS",
    "MAML + CA",
    "MAML + DA",
    "Meta-SGD",
    "MAML++",
)
"""The rows of the paper's table of single repairs, in its order."""

Task = tuple[object, object, object]
"""Data set, ways, shots, as a run's config has them."""

FIGURES: dict[Task, dict[str, PaperFigure]] = {
    ("omniglot", 20, 1): {
        "MAML": PaperFigure(91.27, 1.07),
        "MAML + MSL": PaperFigure(91.53, 0.69),
        "MAML + LSLR": PaperFigure(95.77, 0.38),
        "MAML + BNWB + BNRS": PaperFigure(95.35, 0.23),
        "MAML + CA": PaperFigure(93.03, 0.44),
        "MAML + DA": PaperFigure(92.3, 0.55),
        "Meta-SGD": _original(95.93, 0.38),
        "MAML++": PaperFigure(97.65, 0.05),
    },
    ("omniglot", 20, 5): {
        "MAML": PaperFigure(98.78),
        "Meta-SGD": _original(98.97, 0.19),
        "MAML++": PaperFigure(99.33, 0.03),
    },
    ("omniglot", 5, 1): {"MAML++": PaperFigure(99.47)},
    ("omniglot", 5, 5): {"MAML++": PaperFigure(99.93)},
    ("mini-imagenet", 5, 1): {"MAML": PaperFigure(48.25, 0.62), "MAML++": PaperFigure(52.15, 0.26)},
    ("mini-imagenet", 5, 5): {"MAML": PaperFigure(64.39, 0.31), "MAML++": PaperFigure(68.32, 0.44)},
}
"""MAML++'s paper. Its rows of MAML are its authors' replication."""

ORIGINAL_MAML: dict[Task, PaperFigure] = {
    ("omniglot", 20, 1): _original(95.8, 0.3),
    ("omniglot", 20, 5): _original(98.9, 0.2),
    ("omniglot", 5, 1): _original(98.7),
    ("omniglot", 5, 5): _original(99.9),
    ("mini-imagenet", 5, 1): _original(48.70, 1.84),
    ("mini-imagenet", 5, 5): _original(63.11, 0.92),
}
"""MAML, as its own paper gives it."""

MAML_PLUS_PLUS_STEPS: dict[Task, dict[int, PaperFigure]] = {
    ("mini-imagenet", 5, 1): {
        1: PaperFigure(51.05),
        2: PaperFigure(51.49),
        3: PaperFigure(51.11),
        4: PaperFigure(51.65),
        5: PaperFigure(52.15, 0.26),
    }
}
"""MAML++ by the number of inner steps."""


def figure(task: Task, method: str, inner_steps: int = 5) -> PaperFigure | None:
    """What the paper has for a method on a task (data set, ways, shots); None where it has nothing."""
    if method == "MAML++" and task in MAML_PLUS_PLUS_STEPS:
        return MAML_PLUS_PLUS_STEPS[task].get(inner_steps)
    if inner_steps != 5:
        return None
    return FIGURES.get(task, {}).get(method)
