"""One learner, several threads: each waits for the others, and gets its own answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, ConvNet, images, meta_batch
from torch import Tensor, nn

from innerloop import MetaLearner, maml

THREADS, TASKS = 4, 12


def answers(ask: Callable[[int], Tensor]) -> list[Tensor]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, range(TASKS)))


@pytest.fixture
def supports() -> list[tuple[Tensor, Tensor]]:
    return [images() for _ in range(TASKS)]


def test_adapting_in_threads(supports: list[tuple[Tensor, Tensor]]) -> None:
    model, query = ConvNet(), images()[0]
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    state = {n: t.clone() for n, t in model.state_dict().items()}

    def ask(i: int) -> Tensor:
        return learner.adapt(supports[i])(query).detach()

    expected = [ask(i) for i in range(TASKS)]
    assert all(map(torch.equal, answers(ask), expected))
    assert all(t.equal(state[n]) for n, t in model.state_dict().items())


def test_trajectories_side_by_side(supports: list[tuple[Tensor, Tensor]]) -> None:
    learner, query = MetaLearner(ConvNet(), F.cross_entropy, maml(inner_steps=STEPS)), images()[0]

    def ask(i: int) -> Tensor:
        normalisation = ("batch", "running", "support")[i % 3]
        thetas = enumerate(learner.trajectory(supports[i]))
        return torch.stack([learner.predict(t, k, query, normalisation, supports[i][0]) for k, t in thetas])

    expected = [ask(i) for i in range(TASKS)]
    assert all(map(torch.equal, answers(ask), expected))


def test_learners_that_share_a_backbone(supports: list[tuple[Tensor, Tensor]]) -> None:
    shared, query = ConvNet().backbone, images()[0]
    models = [nn.Sequential(shared, nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    learners = [MetaLearner(m, F.cross_entropy, maml(inner_steps=STEPS)) for m in models]

    def ask(i: int) -> Tensor:
        return learners[i % 2].adapt(supports[i])(query).detach()

    expected = [ask(i) for i in range(TASKS)]
    assert all(map(torch.equal, answers(ask), expected))


def test_training_and_adapting_at_once(supports: list[tuple[Tensor, Tensor]]) -> None:
    model, tasks, query = ConvNet(), meta_batch(images), images()[0]
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), parallel="loop")
    expected = learner.adapt(supports[0])(query)
    learner.backward(tasks)
    gradient = model.head.weight.grad.clone()
    model.head.weight.grad = None

    def work(i: int) -> Tensor:
        if i % 2:
            learner.backward(tasks)
        return learner.adapt(supports[0])(query).detach()

    assert all(torch.equal(a, expected.detach()) for a in answers(work))
    torch.testing.assert_close(model.head.weight.grad, TASKS // 2 * gradient)


def test_attention_is_as_it_was_after_threads_have_used_it() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    learner = MetaLearner(nn.Sequential(model, nn.Flatten(), nn.Linear(12, 3)), F.cross_entropy, maml(inner_steps=2))
    supports = [(torch.randn(6, 3, 4), torch.arange(6) % 3) for _ in range(TASKS)]
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    answers(lambda i: learner.adapt(supports[i])(supports[i][0]).detach())
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_an_exception_in_one_thread_lets_the_others_go_on(supports: list[tuple[Tensor, Tensor]]) -> None:
    learner, query = MetaLearner(ConvNet(), F.cross_entropy, maml(inner_steps=STEPS)), images()[0]
    expected = learner.adapt(supports[0])(query).detach()

    def ask(i: int) -> Tensor:
        if i % 3 == 0:
            with pytest.raises(RuntimeError):
                learner.adapt((torch.randn(2, 5, 8, 8), torch.zeros(2, dtype=torch.long)))
        return learner.adapt(supports[0])(query).detach()

    assert all(torch.equal(a, expected) for a in answers(ask))
