"""For every test: one core, since the models are small and other work shares the machine, and an empty cache."""

import os

# Of other processes too: two threads each on the cores that two tests share spin more than they compute.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from innerloop import maml_plus_plus
from innerloop.data import ImageDataset, Split, strokes
from innerloop.data.images import Fit
from innerloop.training.building import build_learner
from innerloop.training.checkpoints import save_checkpoint
from innerloop.training.config import Config, NetworkConfig
from innerloop.training.run_folder import RunFolder

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _one_core() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("innerloop.training.building.available_cores", lambda: 1)
        yield


@pytest.fixture(autouse=True, scope="session")
def _strokes_are_drawn_once() -> Iterator[None]:
    """For all runs of a process that have the same classes: drawing them takes longer than most of these runs."""

    @functools.lru_cache(maxsize=6)
    def drawn(classes: tuple[tuple[Split, int], ...], size: int, seed: int, fit: Fit) -> ImageDataset:
        return strokes(dict(classes), size=size, seed=seed, fit=fit)

    def kept(classes: dict[Split, int], *, size: int, seed: int, fit: Fit, progress: bool) -> ImageDataset:
        return drawn(tuple(classes.items()), size, seed, fit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("innerloop.training.building.strokes", kept)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INNERLOOP_CACHE", str(folder))
    monkeypatch.setenv("INNERLOOP_DATA", str(tmp_path_factory.mktemp("data")))
    return folder


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    given = os.environ.get("INNERLOOP_OMNIGLOT")
    root = Path(given) if given else Path(__file__).parents[1].parent / "shared" / "data" / "omniglot"
    if not root.exists():
        pytest.skip(f"the real Omniglot is not in {root}; set INNERLOOP_OMNIGLOT to its folder")
    return root


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Writes the folder of a run of one epoch that learned nothing: ``make_run(path, Config(...))``."""

    def make(
        path: Path, config: Config | None = None, checkpoints: Sequence[tuple[float, float]] = ((0.5, 1.0),)
    ) -> Path:
        """``checkpoints``: the validation score of each epoch, and what its initial weights are multiplied by."""
        config = config or Config(network=NetworkConfig(filters=8), method=maml_plus_plus(inner_steps=3))
        folder = RunFolder(path)
        folder.create("quickstart", config)
        learner = build_learner(config, torch.device("cpu"))
        for epoch, (value, factor) in enumerate(checkpoints, start=1):
            state = {n: t * factor if n.startswith("adapted/") else t for n, t in learner.state_dict().items()}
            save_checkpoint(folder.epoch_checkpoint(epoch), state, {"epoch": epoch, "val": value})
        return path

    return make


@pytest.fixture(scope="session")
def shapes() -> Callable[..., Image.Image]:
    """Draws one of some easy shapes, dark ink on a light page, a little different for each number."""

    def draw(kind: str, number: int = 0, ink: int = 20, page: int = 240, side: int = 60) -> Image.Image:
        image = Image.new("L", (side, side), page)
        pen = ImageDraw.Draw(image)
        at = 15 + 3 * (number % 10)
        if kind == "bar":
            pen.rectangle((5, at, side - 6, at + 5), fill=ink)
        elif kind == "post":
            pen.rectangle((at, 5, at + 5, side - 6), fill=ink)
        elif kind == "dot":
            pen.ellipse((at, 15, at + 14, 29), fill=ink)
        elif kind == "slope":
            pen.line((5, at, side - 6, side - at), fill=ink, width=4)
        else:
            pen.rectangle((at - 8, at - 8, at + 20, at + 20), outline=ink, width=3)
        return image

    return draw


@pytest.fixture
def support_folder(tmp_path: Path, shapes: Callable[..., Image.Image]) -> Path:
    """Three classes of three drawings each, as a person would have them."""
    for kind in ("bar", "dot", "post"):
        (tmp_path / "my classes" / kind).mkdir(parents=True)
        for i in range(3):
            shapes(kind, i).save(tmp_path / "my classes" / kind / f"{i}.png")
    return tmp_path / "my classes"
