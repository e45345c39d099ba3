"""Other threads that do not use the learner: they call its model, or have a learner of their own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from by_hand import STEPS, meta_batch, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml


def test_the_model_answers_as_ever_while_it_is_adapted() -> None:
    model, support, (query, _) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), vectors(), vectors(5)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    expected, done, wrong, asked = model(query).detach(), threading.Event(), [0], [0]

    def ask() -> None:
        while not done.is_set():
            with torch.no_grad():
                wrong[0] += not model(query).equal(expected)
            asked[0] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(40):
        learner.adapt(support)
    done.set()
    thread.join()
    assert asked[0] > 0
    assert wrong[0] == 0


def test_dropout_masks_of_two_learners() -> None:
    """A step that is computed again has the masks it had, whatever others draw meanwhile."""
    seen: dict[int, list[Tensor]] = {}

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.rand(len(x), 5) > 0.4
            seen.setdefault(threading.get_ident(), []).append(mask)
            return self.head(self.body(x) * mask)

    def train(_: int) -> bool:
        model, right = Dropped(), True
        learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), "mixed", "loop", stored_steps=0)
        for _ in range(8):
            seen[threading.get_ident()] = []
            learner.backward(tasks)
            masks = seen[threading.get_ident()]  # the query set's comes between
            right &= all(a.equal(b) for a, b in zip(masks[:STEPS], masks[: -STEPS - 1 : -1], strict=True))
        return right

    tasks = meta_batch(vectors, tasks=1)
    assert train(0)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(train, range(3)))
