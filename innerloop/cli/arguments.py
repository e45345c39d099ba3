"""What the command line gives a command, parsed and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import tyro
from pydantic import TypeAdapter, ValidationError

from innerloop.training.config import ConfigError, problems

Arguments = TypeVar("Arguments")


def parsed(kind: type[Arguments], arguments: Sequence[str], prog: str) -> Arguments:
    """A dataclass of arguments from the words of a command line, every value checked.

    Raises:
        ConfigError: a value is out of range.
    """
    chosen = tyro.cli(kind, args=list(arguments), prog=prog)
    try:
        return TypeAdapter(kind).validate_python(asdict(chosen))  # type: ignore[call-overload]
    except ValidationError as error:
        raise ConfigError(problems(error)) from None


def check_out(out: Path, overwrite: bool) -> None:
    """Raise ``ConfigError`` where a file cannot be written, before any work is done."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, in it or elsewhere")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists already; name another file, or write over it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
