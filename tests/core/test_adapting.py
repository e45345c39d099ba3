"""A meta-trained model put to use: adapt, trajectory and predict."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients, scramble, statistics
from torch import Tensor, nn
from torch.func import functional_call
from zoo import CASES, Case, placed

from innerloop import Examples, MetaLearner, Method, maml, maml_plus_plus

CONV = CASES["conv_batch_norm"]
STEPS = 3
pytestmark = pytest.mark.usefixtures("device")
NETWORKS = [n for n in CASES if n != "running_norm"]  # a layer that has no use for its batch's statistics


def trained(case: Case, method: Method | None = None) -> MetaLearner:
    """A learner whose rates, stacks and statistics have all moved."""
    method = method or maml_plus_plus(inner_steps=STEPS)
    learner = scramble(MetaLearner(case.model(), case.loss, method, parallel="loop"))
    learner.backward(case.tasks(), epoch=0)
    torch.optim.SGD(learner.parameters(), lr=0.05).step()
    for t in learner.parameters():
        t.grad = None
    return learner


def call(model: nn.Module, inputs: Any, tensors: dict[str, Tensor] | None = None) -> Any:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    args = args if isinstance(args, tuple) else (args,)
    return functional_call(model, tensors or {}, args, kwargs)


def leaves(outputs: Any) -> list[Tensor]:
    return [t.detach() for t in torch.utils._pytree.tree_leaves(outputs)]


def by_hand(learner: MetaLearner, support: Examples, steps: int) -> dict[str, Tensor]:
    """theta^steps: batch statistics, no dropout, entry min(k, K-1) of everything that has one for each step."""
    groups: dict[str, dict[str, Tensor]] = {"adapted": {}, "shared": {}, "per_step": {}, "rates": {}}
    for name, t in learner.named_parameters():
        group, _, parameter = name.partition("/")
        groups[group][parameter] = t.detach()
    model = copy.deepcopy(learner.model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    theta = {n: t.clone().requires_grad_() for n, t in groups["adapted"].items()}
    for k in range(steps):
        k = min(k, learner.method.inner_steps - 1)
        fixed = {**groups["shared"], **{n: s[k] for n, s in groups["per_step"].items()}}
        loss = learner.loop.network.loss_function(call(model, support.inputs, {**theta, **fixed}), support.targets)
        gradient = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
        for (n, t), g in zip(list(theta.items()), gradient, strict=True):
            rate = groups["rates"][n][k] if groups["rates"] else learner.method.inner_lr
            theta[n] = (t - rate * g).detach().requires_grad_()
    return {n: t.detach() for n, t in theta.items()}


@pytest.mark.parametrize("normalisation", ["batch", "running"])
@pytest.mark.parametrize("steps", [None, 0, 1, STEPS + 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_adapt_equals_predict_and_the_loop_by_hand(network: str, steps: int | None, normalisation: str) -> None:
    case = CASES[network]
    learner = trained(case)
    support, query = case.examples(6), case.examples(5)
    count = STEPS if steps is None else steps
    *_, theta = learner.trajectory(support, steps)
    expected = by_hand(learner, support, count)
    assert theta.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(theta[name], t, rtol=1e-10, atol=1e-12)
    adapted = learner.adapt(support, steps, normalisation)
    assert not any(m.training for m in adapted.modules())
    with torch.no_grad():
        outputs = call(adapted, query.inputs)
    predicted = learner.predict(theta, count, query.inputs, normalisation)
    last = min(max(count - 1, 0), STEPS - 1)
    own = dict(adapted.named_parameters())
    for name, t in learner.named_parameters():
        group, _, parameter = name.partition("/")
        if group == "per_step":
            assert own[parameter].equal(t[last])
        if group == "adapted":
            assert own[parameter].equal(theta[parameter])
    for a, b in zip(leaves(outputs), leaves(predicted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_adapt_without_more_is_five_steps_of_maml() -> None:
    learner = MetaLearner(CASES["mlp_regressor"].model(), F.mse_loss)
    support = CASES["mlp_regressor"].examples(6)
    expected = by_hand(learner, support, 5)
    for name, p in learner.adapt(support).named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_adapted_model_is_a_module_of_its_own(network: str) -> None:
    case = CASES[network]
    learner = trained(case)
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    own = {n: t.clone() for n, t in learner.model.state_dict().items()}
    adapted = learner.adapt(tuple(case.examples(6)))
    assert type(adapted) is type(learner.model)
    assert [n for n, _ in adapted.named_parameters()] == [n for n, _ in learner.model.named_parameters()]
    requires = {n: p.requires_grad for n, p in learner.model.named_parameters()}
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == requires
    assert all(p.is_leaf and p.grad is None for p in adapted.parameters())
    adapted.train()
    optimiser = torch.optim.SGD(adapted.parameters(), lr=0.1)
    inputs, targets = case.examples(5)
    first = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    case.loss(call(adapted, inputs), targets).backward()
    optimiser.step()
    assert any(not p.detach().equal(first[n]) for n, p in adapted.named_parameters())
    assert all(p.detach().equal(first[n]) for n, p in adapted.named_parameters() if not p.requires_grad)
    assert all(t.equal(before[n]) for n, t in learner.state_dict().items())
    assert all(t.equal(own[n]) for n, t in learner.model.state_dict().items())


def test_tied_parameters_stay_tied() -> None:
    adapted = trained(CASES["tied"]).adapt(CASES["tied"].examples(6))
    assert adapted.decoder.weight is adapted.embedding.weight


@pytest.mark.parametrize("method", [maml(inner_steps=STEPS), maml_plus_plus(inner_steps=STEPS)])
@pytest.mark.parametrize("network", ["conv_batch_norm", "residual"])
def test_batch_and_running_normalisation(network: str, method: Method) -> None:
    learner = trained(CASES[network], method)
    support, x = CASES[network].examples(6), placed(torch.randn(6, 1, 8, 8))
    with torch.no_grad():
        batch, running = (learner.adapt(support, normalisation=n) for n in ("batch", "running"))
        assert not torch.allclose(batch(x)[:3], batch(x[:3]), atol=1e-3)
        torch.testing.assert_close(running(x)[:1], running(x[:1]), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(batch(x), running(x), atol=1e-3)


def test_running_statistics_of_an_adapted_model_are_those_of_its_last_step() -> None:
    learner = trained(CONV)
    kept = statistics(learner)
    for steps, entry in ((1, 0), (2, 1), (3, 2), (9, 2), (0, 0)):
        adapted = learner.adapt(CONV.examples(6), steps, "running")
        for name, b in adapted.named_buffers():
            assert b.equal(kept[f"per_step_statistics/{name}"][entry])


def test_nothing_of_the_learner_changes_by_use() -> None:
    case = CASES["conv_batch_norm"]
    learner = trained(case)
    learner.model.body[0].eval()
    learner.model.body[5].eval()
    modes = [m.training for m in learner.model.modules()]
    assert len(set(modes)) == 2
    state = {n: t.clone() for n, t in learner.state_dict().items()}
    buffers = {n: b.clone() for n, b in learner.model.named_buffers()}
    parameters = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    support, query = case.examples(6), case.examples(5)
    for normalisation in ("batch", "running"):
        learner.adapt(support, 5, normalisation)
        for k, theta in enumerate(learner.trajectory(support)):
            assert [m.training for m in learner.model.modules()] == modes  # also while the walk is going on
            learner.predict(theta, k, query.inputs, normalisation)
        with pytest.raises(RuntimeError):
            learner.predict(theta, k, placed(torch.zeros(1, 2, 3, 4, 5)), normalisation)
    assert [m.training for m in learner.model.modules()] == modes
    assert all(t.equal(state[n]) for n, t in learner.state_dict().items())
    assert all(b.equal(buffers[n]) for n, b in learner.model.named_buffers())
    assert all(p.detach().equal(parameters[n]) for n, p in learner.model.named_parameters())
    assert all(t.grad is None for t in learner.parameters())


@pytest.mark.parametrize("network", ["dropout", "transformer_dropout"])
def test_no_dropout_in_adapting_and_predicting(network: str) -> None:
    case = CASES[network]
    learner = trained(case)
    assert learner.model.training
    support, query = case.examples(6), case.examples(5)
    generator = torch.get_rng_state()
    first, second = learner.adapt(support), learner.adapt(support)
    assert torch.get_rng_state().equal(generator)
    assert call(first, query.inputs).equal(call(second, query.inputs))
    assert learner.model.training


def test_adapting_without_grad_mode() -> None:
    learner = trained(CONV)
    support = CONV.examples(6)
    usual = learner.adapt(support)
    with torch.no_grad():
        other = learner.adapt(support)
    assert all(a.equal(b) for a, b in zip(usual.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_adapting_and_meta_training_walk_the_same_path(rule: str) -> None:
    """The loss that ``backward`` reports after each step is that of ``predict`` with the step's fast weights."""
    method = maml_plus_plus(inner_steps=STEPS, inner_rule=rule, inner_lr=0.05)
    learner = scramble(MetaLearner(CONV.model(), CONV.loss, method, "reverse"))
    tasks = CONV.tasks(1)
    support, query = (Examples(e.inputs[0], e.targets[0]) for e in tasks)
    walked = list(learner.trajectory(support))
    losses = [CONV.loss(learner.predict(t, k, query.inputs), query.targets) for k, t in enumerate(walked)]
    result = learner.backward(tasks, epoch=0)
    torch.testing.assert_close(result.query_losses[0], torch.stack(losses[1:]), rtol=1e-9, atol=0)
    assert all(g.isfinite().all() for g in gradients(learner).values())


def test_adapting_works_where_autograd_is_switched_off() -> None:
    torch.manual_seed(0)
    model = placed(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    learner = MetaLearner(model, nn.functional.mse_loss, maml(inner_steps=2))
    inputs, targets = placed((torch.randn(5, 3), torch.randn(5, 2)))
    expected = learner.adapt((inputs, targets))(inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(learner.adapt((inputs.clone(), targets.clone()))(inputs), expected)


def test_a_negative_number_of_steps_is_refused() -> None:
    learner = MetaLearner(nn.Linear(3, 2), nn.functional.mse_loss)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        learner.adapt((torch.randn(5, 3), torch.randn(5, 2)), steps=-1)


@pytest.mark.parametrize("steps", [0, 2, STEPS + 1])
def test_support_normalisation_is_that_of_the_support_set(steps: int) -> None:
    """Each norm layer by hand: mean and variance of what reaches it when the adapted model sees the support set."""
    learner = trained(CONV)
    support, query = CONV.tasks().support, CONV.tasks().query
    support, query = (Examples(e.inputs[0], e.targets[0]) for e in (support, query))
    adapted = learner.adapt(support, steps, normalisation="support")
    by_batch = learner.adapt(support, steps, normalisation="batch")
    seen: dict[str, Tensor] = {}
    for name, layer in by_batch.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda m, x, name=name: seen.__setitem__(name, x[0].detach()))
    by_batch(support.inputs)
    assert seen
    for name, x in seen.items():
        layer = adapted.get_submodule(name)
        assert torch.allclose(layer.running_mean, x.mean((0, 2, 3)), atol=1e-12)
        assert torch.allclose(layer.running_var, x.var((0, 2, 3)), atol=1e-12)
    *_, theta = learner.trajectory(support, steps)
    predicted = learner.predict(theta, steps, query.inputs, "support", support=support.inputs)
    assert torch.allclose(predicted, adapted(query.inputs), atol=1e-12)
    one = adapted(query.inputs[:1])
    assert torch.allclose(one, predicted[:1], atol=1e-12)  # an input's output is its own


def test_support_normalisation_leaves_the_model_as_it_was() -> None:
    learner = trained(CONV)
    support = CONV.tasks().support
    support = Examples(support.inputs[0], support.targets[0])
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    momenta = [m.momentum for m in learner.model.modules() if isinstance(m, nn.BatchNorm2d)]
    learner.adapt(support, normalisation="support")
    assert momenta == [m.momentum for m in learner.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(before[n], t) for n, t in learner.state_dict().items())


def test_support_normalisation_needs_the_support_set() -> None:
    learner = trained(CONV)
    support = CONV.tasks().support
    *_, theta = learner.trajectory(Examples(support.inputs[0], support.targets[0]))
    with pytest.raises(ValueError, match="needs the inputs of the support set"):
        learner.predict(theta, STEPS, support.inputs[0], "support")
