"""What people do, one file a kind; every test in float64, from the same seed, against a loop written by hand."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
