"""Compiles exported graphs into packages that contain the project's own matrix product.

    python packages.py NUM_THREADS SOURCE TARGET [SOURCE TARGET ...]

`Compiler` runs this file as a program in a second process, so it imports nothing of the package. No
other file depends on product.cpp: without it, compiled functions use torch's product.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _shape_of_product(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], y.shape[2]))


# The matrix product of compiled functions, see product.cpp; a plain call of it runs torch's.
if not hasattr(torch.ops.dqn_fast, "product"):  # the module may be loaded twice
    torch.library.define(
        "dqn_fast::product", "(Tensor x, Tensor y) -> Tensor", tags=(torch.Tag.flexible_layout,)
    )
    torch.library.register_fake("dqn_fast::product", _shape_of_product)
    torch.library.impl("dqn_fast::product", "cpu", torch.bmm)

PRODUCT = Path(__file__).with_name("product.cpp")


def own_product(x: Tensor) -> bool:
    """Whether `product.cpp` works here and is faster; torch's product can use several threads."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and torch.get_num_threads() == 1 and x.dtype == torch.float32


@functools.cache
def _build_product(folder: Path) -> dict[str, Any]:
    """Build `product.cpp` in `folder`; returns Inductor's options to call it and link it."""
    include, built = Path(torch.__file__).with_name("include"), folder / "product.o"
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", f"-I{include}"]
    compiler = [os.environ.get("CXX", "g++"), *flags]
    for command in (
        [*compiler, "-c", str(PRODUCT), "-o", str(built)],
        ["ar", "rcs", str(folder / "libdqn_fast_product.a"), str(built)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{PRODUCT.name}: {(done.stderr.splitlines() or ['failed'])[0]}")
    # Linkers search these folders for libraries.
    paths = [str(folder), os.environ.get("LIBRARY_PATH", "")]
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    declaration = (
        "AOTITorchError aoti_torch_cpu_product"
        "(AtenTensorHandle x, AtenTensorHandle y, AtenTensorHandle* out)"
    )
    return {
        "aot_inductor.custom_ops_to_c_shims": {torch.ops.dqn_fast.product.default: [declaration]},
        "aot_inductor.custom_op_libs": ["dqn_fast_product"],
    }


def compile_packages(num_threads: int, jobs: Sequence[str]) -> None:
    """Compile exported graphs into packages.

    Args:
        num_threads: threads that the compiled functions will use.
        jobs: for each graph a file of `torch.export.save` and the package to write.
    """
    torch.set_num_threads(num_threads)
    for source, target in zip(jobs[::2], jobs[1::2], strict=True):
        partial = Path(target).with_suffix(f".{os.getpid()}.pt2")
        program = torch.export.load(source)
        product = torch.ops.dqn_fast.product.default
        used = any(node.target is product for node in program.graph.nodes)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(partial),
            inductor_configs=_build_product(Path(source).parent) if used else {},
        )
        partial.replace(target)


if __name__ == "__main__":
    compile_packages(int(sys.argv[1]), sys.argv[2:])
