"""Data: class images and functions, and the tasks sampled from them. Knows nothing of models."""

from innerloop.data.classes import ClassImages, ImageDataset, Split
from innerloop.data.episodes import Episodes, TaskSource
from innerloop.data.folder import image_folder
from innerloop.data.images import BrokenImagesError
from innerloop.data.mini_imagenet import mini_imagenet
from innerloop.data.omniglot import omniglot
from innerloop.data.preprocessing import Preprocessing
from innerloop.data.sinusoid import Sinusoids
from innerloop.data.strokes import strokes

__all__ = [
    "BrokenImagesError",
    "ClassImages",
    "Episodes",
    "ImageDataset",
    "Preprocessing",
    "Sinusoids",
    "Split",
    "TaskSource",
    "image_folder",
    "mini_imagenet",
    "omniglot",
    "strokes",
]
