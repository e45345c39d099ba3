"""MetaLearner as the outer loop uses it."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from oracle import WAYS, gradients, make, naive, relative_difference, scramble, statistics
from torch import nn
from zoo import CASES, NOT_VMAPPED, placed

from innerloop import Examples, MetaLearner, Task, maml, maml_plus_plus, stack_tasks
from innerloop.tasks import meta_batch_size, select_task

CONV = CASES["conv_batch_norm"]
PLUS_PLUS = maml_plus_plus(inner_steps=2, da_epochs=0)
pytestmark = pytest.mark.usefixtures("device")


def test_the_models_own_parameters_are_the_initialisation() -> None:
    model = CONV.model()
    own = dict(model.named_parameters())
    learner = MetaLearner(model, CONV.loss, maml(inner_steps=2))
    learned = dict(learner.named_parameters())
    assert learned.keys() == {f"adapted/{n}" for n in own}
    assert all(learned[f"adapted/{n}"] is p for n, p in own.items())
    assert [id(t) for t in learner.parameters()] == [id(t) for t in learned.values()]
    before = {n: p.detach().clone() for n, p in own.items()}
    learner.backward(CONV.tasks())
    assert all(p.detach().equal(before[n]) for n, p in own.items())
    torch.optim.SGD(learner.parameters(), lr=0.1).step()
    for n, p in model.named_parameters():
        assert p is own[n]
        torch.testing.assert_close(p.detach(), before[n] - 0.1 * p.grad, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("network", CASES)
def test_a_model_is_an_ordinary_model_after_a_backward(network: str) -> None:
    """Nothing of the transforms it was called through may stay in it: it can be called, trained and copied."""
    case = CASES[network]
    for way in WAYS:
        if "vmap" in way and network in NOT_VMAPPED:
            continue
        model = case.model()
        names = [n for n, _ in model.named_parameters()]
        identities = [id(t) for t in (*model.parameters(), *model.buffers())]
        make(model, case.loss, PLUS_PLUS, way).backward(case.tasks(), epoch=0)
        assert [n for n, _ in model.named_parameters()] == names
        assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
        inputs, targets = case.examples(5)
        for each in (model, copy.deepcopy(model)):
            args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
            args = args if isinstance(args, tuple) else (args,)
            each.zero_grad()
            case.loss(each(*args, **kwargs), targets).backward()
            assert all(p.grad is not None for n, p in each.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_accumulate_over_backward_calls(way: str) -> None:
    parts = []
    for seeds in ((2,), (7,), (2, 7)):
        learner = scramble(make(CONV.model(), CONV.loss, PLUS_PLUS, way))
        for seed in seeds:
            learner.backward(CONV.tasks(2, seed), epoch=0)
        parts.append(gradients(learner))
    one, other, both = parts
    assert relative_difference({n: one[n] + other[n] for n in one}, both) < 1e-13
    assert relative_difference(one, both) > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_loss_gradient_and_statistics_are_means_over_tasks(way: str) -> None:
    tasks = CONV.tasks(3)
    singles = []
    for i in range(3):
        learner = scramble(make(CONV.model(), CONV.loss, PLUS_PLUS, way))
        result = learner.backward(stack_tasks([select_task(tasks, i)]), epoch=0)
        singles.append((result.loss, gradients(learner), statistics(learner)))
    learner = scramble(make(CONV.model(), CONV.loss, PLUS_PLUS, way))
    result = learner.backward(tasks, epoch=0)
    assert result.loss.item() == pytest.approx(sum(float(s[0]) for s in singles) / 3, rel=1e-13)
    mean = {n: sum(s[1][n] for s in singles) / 3 for n in singles[0][1]}
    assert relative_difference(gradients(learner), mean) < 1e-12
    for name, value in statistics(learner).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(s[2][name] for s in singles) / 3, rtol=1e-12, atol=1e-13)
        else:
            assert value.equal(singles[0][2][name])


@pytest.mark.parametrize("way", WAYS)
def test_statistics_go_on_from_where_the_last_backward_left_them(way: str) -> None:
    learner = scramble(make(CONV.model(), CONV.loss, PLUS_PLUS, way))
    for seed in (2, 7):
        _, expected, left = naive(learner, CONV.tasks(2, seed), [0.5, 0.5], first_order="first" in way)
        for t in learner.parameters():
            t.grad = None
        learner.backward(CONV.tasks(2, seed), epoch=0)
        assert relative_difference(gradients(learner), expected) < 1e-9
        for name, value in statistics(learner).items():
            torch.testing.assert_close(value, left[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("way", "draws"), [("mixed", "reverse"), ("mixed vmap", "first-order vmap")])
def test_replayed_masks_leave_the_generator_alone(way: str, draws: str) -> None:
    """Random numbers go on after a backward as if nothing had been replayed on the way back."""
    case = CASES["dropout"]
    tasks, after = case.tasks(), []
    for each in (way, draws):
        learner = make(case.model(), case.loss, maml(inner_steps=2), each)
        torch.manual_seed(3)
        learner.backward(tasks)
        after.append(torch.rand(()))
    assert after[0].equal(after[1])


def test_meta_training_on_one_meta_batch_brings_its_loss_down() -> None:
    learner = MetaLearner(CONV.model(), CONV.loss, maml_plus_plus(inner_steps=2))
    optimiser = torch.optim.Adam(learner.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(learner.backward(CONV.tasks(), epoch=60).loss.item())
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_state_dict_round_trip() -> None:
    learner = scramble(MetaLearner(CONV.model(), CONV.loss, PLUS_PLUS))
    learner.backward(CONV.tasks(), epoch=0)
    torch.optim.SGD(learner.parameters(), lr=0.1).step()
    state = {n: t.clone() for n, t in learner.state_dict().items()}
    groups = {n.partition("/")[0] for n in state}
    assert groups == {"adapted", "per_step", "rates", "per_step_statistics"}
    assert not any(t.requires_grad for t in state.values())
    other = MetaLearner(placed(CONV.build()), CONV.loss, PLUS_PLUS)
    mine = dict(other.named_parameters())
    other.load_state_dict(state)
    assert all(t is mine[n] for n, t in other.named_parameters())
    assert other.state_dict().keys() == state.keys()
    assert all(t.equal(state[n]) for n, t in other.state_dict().items())
    support, x = CONV.examples(6), placed(torch.randn(4, 1, 8, 8))
    for normalisation in ("batch", "running"):
        assert learner.adapt(support, None, normalisation)(x).equal(other.adapt(support, None, normalisation)(x))


def test_state_of_a_learner_without_stacks_holds_the_models_buffers() -> None:
    learner = MetaLearner(CASES["own_buffer"].model(), CONV.loss, maml())
    assert "statistics/center" in learner.state_dict()
    frozen = MetaLearner(CASES["frozen"].model(), CONV.loss, maml())
    assert not any("first" in n for n in frozen.state_dict())


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    learner = MetaLearner(CONV.model(), CONV.loss, PLUS_PLUS)
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    changed = {n: t + 1 for n, t in before.items()}
    missing = {n: t for n, t in changed.items() if n != "rates/head.bias"}
    with pytest.raises(ValueError, match=r"missing \['rates/head.bias'\], unexpected \[\]"):
        learner.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['rates/nobody'\]"):
        learner.load_state_dict({**changed, "rates/nobody": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"rates/head.bias has shape \(3,\) in the state and \(2,\) here"):
        learner.load_state_dict({**changed, "rates/head.bias": torch.zeros(3)})
    assert all(t.equal(before[n]) for n, t in learner.state_dict().items())


def test_stacking_and_selecting_tasks() -> None:
    tasks = [
        Task(Examples({"a": torch.rand(2)}, (torch.rand(1), "kept")), Examples(torch.rand(3), torch.rand(3)))
        for _ in range(4)
    ]
    meta_batch = stack_tasks(tasks)
    assert meta_batch_size(meta_batch) == 4
    i = random.Random(0).randrange(1, 4)
    one = select_task(meta_batch, i)
    assert one.support.inputs["a"].equal(tasks[i].support.inputs["a"])
    assert one.support.targets[0].equal(tasks[i].support.targets[0])
    assert one.support.targets[1] == "kept"
    assert one.query.inputs.equal(tasks[i].query.inputs)
    with pytest.raises(ValueError, match="at least one task"):
        stack_tasks([])


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_meta_batch_add_up_to_the_whole(way: str) -> None:
    """Tasks shared out unevenly give the same as one backward; nothing changes until the parts are added."""
    tasks = CONV.tasks(3)
    whole = scramble(make(CONV.model(), CONV.loss, PLUS_PLUS, way))
    expected = whole.backward(tasks, epoch=0)
    learner = scramble(make(CONV.model(), CONV.loss, PLUS_PLUS, way))
    before = statistics(learner)
    parts = [torch.utils._pytree.tree_map(lambda t, s=s: t[s], tasks) for s in (slice(0, 2), slice(2, 3))]
    given = [learner.task_gradients(part, epoch=0) for part in parts]
    assert all(t.grad is None for t in learner.parameters())
    assert all(t.equal(before[n]) for n, t in statistics(learner).items())
    result = learner.accumulate(given, epoch=0)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(result.query_losses, expected.query_losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.support_losses, expected.support_losses, rtol=1e-12, atol=0)
    assert relative_difference(gradients(learner), gradients(whole)) < 1e-12
    for name, value in statistics(learner).items():
        torch.testing.assert_close(value, statistics(whole)[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("width", "vmapped"), [(8, True), (3000, False)])
def test_automatic_choices(width: int, vmapped: bool, device: str) -> None:
    """Mixed mode; small models, and all on a GPU, are vmapped: the support loss then sees a tensor of all tasks."""
    seen = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._functorch.is_batchedtensor(targets))
        return torch.nn.functional.mse_loss(outputs, targets)

    torch.manual_seed(0)
    model = placed(torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)))
    case = CASES["mlp_regressor"]
    learner = MetaLearner(model, loss, maml(inner_steps=2))
    learner.backward(case.tasks())
    assert any(seen) == (vmapped or device != "cpu")
    found = gradients(learner)
    exact = MetaLearner(model, torch.nn.functional.mse_loss, maml(inner_steps=2), "reverse")
    for p in model.parameters():
        p.grad = None
    exact.backward(case.tasks())
    assert relative_difference(found, gradients(exact)) < 1e-9


def test_plain_pairs_are_a_meta_batch() -> None:
    tasks = CONV.tasks()
    pairs = (tuple(tasks.support), tuple(tasks.query))
    named, plain = (make(CONV.model(), CONV.loss, PLUS_PLUS, "mixed") for _ in range(2))
    plain.load_state_dict(named.state_dict())
    named.backward(tasks, epoch=0)
    plain.backward(pairs, epoch=0)
    for a, b in zip(named.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("steps", "stored", "parallel", "mode"),
    [(5, 5, "loop", "reverse"), (6, 5, "loop", "mixed"), (5, 4, "loop", "mixed"), (5, 5, "vmap", "mixed")],
)
def test_auto_takes_reverse_mode_where_every_step_would_be_stored(
    steps: int, stored: int, parallel: str, mode: str
) -> None:
    learner = MetaLearner(nn.Linear(2, 1), F.mse_loss, maml(inner_steps=steps), parallel=parallel, stored_steps=stored)
    assert learner.plan().mode == mode
    assert learner.vmapped == (parallel == "vmap")


def test_auto_vmaps_small_models_without_convolutions() -> None:
    assert MetaLearner(nn.Linear(2, 1), F.mse_loss).vmapped
    assert not MetaLearner(nn.Conv2d(1, 2, 3), F.mse_loss).vmapped
    assert not MetaLearner(nn.Linear(200, 200), F.mse_loss).vmapped


def test_a_negative_number_of_stored_steps_is_quoted() -> None:
    with pytest.raises(ValueError, match="stored_steps must be 0 or more, got -1"):
        MetaLearner(nn.Linear(2, 1), F.mse_loss, stored_steps=-1)
