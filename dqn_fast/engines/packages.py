"""Compiles exported graphs into packages that contain the project's own matrix product.

`Compiler` runs `main` in a second process, which shares nothing with the first one but files. No
other file depends on product.cpp: without it, compiled functions use torch's product.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqn_fast.engines import cache


def _shape_of_product(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], y.shape[2]))


# The matrix product of compiled functions, see product.cpp; a plain call of it runs torch's.
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


def compile_packages(num_threads: int, folder: Path, jobs: Sequence[Path]) -> None:
    """Compile exported graphs into packages of the cache.

    Args:
        num_threads: threads that the compiled functions will use.
        folder: for files that only this process needs, inside the cache.
        jobs: for each graph a file of `torch.export.save` and the package to write.
    """
    torch.set_num_threads(num_threads)
    shared = SharedParts(cache.subfolder(folder.parent, "inductor"))
    shared.lend()
    # Functions without a product get it too: other options need other precompiled headers.
    options = _build_product(folder) if own_product(torch.empty(0)) else {}
    for source, target in zip(jobs[::2], jobs[1::2], strict=True):
        program = torch.export.load(source)
        # Stand-ins without memory: the file holds no example, which would be as large as the state.
        placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
        program.example_inputs = (tuple(node.meta["val"] for node in placeholders), {})
        made = source.with_suffix(".made.pt2")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(made), inductor_configs=options
        )
        cache.write_whole(made.read_bytes(), target, folder)
        shared.keep()


class SharedParts:
    """What Inductor makes for all functions: precompiled headers, and probes of the processor.

    They take 20 s. Inductor would keep them in a folder of its own and believe whatever is there;
    here each compiler has a new folder, into which `lend` links the parts of earlier ones whose
    bytes are those that they were kept with, and `keep` links new parts back. Each part is kept
    under its digest and its path, so that it is there whole or not at all.
    """

    def __init__(self, kept: Path) -> None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        self._kept, self._folder = kept, Path(default_cache_dir())

    def lend(self) -> None:
        """Link the kept parts to where Inductor looks for them."""
        from torch._inductor.cpp_builder import is_gcc

        if not is_gcc():  # clang's headers hold the path that they were made at
            return
        for part in self._kept.iterdir():
            digest, _, name = part.name.partition("-")
            target = self._folder / name.replace("@", "/")
            try:
                whole = hashlib.sha256(cache.read_trusted(part)).hexdigest() == digest
            except (cache.UnusableFileError, FileNotFoundError):
                whole = False
            if not whole or target.exists():
                cache.remove(part)
                continue
            with contextlib.suppress(OSError):  # a disk without links
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(part, target)

    def keep(self) -> None:
        """Link the parts that are new into the cache."""
        for part in self._parts():
            name = str(part.relative_to(self._folder)).replace("/", "@")
            if part.stat().st_nlink > 1 or "@" in part.name:
                continue
            digest = hashlib.sha256(part.read_bytes()).hexdigest()
            with contextlib.suppress(OSError):
                os.link(part, self._kept / f"{digest}-{name}")

    def _parts(self) -> Iterable[Path]:
        yield from self._folder.glob("precompiled_headers/*.h*")
        yield from self._folder.glob("??/*.so")


def main(words: Sequence[str]) -> None:
    """Compile: number of threads, folder, then `jobs` of `compile_packages`."""
    os.umask(0o077)
    num_threads, folder, *jobs = words
    compile_packages(int(num_threads), Path(folder), [Path(job) for job in jobs])
