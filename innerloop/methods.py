"""The methods, each a value of the same few arguments: what an ablation switches is here and nowhere else.

| method   | derivative order | alpha                         | w         | per-step state      | adapted parameters  |
|----------|------------------|-------------------------------|-----------|---------------------|---------------------|
| MAML     | 2                | one constant                  | last step | none                | all                 |
| FOMAML   | 1                | one constant                  | last step | none                | all                 |
| Meta-SGD | 2                | learned, per element          | last step | none                | all                 |
| ANIL     | 2                | one constant                  | last step | none                | the head            |
| BOIL     | 2                | one constant                  | last step | none                | all but the head    |
| MAML++   | 1 then 2 (DA)    | learned, per tensor and step  | annealed  | norm layers (BNRS,  | all but norm layers |
|          |                  | (LSLR)                        | (MSL)     | BNWB)               |                     |
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from innerloop import schedules
from innerloop.update_rules import UPDATE_RULES, InnerRule

MAX_RATE = 1e38
"""What a float32 still holds."""


def whole_number(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is smaller.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r:.80}")
    if number < least:
        raise ValueError(f"{name} must be {least} or more, got {number}")
    return number


def _checked(name: str, value: Any, default: Any) -> Any:
    """A field's value, if it is of the kind of its default."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name} is a switch, True or False; got {value!r:.80}")
        return value
    if isinstance(default, int):
        return whole_number(name, value, least=-sys.maxsize)
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r:.80}")
        return float(value)
    if isinstance(default, tuple):
        if isinstance(value, str):
            raise ValueError(f"{name} is a tuple of patterns: write ({value!r},)")
        if not isinstance(value, tuple | list) or not all(isinstance(pattern, str) for pattern in value):
            raise TypeError(
                f"{name} is a tuple of patterns over the parameters' names, such as ('head.*',); got {value!r:.80}"
            )
        return tuple(value)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name, got {value!r:.80}")
    return value


@dataclass(frozen=True)
class Method:
    """A meta-learning method: plain MAML with switches."""

    inner_steps: int = 5
    """K, gradient steps on the support set in training."""
    inner_lr: float = 0.1
    """Inner rate alpha; where rates are learned, the value they start from."""
    inner_rule: InnerRule = "sgd"
    """How an inner step uses the gradient: sgd, momentum or adam."""
    adapt: tuple[str, ...] = ("*",)
    """Parameters the inner loop adapts: shell patterns over their names."""
    adapt_except: tuple[str, ...] = ()
    """Patterns of parameters the inner loop leaves as they are; they are still meta-learned."""
    zero_init: tuple[str, ...] = ()
    """Patterns of adapted parameters that start from zero in every task and are not meta-learned. A head of zeros
    treats all classes alike, however a task numbers them (Ye & Chao 2022), and may be of any width."""
    second_order: bool = True
    """Exact meta-gradients; without, first-order (FOMAML)."""
    meta_sgd: bool = False
    """Meta-SGD: a learned rate for every element."""
    msl: bool = False
    """MSL, multi-step loss: the query loss after every inner step counts, annealed to the last."""
    msl_epochs: int = 10
    """Epochs over which MSL is annealed."""
    da: bool = False
    """DA, derivative-order annealing: first-order meta-gradients in the first epochs."""
    da_epochs: int = 50
    """Epochs of first order under DA."""
    bnrs: bool = False
    """BNRS: running statistics of the norm layers for every inner step."""
    bnwb: bool = False
    """BNWB: weights and biases of the norm layers for every inner step, meta-learned and not adapted."""
    lslr: bool = False
    """LSLR: a learned rate for every parameter tensor and inner step."""
    ca: bool = False
    """CA: cosine annealing of the outer rate (done by who runs the outer optimiser, see ``schedules.cosine_rate``)."""

    def __post_init__(self) -> None:
        """Raise ``TypeError`` for values of the wrong kind, ``ValueError`` for such as do not make a method."""
        # Fields of a frozen dataclass are set so. Whole numbers of NumPy and lists of patterns are taken.
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _checked(field.name, value, field.default))
        for name in ("inner_steps", "msl_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.da_epochs < 0:
            raise ValueError(f"da_epochs must be at least 0, got {self.da_epochs}")
        if self.inner_steps > 10_000:
            raise ValueError(
                f"inner_steps must be at most 10000, got {self.inner_steps}: learned rates are kept for each"
            )
        if not abs(self.inner_lr) <= MAX_RATE:
            raise ValueError(f"inner_lr must be a number of at most {MAX_RATE:g}, got {self.inner_lr}")
        if self.inner_rule not in UPDATE_RULES:
            raise ValueError(f"inner_rule must be one of {', '.join(UPDATE_RULES)}, got {self.inner_rule!r}")
        if self.lslr and self.meta_sgd:
            raise ValueError("lslr and meta_sgd both learn the inner rates: switch one of them off")

    @property
    def needs_epoch(self) -> bool:
        """Whether the meta-gradient depends on the epoch (MSL and DA)."""
        return self.msl or self.da

    def loss_weights(self, epoch: float) -> list[float]:
        """w_1 .. w_K of the query losses at this epoch."""
        if self.msl:
            return schedules.multi_step_loss_weights(self.inner_steps, epoch, self.msl_epochs)
        return schedules.last_step_weights(self.inner_steps)

    def derivative_order(self, epoch: float) -> int:
        """1 or 2 at this epoch."""
        if not self.second_order:
            return 1
        return schedules.derivative_order(epoch, self.da_epochs) if self.da else 2


def maml(**switches: Any) -> Method:
    """MAML (Finn et al. 2017), with any switch of ``Method`` set on top."""
    return Method(**switches)


def fomaml(**switches: Any) -> Method:
    """First-order MAML (Finn et al. 2017, section 5.2)."""
    return Method(**{"second_order": False, **switches})


def meta_sgd(**switches: Any) -> Method:
    """Meta-SGD (Li et al. 2017)."""
    return Method(**{"meta_sgd": True, **switches})


def anil(head: str = "head.*", **switches: Any) -> Method:
    """ANIL (Raghu et al. 2020): almost no inner loop, only the head adapts. ``head`` is a pattern of its names."""
    return Method(**{"adapt": (head,), **switches})


def boil(head: str = "head.*", **switches: Any) -> Method:
    """BOIL (Oh et al. 2021): body only inner loop, all but the head adapts. ``head`` is a pattern of its names."""
    return Method(**{"adapt_except": (head,), **switches})


def maml_plus_plus(**switches: Any) -> Method:
    """MAML++ (Antoniou et al. 2019): MAML with all six repairs. Switch any off to see what it gives."""
    repairs = dict.fromkeys(("msl", "da", "bnrs", "bnwb", "lslr", "ca"), True)
    return Method(**{**repairs, **switches})


METHODS: dict[str, Callable[..., Method]] = {
    "maml": maml,
    "fomaml": fomaml,
    "meta_sgd": meta_sgd,
    "anil": anil,
    "boil": boil,
    "maml_plus_plus": maml_plus_plus,
}
"""Every method by its name."""
