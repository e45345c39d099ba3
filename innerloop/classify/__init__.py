"""From a meta-trained run to a classifier of a person's own classes."""

from innerloop.classify.classifier import Classifier, Prediction, Unreadable
from innerloop.classify.estimate import Estimate
from innerloop.classify.meta_trained import Adaptation, DivergedError, MetaTrained, load
from innerloop.classify.model_file import ModelFileError

__all__ = [
    "Adaptation",
    "Classifier",
    "DivergedError",
    "Estimate",
    "MetaTrained",
    "ModelFileError",
    "Prediction",
    "Unreadable",
    "load",
]
