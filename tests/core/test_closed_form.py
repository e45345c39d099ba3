"""Meta-gradients of quadratic losses, which have closed forms, and central differences of a smooth network.

Support loss 0.5 th'A th - b'th, query loss 0.5 th'C th - d'th. With th* = A^{-1} b and M = I - alpha A::

    th_K = th* + M^K (th_0 - th*)        d th_K / d th_0 = M^K        d th_K / d alpha = -K A M^{K-1} (th_0 - th*)
"""

import pytest
import torch
from oracle import EXACT, FIRST_ORDER, make
from torch import Tensor, nn

from innerloop import Examples, Task, maml, maml_plus_plus, meta_sgd, stack_tasks

D = 4


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.th = nn.Parameter(torch.randn(D))

    def forward(self, unused: Tensor) -> Tensor:
        return self.th


def quadratic(th: Tensor, matrix_and_vector: tuple[Tensor, Tensor]) -> Tensor:
    matrix, vector = matrix_and_vector
    return 0.5 * th @ matrix @ th - vector @ th


def examples() -> Examples:
    half = torch.randn(D, D)
    return Examples(torch.zeros(1), (half @ half.T / D + 0.5 * torch.eye(D), torch.randn(D)))


def one_task() -> tuple[Task, Tensor, Tensor, Tensor, Tensor]:
    task = Task(examples(), examples())
    return (stack_tasks([task]), *task.support.targets, *task.query.targets)


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_maml(steps: int, way: str) -> None:
    model, (tasks, a, b, c, d), alpha = Point(), one_task(), 0.3
    result = (learner := make(model, quadratic, maml(inner_steps=steps, inner_lr=alpha), way)).backward(tasks)
    th = model.th.detach()
    best, power = torch.linalg.solve(a, b), torch.linalg.matrix_power(torch.eye(D) - alpha * a, steps)
    end = best + power @ (th - best)
    torch.testing.assert_close(model.th.grad, power.T @ (c @ end - d), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.loss, quadratic(end, (c, d)), rtol=1e-12, atol=1e-13)
    assert [n for n, _ in learner.named_parameters()] == ["adapted/th"]


@pytest.mark.parametrize("way", FIRST_ORDER)
@pytest.mark.parametrize("steps", [1, 4])
def test_first_order_is_the_query_gradient_at_the_end(steps: int, way: str) -> None:
    model, (tasks, a, b, c, d), alpha = Point(), one_task(), 0.3
    make(model, quadratic, maml(inner_steps=steps, inner_lr=alpha), way).backward(tasks)
    best, power = torch.linalg.solve(a, b), torch.linalg.matrix_power(torch.eye(D) - alpha * a, steps)
    end = best + power @ (model.th.detach() - best)
    torch.testing.assert_close(model.th.grad, c @ end - d, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", EXACT)
def test_maml_plus_plus_with_msl_and_rates(way: str) -> None:
    """d th_k / d alpha_j = -A prod_{i<k, i != j} (I - alpha_i A) (th_0 - th*); at epoch 4 of 10 w = 0.2, 0.2, 0.6."""
    model, (tasks, a, b, c, d) = Point(), one_task()
    learner = make(model, quadratic, maml_plus_plus(inner_steps=3, da_epochs=0, msl_epochs=10), way)
    alphas = [0.1, 0.35, 0.2]
    (rates,) = (t for n, t in learner.named_parameters() if n == "rates/th")
    with torch.no_grad():
        rates.copy_(torch.tensor(alphas))
    learner.backward(tasks, epoch=4)

    away = model.th.detach() - (best := torch.linalg.solve(a, b))
    shrink = [torch.eye(D) - alpha * a for alpha in alphas]
    by_theta, by_rates = torch.zeros(D), torch.zeros(3)
    for k, weight in ((1, 0.2), (2, 0.2), (3, 0.6)):
        power = torch.eye(D)
        for m in shrink[:k]:
            power = m @ power
        outer = weight * (c @ (best + power @ away) - d)
        by_theta += power.T @ outer
        for j in range(k):
            by_rates[j] += outer @ (-a @ torch.linalg.solve(shrink[j], power) @ away)
    torch.testing.assert_close(model.th.grad, by_theta, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(rates.grad, by_rates, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("way", EXACT)
def test_meta_sgd(way: str) -> None:
    """th_2 = th_1 - r * g(th_1): d th_2/d r = diag(-g(th_1)) + (I - diag(r) A) diag(-g(th_0))."""
    model, (tasks, a, b, c, d) = Point(), one_task()
    learner = make(model, quadratic, meta_sgd(inner_steps=2), way)
    (rates,) = (t for n, t in learner.named_parameters() if n == "rates/th")
    r = 0.1 + 0.3 * torch.rand(D)
    with torch.no_grad():
        rates.copy_(r)
    learner.backward(tasks)
    th0 = model.th.detach()
    g0 = a @ th0 - b
    g1 = a @ (th1 := th0 - r * g0) - b
    step = torch.eye(D) - torch.diag(r) @ a
    outer = c @ (th1 - r * g1) - d
    torch.testing.assert_close(rates.grad, (-torch.diag(g1) - step @ torch.diag(g0)).T @ outer, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(model.th.grad, (step @ step).T @ outer, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_central_differences(rule: str, way: str) -> None:
    """Every element of every meta-parameter of MAML++ on a smooth network."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2, bias=False))
    tasks = stack_tasks([Task(_regression(), _regression())])
    method = maml_plus_plus(inner_steps=2, inner_lr=0.05, inner_rule=rule, da_epochs=0)
    learner = make(model, nn.functional.mse_loss, method, way)
    probe = make(model, nn.functional.mse_loss, method, "reverse")
    learned, probed = dict(learner.named_parameters()), dict(probe.named_parameters())
    assert {n.partition("/")[0] for n in learned} == {"adapted", "per_step", "rates"}
    with torch.no_grad():
        for name, t in learned.items():
            t.add_(0.02 * torch.randn_like(t))
            probed[name].copy_(t)
    learner.backward(tasks, epoch=3)
    exact = {n: t.grad.clone() for n, t in learned.items()}
    h, found, owed = 1e-5, [], []
    for name, t in probed.items():
        for i in range(t.numel()):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    t.view(-1)[i] += sign * h
                losses.append(probe.backward(tasks, epoch=3).loss.item())
                with torch.no_grad():
                    t.view(-1)[i] -= sign * h
            found.append((losses[0] - losses[1]) / (2 * h))
            owed.append(exact[name].view(-1)[i].item())
    found, owed = torch.tensor(found), torch.tensor(owed)
    assert (found - owed).norm() / found.norm() < (1e-5 if rule == "adam" else 1e-8)  # Adam's curvature is large


def _regression() -> Examples:
    return Examples(torch.randn(5, 2), torch.randn(5, 2))
