"""The layout in which a GPU convolves many tasks at once, taken on a CPU: the same numbers."""

import pytest
import torch
from oracle import gradients, make, relative_difference, scramble
from torch import Tensor
from zoo import CASES

from innerloop import maml_plus_plus
from innerloop.closed_forms import convolution

CASE = CASES["conv_batch_norm"]


@pytest.mark.parametrize("way", ["mixed vmap", "first-order vmap"])
def test_meta_gradients_do_not_depend_on_the_layout(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = maml_plus_plus(inner_steps=3, da=False)
    plain, other = (scramble(make(CASE.model(), CASE.loss, method, way)) for _ in range(2))
    asked = []

    def always(w: Tensor, groups: int) -> bool:
        asked.append(groups)
        return w.ndim == 4

    expected = plain.backward(CASE.tasks(3), epoch=0)
    monkeypatch.setattr(convolution, "suits_channels_last", always)
    found = other.backward(CASE.tasks(3), epoch=0)
    assert relative_difference(gradients(other), gradients(plain)) < 1e-12
    torch.testing.assert_close(found.query_losses, expected.query_losses, rtol=1e-12, atol=1e-12)
    assert ("first" in way) != (3 in asked)  # closed forms serve second order alone


def test_one_channel_a_group_and_a_cpu_keep_their_layout() -> None:
    assert not convolution.suits_channels_last(torch.empty(8, 64, 3, 3), groups=8)
    assert not convolution.suits_channels_last(torch.empty(8, 1, 3, 3, device="meta"), groups=8)
