"""Every way to a meta-gradient, for every method and network, against the naive loop."""

import itertools
import warnings

import pytest
import torch
from oracle import EXACT, FIRST_ORDER, WAYS, gradients, make, naive, relative_difference, scramble, statistics
from zoo import CASES, NOT_VMAPPED, Case

from innerloop import METHODS, MetaLearner, Method
from innerloop.engines import Vmapped

STEPS = 3
MSL_AT_EPOCH_4_OF_10 = [0.2, 0.2, 0.6]
TOLERANCE = 1e-9
pytestmark = pytest.mark.usefixtures("device")


def method_for(name: str, case: Case, **switches: object) -> Method:
    head = {"head": case.head} if name in ("anil", "boil") else {}
    da = {"da_epochs": 0} if name == "maml_plus_plus" else {}
    return METHODS[name](**{"inner_steps": STEPS, "inner_lr": 0.1, **head, **da, **switches})


def possible(network: str, way: str) -> bool:
    """Whether the way can be compared with the naive loop: vmap draws other dropout masks (tested by differences)."""
    return not ("vmap" in way and (network in NOT_VMAPPED or "dropout" in network))


def learner_for(case: Case, method: Method, way: str) -> MetaLearner:
    return scramble(make(case.model(), case.loss, method, way))


def check_against_naive(case: Case, method: Method, way: str, first_order: bool = False) -> None:
    tasks = case.tasks()
    weights = MSL_AT_EPOCH_4_OF_10 if method.msl else [0.0, 0.0, 1.0]
    learner = learner_for(case, method, way)
    torch.manual_seed(4)
    loss, expected, left = naive(learner, tasks, weights, first_order=first_order)
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fall-back to reverse-over-reverse would pass for mixed
        result = learner.backward(tasks, epoch=4)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert relative_difference(gradients(learner), expected) < TOLERANCE
    after = statistics(learner)
    assert after.keys() == left.keys()
    for name, value in left.items():
        torch.testing.assert_close(after[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("network", "way"), [(n, w) for n in CASES for w in WAYS if possible(n, w)])
def test_equals_the_naive_loop(network: str, method: str, way: str) -> None:
    case = CASES[network]
    first_order = way in FIRST_ORDER or method == "fomaml"
    check_against_naive(case, method_for(method, case), way, first_order)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["momentum", "adam"])
@pytest.mark.parametrize("method", ["maml", "meta_sgd", "anil", "maml_plus_plus"])
def test_update_rules_equal_the_naive_loop(method: str, rule: str, way: str) -> None:
    # No biases before batch norm here: their gradients are zero but for rounding, which Adam inflates.
    case = CASES["residual"]
    rate = {"inner_rule": rule, "inner_lr": 0.02}
    check_against_naive(case, method_for(method, case, **rate), way, first_order=way in FIRST_ORDER)


SWITCHES = ("msl", "da", "bnrs", "bnwb", "lslr", "ca")


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("switched_on", list(itertools.product([False, True], repeat=len(SWITCHES))))
def test_any_subset_of_the_repairs(switched_on: tuple[bool, ...], way: str) -> None:
    switches = dict(zip(SWITCHES, switched_on, strict=True))
    check_against_naive(CASES["frozen"], Method(inner_steps=STEPS, da_epochs=3, **switches), way)


@pytest.mark.parametrize("network", ["conv_batch_norm", "lstm", "transformer", "running_norm"])
def test_a_model_in_evaluation_mode_keeps_its_statistics(network: str) -> None:
    """The user's train or eval mode is the model's business: norm layers then use the running statistics."""
    case = CASES[network]
    for way in EXACT:
        if not possible(network, way):
            continue
        learner = learner_for(case, method_for("maml_plus_plus", case), way)
        learner.model.eval()
        before = statistics(learner)
        _, expected, _ = naive(learner, case.tasks(), MSL_AT_EPOCH_4_OF_10)
        learner.backward(case.tasks(), epoch=4)
        assert relative_difference(gradients(learner), expected) < TOLERANCE
        if network != "running_norm":
            torch.testing.assert_close(statistics(learner), before, rtol=0, atol=1e-15)


@pytest.mark.parametrize("network", CASES)
@pytest.mark.filterwarnings("ignore:Recurrent has an operation without forward-mode")
def test_float32_follows_float64(network: str) -> None:
    """Single precision may take other kernels; it must run in every mode and come near, at a small inner rate."""
    case = CASES[network]
    method = method_for("maml_plus_plus", case, inner_lr=0.01)
    tasks = case.tasks()
    learner = make(case.model(), case.loss, method, "reverse")
    if "dropout" in network:
        learner.model.eval()  # other precisions draw other masks
    scramble(learner)
    learner.backward(tasks, epoch=4)
    exact = {n: g.float() for n, g in gradients(learner).items()}
    single = torch.utils._pytree.tree_map(lambda t: t.float() if t.is_floating_point() else t, tasks)
    for way in EXACT:
        if not possible(network, way):
            continue
        learner = make(case.model().float(), case.loss, method, way)
        if "dropout" in network:
            learner.model.eval()
        scramble(learner)
        with warnings.catch_warnings():
            if network != "lstm":  # single-precision LSTMs on the CPU have no forward mode
                warnings.simplefilter("error", UserWarning)
            learner.backward(single, epoch=4)
        assert relative_difference(gradients(learner), exact) < 1e-3


@pytest.mark.parametrize("network", ["dropout", "transformer_dropout"])
@pytest.mark.parametrize("way", EXACT)
def test_dropout_masks_are_those_of_the_loss(way: str, network: str) -> None:
    """Central differences of the loss with the same seed: the way back must meet the masks of the way there."""
    case = CASES[network]
    tasks = case.tasks()
    learner = learner_for(case, method_for("maml_plus_plus", case, inner_lr=0.5), way)
    learned = dict(learner.named_parameters())
    direction = {n: torch.randn_like(t) for n, t in learned.items()}

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for n, t in learned.items():
                t.add_(direction[n], alpha=distance)
        torch.manual_seed(5)
        loss = learner.backward(tasks, epoch=4).loss.item()
        with torch.no_grad():
            for n, t in learned.items():
                t.sub_(direction[n], alpha=distance)
        return loss

    loss_at(0.0)
    slope = sum(float((t.grad * direction[n]).sum()) for n, t in learned.items())
    h = 1e-5
    assert slope == pytest.approx((loss_at(h) - loss_at(-h)) / (2 * h), rel=1e-5)


def test_tasks_get_masks_of_their_own_when_vmapped() -> None:
    case = CASES["dropout"]
    twice = torch.utils._pytree.tree_map(lambda t: torch.cat([t, t]), case.tasks(1))
    losses = learner_for(case, method_for("maml", case), "mixed vmap").backward(twice).support_losses
    assert (losses[0] != losses[1]).all()


@pytest.mark.parametrize("network", NOT_VMAPPED)
def test_what_cannot_be_vmapped_is_looped_over_by_itself(network: str) -> None:
    case = CASES[network]
    method = method_for("maml", case)
    learner = MetaLearner(case.model(), case.loss, method)
    learner.engine = Vmapped()  # as on a GPU; on a CPU convolutions are not tried
    _, expected, left = naive(learner, case.tasks(), [0.0, 0.0, 1.0])
    with pytest.warns(UserWarning, match="cannot be vmapped"):
        learner.backward(case.tasks())
    assert relative_difference(gradients(learner), expected) < TOLERANCE
    for name, value in statistics(learner).items():
        torch.testing.assert_close(value, left[name], rtol=1e-12, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learner.backward(case.tasks())  # said once
    with pytest.raises(RuntimeError):
        make(case.model(), case.loss, method, "mixed vmap").backward(case.tasks())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", CASES)
def test_who_learns_what(network: str, method: str) -> None:
    """Every trainable parameter is in the group that the table of methods says, and shapes are those of the table."""
    case = CASES[network]
    model = case.model()
    learner = MetaLearner(model, case.loss, method_for(method, case))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    owners = dict(model.named_modules())
    norm = {n for n in trainable if "Norm" in type(owners[n.rpartition(".")[0]]).__name__}
    head = {n for n in trainable if n.startswith(case.head.rstrip("*"))}
    assert head
    adapted = {
        "anil": head, "boil": trainable.keys() - head, "maml_plus_plus": trainable.keys() - norm
    }.get(method, trainable.keys())  # fmt: skip
    expected = {f"adapted/{n}": trainable[n].shape for n in adapted}
    rest = trainable.keys() - adapted
    if method == "maml_plus_plus":
        expected |= {f"per_step/{n}": (STEPS, *trainable[n].shape) for n in norm}
        expected |= {f"rates/{n}": (STEPS,) for n in adapted}
    else:
        expected |= {f"shared/{n}": trainable[n].shape for n in rest}
    if method == "meta_sgd":
        expected |= {f"rates/{n}": trainable[n].shape for n in adapted}
    assert {n: tuple(t.shape) for n, t in learner.named_parameters()} == {n: tuple(s) for n, s in expected.items()}
