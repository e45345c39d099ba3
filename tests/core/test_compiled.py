"""Meta-gradients by traced graphs: the same numbers as without, whatever the network; and what cannot be traced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients, relative_difference, scramble, statistics
from torch import Tensor, nn
from zoo import CASES, Case, placed

from innerloop import MetaLearner, Method, anil, fomaml, maml, maml_plus_plus
from innerloop.engines.compiled import Compiled
from innerloop.engines.tracing import distinct, lowered, traced

pytestmark = pytest.mark.usefixtures("device")


def methods(case: Case) -> Iterator[tuple[str, Method]]:
    yield "maml", maml(inner_steps=3)
    yield "maml++", maml_plus_plus(inner_steps=3, msl_epochs=4, da=False)
    yield "momentum", fomaml(inner_steps=3, inner_rule="momentum", lslr=True)
    yield "anil", anil(case.head, inner_steps=2)


def pair(case: Case, method: Method, vmapped: bool, backend: str = "eager") -> tuple[MetaLearner, MetaLearner]:
    """The same learner without and with graphs."""
    mode = "mixed" if method.second_order else "auto"
    plain = scramble(MetaLearner(case.model(), case.loss, method, mode, parallel="loop"))
    stored = 1 if method.msl else 5  # the others are computed again on the way back
    traced = scramble(
        MetaLearner(case.model(), case.loss, method, mode, parallel="loop", compile="on", stored_steps=stored)
    )
    traced.engine = Compiled(traced.engine.plain, traced.model, vmapped, backend=backend)
    return plain, traced


def same(plain: MetaLearner, traced: MetaLearner, case: Case) -> None:
    """Two meta-batches at two epochs: rates, statistics and MSL weights are arguments of the graphs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed, epoch in ((2, 0.5), (4, 2.0)):
            results = []
            for learner in (plain, traced):
                torch.manual_seed(seed)
                results.append(learner.backward(case.tasks(seed=seed), epoch))
            for name in ("loss", "support_losses", "query_losses"):
                a, b = (getattr(result, name) for result in results)
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
            assert relative_difference(gradients(traced), gradients(plain)) < 1e-12
            torch.testing.assert_close(statistics(traced), statistics(plain), rtol=1e-12, atol=1e-12)
            for learner in (plain, traced):
                torch.optim.SGD(learner.parameters(), 0.01).step()


@pytest.mark.parametrize(("name", "vmapped"), [("maml", True), ("maml++", False), ("momentum", True), ("anil", False)])
@pytest.mark.parametrize("network", CASES)
def test_the_traced_graphs_give_the_same_numbers(network: str, name: str, vmapped: bool) -> None:
    case = CASES[network]
    same(*pair(case, dict(methods(case))[name], vmapped), case)


def test_compiled_by_inductor() -> None:
    case, method = CASES["mlp_regressor"], maml_plus_plus(inner_steps=2, msl_epochs=4, da_epochs=1)
    plain, traced = pair(case, method, vmapped=True, backend="inductor")
    same(plain, traced, case)
    assert isinstance(traced.engine, Compiled)
    assert traced.engine.refused is None


def test_what_cannot_be_traced_is_computed_as_ever_with_one_warning() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) if float(x.detach().sum()) > 0 else self.head(2 * x)

    tasks = placed(((torch.randn(2, 6, 4), torch.arange(6).expand(2, 6) % 3),) * 2)
    torch.manual_seed(1)
    plain = MetaLearner(placed(Branches()), F.cross_entropy, maml(inner_steps=2), "mixed", parallel="loop")
    torch.manual_seed(1)
    traced = MetaLearner(
        placed(Branches()), F.cross_entropy, maml(inner_steps=2), "mixed", parallel="loop", compile="on"
    )
    plain.backward(tasks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced.backward(tasks)
        traced.backward(tasks)
    assert len([w for w in caught if "compiled" in str(w.message)]) == 1
    for a, b in zip(traced.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, 2 * b.grad)


def test_a_choice_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="compile must be one of auto, on, off; got 'yes'"):
        MetaLearner(nn.Linear(3, 2), F.mse_loss, compile="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_tensor_in_two_places_is_two_arguments(backend: str) -> None:
    """A trace knows its arguments by who they are: what is one tensor when it is made may be two later."""
    same, a, b = (placed(torch.randn(3)) for _ in range(3))
    arguments = distinct([same, same])
    graph = lowered(traced(lambda p, q: [2 * p - q], arguments), arguments, backend, 60.0, 1)  # type: ignore[arg-type]
    torch.testing.assert_close(next(iter(graph(a, b))), 2 * a - b)
