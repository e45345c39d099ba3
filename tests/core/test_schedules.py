"""Schedules against numbers worked out by hand from their formulas."""

import math

import pytest

from innerloop import fomaml, maml, maml_plus_plus
from innerloop.schedules import cosine_rate, derivative_order, last_step_weights, multi_step_loss_weights


@pytest.mark.parametrize(
    ("epoch", "early", "last"),
    [
        (0, 0.2, 0.2),
        (1, 0.18, 0.28),
        (5, 0.1, 0.6),
        (9, 0.02, 0.92),
        (9.5, 0.01, 0.96),
        (9.7, 0.006, 0.976),  # where the bounds 0.03/5 and 1 - 4 * 0.03/5 are met
        (9.9, 0.006, 0.976),  # unclamped: 0.002 and 0.992
        (10, 0.0, 1.0),
        (11, 0.0, 1.0),
        (1000, 0.0, 1.0),
    ],
)
def test_multi_step_loss_weights_of_five_steps_over_ten_epochs(epoch: float, early: float, last: float) -> None:
    assert multi_step_loss_weights(5, epoch, 10) == pytest.approx([early] * 4 + [last], abs=1e-15)


def test_multi_step_loss_weights_of_other_lengths() -> None:
    assert multi_step_loss_weights(2, 3, 15) == pytest.approx([0.4, 0.6], abs=1e-15)
    assert multi_step_loss_weights(3, 4, 10) == pytest.approx([0.2, 0.2, 0.6], abs=1e-15)
    assert multi_step_loss_weights(1, 0, 10) == [1.0]
    assert multi_step_loss_weights(1, 7, 10) == [1.0]
    assert multi_step_loss_weights(2, 0, 1) == [0.5, 0.5]
    assert multi_step_loss_weights(2, 1, 1) == [0.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("epochs", [1, 10, 15])
def test_multi_step_loss_weights_sum_to_one_and_move_to_the_last_step(steps: int, epochs: int) -> None:
    lasts = []
    for tenth in range(10 * epochs + 20):
        weights = multi_step_loss_weights(steps, tenth / 10, epochs)
        assert len(weights) == steps
        assert math.fsum(weights) == pytest.approx(1, abs=1e-14)
        assert min(weights) >= 0
        lasts.append(weights[-1])
    assert lasts == sorted(lasts)


def test_last_step_weights() -> None:
    assert last_step_weights(1) == [1.0]
    assert last_step_weights(4) == [0.0, 0.0, 0.0, 1.0]


def test_derivative_order() -> None:
    assert [derivative_order(e, 50) for e in (0, 49, 49.99, 50, 51)] == [1, 1, 1, 2, 2]
    assert derivative_order(0, 0) == 2


def test_methods_follow_their_schedules() -> None:
    method = maml_plus_plus(inner_steps=5, msl_epochs=10, da_epochs=3)
    assert method.loss_weights(5) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6], abs=1e-15)
    assert [method.derivative_order(e) for e in (0, 2, 3)] == [1, 1, 2]
    assert maml(inner_steps=3).loss_weights(0) == [0, 0, 1]
    assert maml().derivative_order(0) == 2
    assert fomaml().derivative_order(10**6) == 1
    assert fomaml(da=True, da_epochs=1).derivative_order(5) == 1
    assert [m.needs_epoch for m in (maml(), fomaml(), maml(msl=True), maml(da=True), maml(ca=True))] == [
        False, False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("time", "rate"),
    [
        (0, 1e-3),
        (25, 1e-5 + 0.99e-3 * 0.8535533905932737),  # (1 + cos(pi/4)) / 2
        (50, 5.05e-4),
        (75, 1e-5 + 0.99e-3 * 0.14644660940672627),
        (100, 1e-5),
        (101, 1e-5),
        (200, 1e-5),  # a restart would be back at 1e-3
    ],
)
def test_cosine_rate(time: float, rate: float) -> None:
    assert cosine_rate(time, 100, 1e-3, 1e-5) == pytest.approx(rate, rel=1e-12)


def test_cosine_rate_of_no_time_at_all() -> None:
    assert cosine_rate(0, 0, 1e-3, 1e-5) == 1e-5
