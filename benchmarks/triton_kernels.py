"""Compile the Triton kernels for an H100, without one, at the sizes of an Omniglot step; print registers and spills.

    python benchmarks/triton_kernels.py [--dtype float64]

The launches are those of the block's operators on tensors without memory, recorded instead of started.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from innerloop.closed_forms import triton_launches
from innerloop.closed_forms.triton_block import Point, rows

H100 = GPUTarget("cuda", 90, 32)
TASKS, IMAGES, FILTERS = 8, 20, 64
BLOCKS = [(1, 28), (FILTERS, 14), (FILTERS, 7), (FILTERS, 3)]
"""Channels and size of each block's images."""

_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8"}
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def launches(dtype: torch.dtype, dot: str) -> Iterator[tuple[str, list[Launch]]]:
    """By what a block does, what it would start."""
    made: list[Launch] = []
    start = triton_launches.launch
    triton_launches.launch = lambda kernel, grid, *a, **c: made.append((kernel, grid, a, c))
    try:
        for channels, size in BLOCKS:
            images = torch.empty(0, dtype=dtype, device="meta")
            x, w = rows(images, (TASKS, IMAGES, channels, size, size)), rows(images, (TASKS, FILTERS, channels, 3, 3))
            b = gamma = beta = images.new_empty(TASKS, FILTERS)
            first = channels == 1
            y, *kept = triton_launches.value(x, w, b, gamma, beta, gamma, beta, 1e-5, 0.01, 2, dot, 0.1)
            yield f"{channels} -> {FILTERS}, {size}x{size}: value", made[:]
            made.clear()
            point = Point(x, w, b, gamma, beta, y, *kept)
            triton_launches.gradient(point, y, not first, True, 0.01, 2, dot)
            yield f"{channels} -> {FILTERS}, {size}x{size}: gradient", made[:]
            made.clear()
            direction = (None if first else x, w, gamma, None)
            triton_launches.second_order(point, y, direction, not first, True, 0.01, 2, dot)
            yield f"{channels} -> {FILTERS}, {size}x{size}: second order", made[:]
            made.clear()
    finally:
        triton_launches.launch = start


def source(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """What the just-in-time compiler would compile for these arguments."""
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, int) and value == 1:
            constants = {**constants, name: 1}
        signature[name] = _TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {k: a for k, a in attributes.items() if signature[kernel.arg_names[k[0]]] != "constexpr"}
    return ASTSource(kernel, signature, constants, attributes)


def resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert registers is not None
    assert spills is not None
    return int(registers[1]), int(spills[1])


def main() -> None:
    """Compile everything once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--dot", choices=["tf32", "tf32x3", "ieee"], default="tf32")
    parser.add_argument("--only", type=int, choices=range(len(BLOCKS)), help="one block alone, by its number")
    arguments = parser.parse_args()
    dot = "ieee" if arguments.dtype == "float64" else arguments.dot
    print(f"triton {triton.__version__}, {arguments.dtype}, products in {dot}, {TASKS} tasks of {IMAGES} images")
    seen: dict[str, str] = {}
    for number, (what, started) in enumerate(launches(getattr(torch, arguments.dtype), dot)):
        if arguments.only not in (None, number // 3):
            continue
        print(f"{what}: {len(started)} launches")
        for kernel, grid, given, constants in started:
            ast = source(kernel, given, constants)
            if ast.hash() not in seen:
                compiled = triton.compile(ast, target=H100, options={"num_warps": 4})
                registers, spills = resources(compiled.asm["ptx"])
                shared = compiled.metadata.shared
                seen[ast.hash()] = f"{registers} registers, {spills} bytes spilled, {shared} bytes of shared memory"
            programs = grid[0] * (grid[1] if len(grid) > 1 else 1) * (grid[2] if len(grid) > 2 else 1)
            print(f"    {kernel.__name__:16} {programs:5} programs: {seen[ast.hash()]}")


if __name__ == "__main__":
    main()
