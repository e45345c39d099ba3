"""A whole meta-gradient on a GPU that is not there: shapes and devices are as on one, values there are none."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from innerloop import MetaLearner, maml_plus_plus
from innerloop.bench.cases import CASES
from innerloop.bench.launches import fake_gpu, on, step_launches


def in_a_process(check: Callable[[], None]) -> None:
    """A new one: autograd counts the devices when it is first used, and never again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
        own.submit(check).result()


SMALL = replace(CASES["omniglot-mamlpp"], tasks=2, ways=3, filters=4, inner_steps=2)
needs_fake_gpu = pytest.mark.skipif(
    not torch.version.cuda and not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this build of PyTorch knows no GPU, and cannot be told of one",
)


@needs_fake_gpu
def test_a_meta_gradient_with_every_repair_mixes_no_devices() -> None:
    in_a_process(meta_gradient)


def meta_gradient() -> None:
    """MSL, BNRS, BNWB and LSLR in second order, vmapped in mixed mode."""
    model, tasks = SMALL.build_model(), SMALL.meta_batch()
    with fake_gpu() as device:
        method = maml_plus_plus(inner_steps=2, da=False)
        learner = MetaLearner(on(device, model), F.cross_entropy, method, "mixed", parallel="vmap")
        result = learner.task_gradients(on(device, tasks), 0)
        leaves = pytree.tree_leaves(result)
        assert all(isinstance(t, FakeTensor) and t.device == device for t in leaves)
        learned = {name.partition("/")[0] for name, _ in learner.named_parameters()}
        assert learned == {"adapted", "per_step", "rates"}
        for group, tensors in learner.meta._asdict().items():
            for name, t in tensors.items():
                assert getattr(result.gradient, group)[name].shape == t.shape


@needs_fake_gpu
def test_mixed_devices_show() -> None:
    with fake_gpu() as device:
        here, there = torch.empty(3), torch.empty(3, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            here + there


@needs_fake_gpu
def test_launches_of_a_step_grow_with_its_inner_steps_and_not_with_its_tasks() -> None:
    in_a_process(launches)


def launches() -> None:
    two, four = (step_launches(replace(SMALL, inner_steps=k)) for k in (2, 4))
    wide = step_launches(replace(SMALL, tasks=4))
    assert wide.total == two.total < four.total
    assert sum(wide.moved.values()) > 1.5 * sum(two.moved.values())
    assert two.counts["convolution_backward"] > 0
    assert not any(name in two.counts for name in ("view", "detach", "empty", "device"))
