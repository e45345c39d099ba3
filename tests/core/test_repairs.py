"""Each repair of MAML++ does what it says."""

import pytest
import torch
import torch.nn.functional as F
from oracle import EXACT, WAYS, gradients, make, naive, relative_difference, scramble, statistics
from torch import Tensor, nn
from torch.func import functional_call
from zoo import CASES, placed

from innerloop import Examples, MetaLearner, Task, maml, maml_plus_plus, meta_sgd, stack_tasks

CONV = CASES["conv_batch_norm"]
pytestmark = pytest.mark.usefixtures("device")


def theta_by_hand(model: nn.Module, support: Examples, steps: int, rate: float) -> list[dict[str, Tensor]]:
    """theta^0 .. theta^steps of plain MAML."""
    theta = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    walked = [theta]
    for _ in range(steps):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        loss = F.cross_entropy(functional_call(model, {**theta, **buffers}, (support.inputs,)), support.targets)
        g = torch.autograd.grad(loss, list(theta.values()))
        moved = zip(theta.items(), g, strict=True)
        theta = {n: (t - rate * g).detach().requires_grad_() for (n, t), g in moved}
        walked.append(theta)
    return walked


@pytest.mark.parametrize("way", WAYS)
def test_msl_weighs_the_query_losses_of_all_steps(way: str) -> None:
    model, tasks = CONV.model(), CONV.tasks(3)
    learner = make(model, CONV.loss, maml(inner_steps=3, msl=True, msl_epochs=10), way)
    result = learner.backward(tasks, epoch=4)
    assert result.query_losses.shape == result.support_losses.shape == (3, 3)
    for i in range(3):
        task = torch.utils._pytree.tree_map(lambda t, i=i: t[i], tasks)
        walked = theta_by_hand(model, task.support, 3, 0.1)
        support = [_loss(model, theta, task.support) for theta in walked[:-1]]
        query = [_loss(model, theta, task.query) for theta in walked[1:]]
        torch.testing.assert_close(result.support_losses[i], torch.stack(support), rtol=1e-12, atol=0)
        torch.testing.assert_close(result.query_losses[i], torch.stack(query), rtol=1e-12, atol=0)
        outputs = functional_call(model, walked[-1], (task.query.inputs,))
        torch.testing.assert_close(result.query_outputs[i], outputs.detach(), rtol=1e-11, atol=1e-12)
    expected = (result.query_losses @ placed(torch.tensor([0.2, 0.2, 0.6]))).mean()
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    assert not result.loss.requires_grad
    assert not result.query_outputs[0].requires_grad


def _loss(model: nn.Module, theta: dict[str, Tensor], examples: Examples) -> Tensor:
    return F.cross_entropy(functional_call(model, theta, (examples.inputs,)), examples.targets).detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", [maml(inner_steps=3), maml_plus_plus(inner_steps=3, msl_epochs=10)])
def test_query_losses_that_do_not_count_are_not_computed(method, way: str) -> None:
    calls = []

    def counting_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(targets))
        return CONV.loss(outputs, targets)

    result = make(CONV.model(), counting_loss, method, way).backward(CONV.tasks(2), epoch=10)
    assert result.query_losses[:, :2].isnan().all()
    assert result.query_losses[:, 2].isfinite().all()
    assert result.loss.item() == pytest.approx(result.query_losses[:, 2].mean().item(), rel=1e-14)
    # The query set has 5 examples, the support set 6: one query loss a task, or one for all of them.
    assert calls.count(5) == (1 if "vmap" in way else 2)


@pytest.mark.parametrize("way", EXACT)
def test_da_is_first_order_before_the_switch_and_exact_from_it_on(way: str) -> None:
    found = {}
    for epoch in (0, 2, 3, 4):
        learner = make(CONV.model(), CONV.loss, maml(inner_steps=2, da=True, da_epochs=3), way)
        learner.backward(CONV.tasks(), epoch)
        found[epoch] = gradients(learner)
    _, exact, _ = naive(learner, CONV.tasks(), [0.0, 1.0])
    _, first, _ = naive(learner, CONV.tasks(), [0.0, 1.0], first_order=True)
    assert relative_difference(first, exact) > 0.01
    for epoch, expected in ((0, first), (2, first), (3, exact), (4, exact)):
        assert relative_difference(found[epoch], expected) < 1e-9


class OneNorm(nn.Module):
    """Batch norm straight after an adapted layer, so that its running statistics can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).relu())


def one_norm_tasks() -> Task:
    support, query = torch.arange(6) % 3, torch.arange(5) % 3
    tasks = [Task(Examples(torch.randn(6, 3) + i, support), Examples(torch.randn(5, 3) - i, query)) for i in range(3)]
    return placed(stack_tasks(tasks))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bnrs", [True, False])
def test_running_statistics(bnrs: bool, way: str) -> None:
    """running = 0.9 old + 0.1 batch's (variance unbiased): at step k the support set at theta^k, then the query set at
    theta^{k+1}, on entry k (BNRS) or on the one set there is; the mean over tasks is kept."""
    torch.manual_seed(0)
    model, tasks, steps = placed(OneNorm()), one_norm_tasks(), 3
    learner = make(model, F.cross_entropy, maml(inner_steps=steps, bnrs=bnrs, msl=True), way)
    means, variances, counters = [], [], []
    for i in range(3):
        task = torch.utils._pytree.tree_map(lambda t, i=i: t[i], tasks)
        walked = theta_by_hand(model, task.support, steps, 0.1)
        mean, var = placed((torch.zeros(steps if bnrs else 1, 4), torch.ones(steps if bnrs else 1, 4)))
        for k in range(steps):
            entry = k if bnrs else 0
            for theta, x in ((walked[k], task.support.inputs), (walked[k + 1], task.query.inputs)):
                hidden = (x @ theta["first.weight"].T + theta["first.bias"]).detach()
                mean[entry] = 0.9 * mean[entry] + 0.1 * hidden.mean(0)
                var[entry] = 0.9 * var[entry] + 0.1 * hidden.var(0, unbiased=True)
        means.append(mean)
        variances.append(var)
    counters = placed(torch.tensor([2] * steps) if bnrs else torch.tensor(2 * steps))
    own = {n: b.clone() for n, b in model.named_buffers()}
    learner.backward(tasks, epoch=0)
    group = "per_step_statistics" if bnrs else "statistics"
    found = statistics(learner)
    assert found.keys() == {f"{group}/norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    mean, var = torch.stack(means).mean(0), torch.stack(variances).mean(0)
    shape = (steps, 4) if bnrs else (4,)
    torch.testing.assert_close(found[f"{group}/norm.running_mean"], mean.view(shape), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[f"{group}/norm.running_var"], var.view(shape), rtol=1e-12, atol=1e-13)
    assert found[f"{group}/norm.num_batches_tracked"].equal(counters)
    if bnrs:
        assert all(b.equal(own[n]) for n, b in model.named_buffers())
    else:
        torch.testing.assert_close(model.norm.running_mean, mean[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_constant_buffers_stay_what_they_are(way: str) -> None:
    """A table or mask is a buffer too: a mean over seven tasks would move it by rounding, and -inf must survive."""

    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)
            self.register_buffer("table", torch.randn(1000))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))
            self.register_buffer("positions", torch.tensor([-3, 7]))
            self.register_buffer("flags", torch.tensor([True, False]))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.table[:3]

    model = placed(Constants())
    before = {n: b.clone() for n, b in model.named_buffers()}
    tasks = torch.utils._pytree.tree_map(lambda t: torch.cat([t, t, t[:1]]), one_norm_tasks())
    make(model, F.cross_entropy, maml(inner_steps=1), way).backward(tasks)
    for name, b in model.named_buffers():
        assert b.equal(before[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_bnwb_learns_a_stack_and_leaves_the_models_own_weights_alone(way: str) -> None:
    model = CONV.model()
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner = make(model, CONV.loss, maml(inner_steps=3, bnwb=True, msl=True, msl_epochs=10), way)
    stacks = {n: t for n, t in learner.named_parameters() if n.startswith("per_step/")}
    assert {n: tuple(t.shape) for n, t in stacks.items()} == {
        f"per_step/body.{i}.{n}": (3, 4) for i in (1, 5) for n in ("weight", "bias")
    }
    for name, t in stacks.items():
        for entry in t:
            assert entry.equal(own[name.partition("/")[2]])
    assert not any(
        n in theta for theta in learner.trajectory(CONV.examples(6)) for n in ("body.1.weight", "body.5.bias")
    )
    optimiser = torch.optim.SGD(learner.parameters(), lr=0.1)
    learner.backward(CONV.tasks(), epoch=4)
    assert all(entry.any() for t in stacks.values() for entry in t.grad)
    optimiser.step()
    for i in (1, 5):
        for n in ("weight", "bias"):
            p = model.get_parameter(f"body.{i}.{n}")
            assert p.grad is None
            assert p.equal(own[f"body.{i}.{n}"])
            stack = stacks[f"per_step/body.{i}.{n}"]
            assert not stack[0].equal(stack[1])


@pytest.mark.parametrize("way", WAYS)
def test_only_the_last_entry_of_a_stack_meets_the_query_set_without_msl(way: str) -> None:
    learner = make(CONV.model(), CONV.loss, maml(inner_steps=3, bnwb=True, inner_lr=0.0), way)
    learner.backward(CONV.tasks())
    for name, t in learner.named_parameters():
        if name.startswith("per_step/"):
            assert not t.grad[:2].any()
            assert t.grad[2].any()


def test_shapes_and_first_values_of_learned_rates() -> None:
    model = CONV.model()
    lslr = dict(MetaLearner(model, CONV.loss, maml(inner_steps=4, inner_lr=0.3, lslr=True)).named_parameters())
    per_element = dict(MetaLearner(model, CONV.loss, meta_sgd(inner_lr=0.3)).named_parameters())
    for name, p in model.named_parameters():
        assert lslr[f"rates/{name}"].equal(placed(torch.full((4,), 0.3)))
        assert per_element[f"rates/{name}"].equal(placed(torch.full(p.shape, 0.3)))
    constant = MetaLearner(model, CONV.loss, maml(inner_lr=0.3))
    assert not any(n.startswith("rates/") for n, _ in constant.named_parameters())


def test_lslr_applies_each_rate_at_its_own_step_and_tensor() -> None:
    model = CASES["dict_output"].model()
    learner = MetaLearner(model, CASES["dict_output"].loss, maml(inner_steps=3, lslr=True))
    with torch.no_grad():
        for name, t in learner.named_parameters():
            if name.startswith("rates/"):
                t.zero_()
        dict(learner.named_parameters())["rates/head.weight"][1] = 0.5
    walked = list(learner.trajectory(CASES["dict_output"].examples(6)))
    moved = {(k, n) for k in range(3) for n in walked[k] if not walked[k][n].equal(walked[k + 1][n])}
    assert moved == {(1, "head.weight")}


@pytest.mark.parametrize("way", WAYS)
def test_ca_is_the_outer_optimisers_business(way: str) -> None:
    found = []
    for ca in (True, False):
        learner = scramble(make(CONV.model(), CONV.loss, maml_plus_plus(inner_steps=2, ca=ca), way))
        learner.backward(CONV.tasks(), epoch=60)
        found.append(gradients(learner))
    assert found[0].keys() == found[1].keys()
    assert all(found[0][n].equal(found[1][n]) for n in found[0])
