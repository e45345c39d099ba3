"""Where a figure was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import innerloop
from innerloop.closed_forms import kernels


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Where a figure was measured."""
    return {
        "innerloop": innerloop.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "kernels": "PyTorch" if kernels.library() is None else "compiled",
        "system": f"{platform.system()} {platform.machine()}",
        "arguments": sys.argv[1:],
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or "cpu"


def _commit() -> str | None:
    """Commit of the checkout that innerloop runs from, None when it is installed elsewhere."""
    root = Path(innerloop.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None
