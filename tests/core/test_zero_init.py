"""Parameters that start from zero in every task: adapted, not learned, and of any width."""

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients, relative_difference, scramble
from torch import nn

from innerloop import MetaLearner, maml, maml_plus_plus, meta_sgd

HEAD = "head.*"


def tasks(ways: int):
    generator = torch.Generator().manual_seed(ways)
    inputs = torch.randn(2, 2 * ways, 5, generator=generator, dtype=torch.float64)
    targets = torch.arange(ways).repeat(2).expand(2, -1)
    return (inputs, targets), (inputs.flip(1), targets.flip(1))


def model(ways: int) -> nn.Module:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh())
    net = nn.Sequential()
    net.add_module("body", body)
    net.add_module("head", nn.Linear(7, ways))
    return net.double()


@pytest.mark.parametrize("mode", ["reverse", "mixed", "first-order"])
@pytest.mark.parametrize("method", [maml, maml_plus_plus, meta_sgd])
def test_gradients_are_those_of_a_head_that_is_set_to_zero(mode, method) -> None:
    """The same meta-gradient as of a learned head that happens to be zero, without the head's own part."""
    zeroed = model(3)
    nn.init.zeros_(zeroed.head.weight)
    nn.init.zeros_(zeroed.head.bias)
    switches = {"inner_steps": 3, "inner_lr": 0.3, "da": False} if method is maml_plus_plus else {"inner_steps": 3}
    learned = MetaLearner(zeroed, F.cross_entropy, method(**switches), mode, parallel="loop")
    fixed = MetaLearner(model(3), F.cross_entropy, method(**switches, zero_init=(HEAD,)), mode, parallel="loop")
    learned.backward(tasks(3), epoch=0)
    fixed.backward(tasks(3), epoch=0)
    expected = {n: g for n, g in gradients(learned).items() if not n.startswith("adapted/head")}
    assert gradients(fixed).keys() == expected.keys()
    assert relative_difference(gradients(fixed), expected) < 1e-12
    assert all(p.grad is None for n, p in fixed.model.named_parameters() if n.startswith("head"))


def test_vmapped_as_looped() -> None:
    found = []
    for parallel in ("loop", "vmap"):
        learner = MetaLearner(model(3), F.cross_entropy, maml_plus_plus(da=False, zero_init=(HEAD,)), "mixed", parallel)
        learner.backward(tasks(3), epoch=0)
        found.append(gradients(learner))
    assert relative_difference(*found) < 1e-9


def test_the_state_fits_any_number_of_classes() -> None:
    method = maml_plus_plus(inner_steps=2, zero_init=(HEAD,))
    three = MetaLearner(model(3), F.cross_entropy, method)
    scramble(three)
    eight = MetaLearner(model(8), F.cross_entropy, method)
    eight.load_state_dict(three.state_dict())
    support, _ = tasks(8)
    adapted = eight.adapt((support[0][0], support[1][0]))
    assert adapted(support[0][0]).shape == (16, 8)


def test_classes_are_treated_alike() -> None:
    """Numbering the classes otherwise renumbers the answers and changes nothing else."""
    learner = scramble(MetaLearner(model(4), F.cross_entropy, maml(inner_steps=3, inner_lr=0.4, zero_init=(HEAD,))))
    (inputs, targets), (queries, _) = tasks(4)
    order = torch.tensor([2, 0, 3, 1])
    plain = learner.adapt((inputs[0], targets[0]))(queries[0])
    renumbered = learner.adapt((inputs[0], order[targets[0]]))(queries[0])
    assert torch.allclose(renumbered[:, order], plain, atol=1e-12)


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no trainable parameter .* 'haed.\*'"):
        MetaLearner(model(3), F.cross_entropy, maml(zero_init=("haed.*",)))
