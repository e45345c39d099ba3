"""A few hundred hostile cases for every reader and the command line; benchmarks/fuzz.py tries thousands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import Target, fuzz
from targets import targets

CASES = 200

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="watching a case takes signals and resource limits")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_nothing_but_words(target: Target, tmp_path: Path) -> None:
    found = fuzz(target, CASES, tmp_path / "sandbox")
    assert found.cases == CASES
    assert not found.failures, "\n\n".join(f"{f.times} x {f.what}\n{f.traceback}\n{f.case}" for f in found.failures)


def test_the_watch_sees_what_a_reader_must_not_do(tmp_path: Path) -> None:
    """Each of these, done by a reader that catches everything, is found."""
    import os
    import subprocess
    import time

    import fuzzing
    import torch
    from hypothesis import strategies as st

    deeds = {
        "os.system": lambda: os.system("true"),
        "subprocess": lambda: subprocess.run(["true"], check=False),
        "for writing": lambda: (tmp_path / "elsewhere").write_text("x"),
        "os.remove": lambda: os.remove(tmp_path / "sandbox" / "canary" / "a"),
        "compiles": lambda: eval("1 + 1"),
        "grew": lambda: torch.ones(200 * 2**20),
        "did not end": lambda: time.sleep(5),
        "KeyError": lambda: {}["a"],
    }

    def run(name: str) -> None:
        try:
            deeds[name]()
        except Exception:
            if name == "KeyError":
                raise

    with pytest.MonkeyPatch.context() as patch:
        for name in deeds:
            patch.setattr(fuzzing, "SECONDS", 0.5 if name == "did not end" else 20.0)
            found = fuzz(Target(name, st.just(name), run), 2, tmp_path / "sandbox")
            assert len(found.failures) == 1, name
            assert name in found.failures[0].what
            assert found.failures[0].times == 2
    assert not (tmp_path / "elsewhere").exists()
