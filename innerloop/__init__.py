"""MAML and MAML++ for any PyTorch model."""

from typing import TYPE_CHECKING, Any

from innerloop import nn
from innerloop.captured import CapturedGradients
from innerloop.learner import MetaBatchResult, MetaLearner, NonFiniteLossError
from innerloop.methods import METHODS, Method, anil, boil, fomaml, maml, maml_plus_plus, meta_sgd
from innerloop.tasks import Examples, Task, stack_tasks

if TYPE_CHECKING:
    from innerloop.classify import Classifier, load

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CapturedGradients",
    "Classifier",
    "Examples",
    "MetaBatchResult",
    "MetaLearner",
    "Method",
    "NonFiniteLossError",
    "Task",
    "anil",
    "boil",
    "fomaml",
    "load",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "nn",
    "stack_tasks",
]


def __getattr__(name: str) -> Any:
    """``load`` and ``Classifier``, imported when first asked for: the core needs nothing of what they need."""
    if name in ("load", "Classifier"):
        from innerloop import classify

        return getattr(classify, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
