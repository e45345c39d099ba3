"""MAML and MAML++ for any PyTorch model."""

from innerloop import nn
from innerloop.captured import CapturedGradients
from innerloop.learner import MetaBatchResult, MetaLearner, NonFiniteLossError
from innerloop.methods import METHODS, Method, anil, boil, fomaml, maml, maml_plus_plus, meta_sgd
from innerloop.tasks import Examples, Task, stack_tasks

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CapturedGradients",
    "Examples",
    "MetaBatchResult",
    "MetaLearner",
    "Method",
    "NonFiniteLossError",
    "Task",
    "anil",
    "boil",
    "fomaml",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "nn",
    "stack_tasks",
]
