"""Commands that several ranks carry out together: what torchrun or ``--devices`` has to know before all else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from innerloop.training.config import ConfigError
from innerloop.training.distributed import TIMEOUT_SECONDS, Ranks


def peeked_timeout(arguments: Sequence[str]) -> float:
    """``--timeout``, which is needed before the ranks can talk about the rest.

    Raises:
        ConfigError: it is not a positive number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS)
    try:
        timeout: float = parser.parse_known_args(arguments)[0].timeout
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from None
    if not 0 < timeout < float("inf"):
        raise ConfigError(f"--timeout must be a positive number of seconds, got {timeout:g}")
    return timeout


def to_be_launched(devices: int, ranks: Ranks) -> bool:
    """Whether ``--devices`` asks for ranks that have not been started yet.

    Raises:
        ConfigError: it is no number of devices, or not that of the ranks that torchrun has started.
    """
    if devices < 0:
        raise ConfigError(f"--devices must be 1 or more (0: one process, or what torchrun starts), got {devices}")
    if ranks.group is None:
        return devices > 1
    if devices not in (0, ranks.size):
        raise ConfigError(f"--devices {devices}, and torchrun has started {ranks.size} ranks: leave --devices out")
    return False
