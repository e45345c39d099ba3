"""Every test of the core runs in float64, from the same seed; those that use ``device`` on every device there is."""

from collections.abc import Iterator

import pytest
import torch
import zoo


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the zoo's models and tasks are. Their values are drawn on the CPU, and are the same everywhere."""
    with zoo.placed_on(request.param), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield request.param
