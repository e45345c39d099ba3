"""Divergence: what went first is named exactly, and each policy does what it says, also for a run that is stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import StoppingProgress, records, small, start
from torch import Tensor, nn

import innerloop.training.trainer as trainer_module
from innerloop import MetaLearner, Method, maml_plus_plus
from innerloop.tasks import Examples, Task
from innerloop.training.checkpoints import load_checkpoint
from innerloop.training.config import Config
from innerloop.training.diagnosis import FirstNonFinite, first_non_finite
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import DivergedError, InterruptedRunError, train


class Counting(nn.Module):
    """The identity, but for its n-th call, where ``spoil`` has its way with what passes."""

    def __init__(self, spoil: Callable[[Tensor], Tensor], at: int) -> None:
        super().__init__()
        self.spoil, self.at, self.calls = spoil, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.spoil(x) if self.calls == self.at else x


class NanBackward(torch.autograd.Function):
    """The identity; its gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.nan


class NanSecond(torch.autograd.Function):
    """The identity; so is its gradient, whose own gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return NanBackward.apply(g)


def learner_of(spoil: Callable[[Tensor], Tensor], at: int, method: Method | None = None) -> MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 4))
    model.add_module("norm", nn.BatchNorm1d(4))
    model.add_module("spoiled", Counting(spoil, at))
    model.add_module("last", nn.Linear(4, 2))
    return MetaLearner(model, F.cross_entropy, method or maml_plus_plus(inner_steps=3, da_epochs=0))


def some_tasks(count: int = 2) -> Task:
    torch.manual_seed(1)
    return Task(*(Examples(torch.randn(count, 6, 3), torch.arange(6).remainder(2).expand(count, 6)) for _ in range(2)))


# MSL: every inner step calls the model on the support set and then on the query set; two tasks, three steps.
@pytest.mark.parametrize(
    ("at", "task", "step", "examples"),
    [(1, 0, 1, "support"), (2, 0, 1, "query"), (3, 0, 2, "support"), (6, 0, 3, "query"), (9, 1, 2, "support")],
)
def test_an_output_that_overflows_is_named(at: int, task: int, step: int, examples: str) -> None:
    learner = learner_of(lambda x: x * 1e30 * 1e30, at)
    found = first_non_finite(learner, some_tasks(), epoch=0)
    assert found == FirstNonFinite(task, step, "output", "spoiled", examples)
    assert str(found) == f"the first to go was the output of spoiled on the {examples} set at inner step {step}"


@pytest.mark.parametrize(("at", "step"), [(1, 1), (3, 2), (5, 3)])
def test_a_gradient_of_an_inner_step_is_named(at: int, step: int) -> None:
    """What comes out of the spoiled module has a good gradient; what goes into it, norm's output, has not."""
    found = first_non_finite(learner_of(NanBackward.apply, at), some_tasks(), epoch=0)
    assert found == FirstNonFinite(0, step, "gradient", "norm", "support")


@pytest.mark.parametrize(
    ("spoil", "at", "step", "examples"),
    [(NanBackward.apply, 2, 1, "query"), (NanBackward.apply, 6, 3, "query"), (NanSecond.apply, 3, 2, "support")],
)
def test_a_meta_gradient_is_named(spoil: Callable[[Tensor], Tensor], at: int, step: int, examples: str) -> None:
    found = first_non_finite(learner_of(spoil, at), some_tasks(), epoch=0)
    assert found is not None
    assert (found.task, found.inner_step, found.what, found.examples) == (0, step, "meta-gradient", examples)
    if spoil is NanBackward.apply:
        assert found.layer == "norm"


def test_first_order_has_no_second_derivative_to_blame() -> None:
    learner = learner_of(NanSecond.apply, 3, maml_plus_plus(inner_steps=3, da_epochs=9))
    assert first_non_finite(learner, some_tasks(), epoch=0) is None


def test_a_fast_weight_a_meta_parameter_and_an_input_are_named() -> None:
    learner = learner_of(lambda x: 100 * x, 3)  # a large gradient at step 2
    learner.meta.rates["last.weight"].data[1] = 3e38
    assert first_non_finite(learner, some_tasks(), epoch=0) == FirstNonFinite(0, 2, "fast weight", "last.weight")
    learner.meta.rates["last.bias"].data[0] = torch.inf
    found = first_non_finite(learner, some_tasks(), epoch=0)
    assert found == FirstNonFinite(0, 0, "meta-parameter", "rates/last.bias")
    assert str(found) == "the meta-parameter rates/last.bias was not finite before the inner loop began"
    learner, tasks = learner_of(lambda x: x, 0), some_tasks()
    tasks.query.inputs[1, 0, 0] = torch.nan
    assert first_non_finite(learner, tasks, epoch=0) == FirstNonFinite(1, 1, "input", "Sequential", "query")


def test_looking_changes_nothing() -> None:
    learner, tasks = learner_of(F.dropout, 4), some_tasks()
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    generator = torch.get_rng_state()
    assert first_non_finite(learner, tasks, epoch=0) is None
    assert first_non_finite(learner, tasks, epoch=0, only=1) is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, before[n]) for n, t in learner.state_dict().items())
    assert all(p.grad is None for p in learner.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learner.model.modules())


def diverging(policy: str, **settings: Any) -> Config:
    config = small()
    return replace(config, outer=replace(config.outer, on_divergence=policy, **settings))


def events(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.events.read_text().splitlines()]


@pytest.fixture
def bad_tasks(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Training tasks whose support targets are beyond the floats."""
    bad: set[int] = set()
    build = trainer_module.build_tasks

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        source = build(*args, **kwargs)
        meta_batch = source.meta_batch

        def with_bad(split: str, first: int, size: int) -> Task:
            task = meta_batch(split, first, size)
            for i in range(size):
                if split == "train" and first + i in bad:
                    task.support.targets[i] = 3e38
            return task

        source.meta_batch = with_bad
        return source

    monkeypatch.setattr(trainer_module, "build_tasks", spoiled)
    return bad


def test_skipping_goes_on_without_the_update(tmp_path: Path, bad_tasks: set[int]) -> None:
    bad_tasks |= {3 * 2 + 1, 3 * 9, 3 * 10}  # iterations 3, 10 and 11; 3 tasks each, 7 iterations an epoch
    folder = start(tmp_path / "run", config := diverging("skip"))
    train(folder, "sinusoid", config, Progress(shown=False))
    assert [r["skipped_updates"] for r in records(folder)] == [1, 2, 0]
    assert all(abs(float(r["train_loss"])) < 1e9 for r in records(folder))  # type: ignore[arg-type]
    skipped = [e for e in events(folder) if e["event"] == "skipped"]
    assert [(e["epoch"], e["iteration"], e["first"]["task"]) for e in skipped] == [(1, 3, 1), (2, 10, 0), (2, 11, 0)]
    assert all(e["first"]["inner_step"] == 1 and e["first"]["what"] == "loss" for e in skipped)
    assert "the support loss of task 1 is inf at inner step 1; the first to go was the loss of" in skipped[0]["message"]


def test_skips_in_a_row_are_bounded(tmp_path: Path, bad_tasks: set[int]) -> None:
    bad_tasks |= set(range(6, 60))
    folder = start(tmp_path / "run", config := diverging("skip", max_skips=3))
    with pytest.raises(DivergedError, match="stopped at iteration 6 after 3 skips: the support loss of task 0 is inf"):
        train(folder, "sinusoid", config, Progress(shown=False))
    assert [e["event"] for e in events(folder)] == ["skipped"] * 3 + ["diverged"]


def test_rolling_back_halves_the_rate_and_is_bounded(tmp_path: Path, bad_tasks: set[int]) -> None:
    bad_tasks |= {3 * 9}  # the same at every rate: in the end it stops
    folder = start(tmp_path / "run", config := diverging("rollback", max_rollbacks=2))
    with pytest.raises(DivergedError, match="stopped at iteration 10 after 2 rollbacks"):
        train(folder, "sinusoid", config, Progress(shown=False))
    back = [e for e in events(folder) if e["event"] == "rolled back"]
    assert [e["rate_factor"] for e in back] == [0.5, 0.25]
    assert "from iteration 10 to the start of epoch 2, outer rate times 0.5" in back[0]["message"]
    _, state = load_checkpoint(folder.latest)
    assert (state["epoch"], state["rate_factor"], state["rollbacks"]) == (1, 0.25, 2)
    bad_tasks.clear()  # and goes on where the cause is gone
    train(folder, "sinusoid", config, Progress(shown=False))
    plain = [trainer_module.outer_rate(config, i) for i in (6, 13, 20)]
    assert [r["outer_lr"] for r in records(folder)] == [plain[0], plain[1] * 0.25, plain[2] * 0.25]


@pytest.mark.parametrize(("policy", "at"), [("skip", 9), ("skip", 11), ("rollback", 11), ("rollback", 13)])
def test_a_stopped_run_that_diverges_ends_as_one_never_stopped(
    tmp_path: Path, policy: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations 10 and 11 diverge at the full outer rate. The run is saved, and stopped, at all kinds of moments."""
    update = trainer_module._Training._outer_update

    def diverging_update(self: trainer_module._Training, iteration: int) -> None:
        if iteration in (9, 10) and self.done.rate_factor == 1:
            self._diverged(iteration, "made up")
        else:
            update(self, iteration)

    monkeypatch.setattr(trainer_module, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(trainer_module._Training, "_outer_update", diverging_update)
    config = diverging(policy)
    folders = [start(tmp_path / name, config) for name in ("whole", "stopped")]
    with pytest.raises(InterruptedRunError):
        train(folders[1], "sinusoid", config, StoppingProgress(at))
    for folder in folders:
        train(folder, "sinusoid", config, Progress(shown=False))
    assert records(folders[0]) == records(folders[1])
    assert {e["event"] for e in events(folders[0])} == {"skipped" if policy == "skip" else "rolled back"}
    whole, stopped = (load_checkpoint(folder.latest)[0] for folder in folders)
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
