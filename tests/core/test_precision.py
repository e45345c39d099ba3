"""bf16 convolutions: rounded where they should be and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients, relative_difference
from torch import nn
from zoo import CASES

from innerloop import MetaLearner, maml
from innerloop.precision import Bfloat16Convolutions


def test_inputs_are_rounded_and_the_result_is_in_their_own_precision() -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float32) for s in ((2, 3, 8, 8), (4, 3, 3, 3), (4,)))
    with Bfloat16Convolutions():
        y = F.conv2d(x, w, b, padding=1)
        linear = F.linear(x, w[0, 0].repeat(1, 3)[:, :8])
    rounded = (t.bfloat16().double() for t in (x, w, b))
    torch.testing.assert_close(y.double(), F.conv2d(*rounded, padding=1), rtol=1e-2, atol=1e-2)
    assert y.dtype == torch.float32
    assert not torch.equal(y, F.conv2d(x, w, b, padding=1))
    torch.testing.assert_close(linear, F.linear(x, w[0, 0].repeat(1, 3)[:, :8]), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["mixed", "reverse", "first-order"])
@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_meta_gradients_come_near_those_of_float32(mode: str, parallel: str) -> None:
    if mode == "reverse" and parallel == "vmap":
        pytest.skip("reverse mode is looped over")
    case = CASES["residual"]
    tasks = torch.utils._pytree.tree_map(lambda t: t.float() if t.is_floating_point() else t, case.tasks())
    found = []
    for precision in ("float32", "bf16"):
        method = maml(inner_steps=2, inner_lr=0.01)
        learner = MetaLearner(case.model().float(), case.loss, method, mode, parallel, precision=precision)
        learner.backward(tasks)
        found.append(gradients(learner))
    assert 1e-5 < relative_difference(found[1], found[0]) < 0.1


def test_a_network_without_convolutions_is_not_touched() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.randn(1, 4, 3), torch.randn(1, 4, 2)
    found = []
    for precision in ("float32", "bf16"):
        learner = MetaLearner(model, F.mse_loss, maml(), precision=precision)
        learner.backward(((x, y), (x, y)))
        found.append(gradients(learner))
        model.zero_grad()
    assert relative_difference(*found) == 0


def test_an_unknown_precision_is_quoted() -> None:
    with pytest.raises(ValueError, match="one of float32, bf16; got 'fp8'"):
        MetaLearner(nn.Linear(1, 1), F.mse_loss, precision="fp8")
