"""NVIDIA's run-time compiler (NVRTC): where it is, and one compilation by it as a program.

    python -I -S nvrtc.py SOURCE CUBIN LIBRARY ... -- [OPTION ...]

The last LIBRARY is NVRTC, and those before it are loaded first. Messages, with what ptxas says of
registers, go to standard error. A process of its own compiles, so that it can be killed and needs
no memory afterwards. It imports nothing but the standard library.

CUDA builds of torch bring NVRTC as a package of Python, which no loader finds: it is loaded by its
full path, after the library of its builtins. No CUDA toolkit and no header is needed.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Nvrtc(NamedTuple):
    """An NVRTC on this machine.

    Attributes:
        libraries: absolute paths in the order in which they are loaded; the last one is NVRTC.
        major: of its CUDA version.
    """

    libraries: list[Path]
    major: int


# ------------------------------------------------------------------------------------ the search


def search_folders() -> list[Path]:
    """Folders that may hold NVRTC: of Python's packages, of the environment, of the system."""
    folders = []
    for entry in map(Path, sys.path):
        folders += sorted(entry.glob("nvidia/cu[0-9]*/lib"), reverse=True)
        folders.append(entry / "nvidia/cuda_nvrtc/lib")
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")]
    for root in (*filter(None, roots), sys.prefix, "/usr/local/cuda"):
        folders += [Path(root, "lib"), Path(root, "lib64")]
    folders += map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)))
    machine = os.uname().machine
    return [*folders, Path(f"/usr/lib/{machine}-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")]


def find_nvrtc(folders: Iterable[Path], major: int | None = None) -> Nvrtc | None:
    """The first NVRTC of `folders`, None if there is none.

    Args:
        folders: of libraries.
        major: CUDA version of torch. An NVRTC of this version is preferred, because the driver
            may be too old for what another one makes.
    """
    found = []
    for folder in folders:
        here = {
            version: path for path in folder.glob("libnvrtc.so*") if (version := _version(path))
        }
        builtins = [path for path in folder.glob("libnvrtc-builtins.so*") if _version(path)]
        for version in sorted(here, reverse=True):
            # Builtins of other versions do no harm: NVRTC asks for its own by name.
            libraries = [*sorted(builtins), here[version]]
            found.append(Nvrtc([Path(os.path.abspath(path)) for path in libraries], version[0]))
    return next((one for one in found if one.major == major), found[0] if found else None)


def _version(library: Path) -> tuple[int, ...]:
    """Of the file that a path stands for; empty if its name has none, or nothing is there."""
    try:
        name = library.resolve(strict=True).name
    except (OSError, RuntimeError):  # a broken link
        return ()
    match = re.search(r"\.so\.([0-9]+(?:\.[0-9]+)*)$", name)
    return tuple(map(int, match[1].split("."))) if match else ()


# ------------------------------------------------------------------------------- one compilation


def compile_file(source: str, cubin: str, libraries: list[str], options: list[str]) -> int:
    """Compile a file; returns 0 if the cubin was written."""
    for library in libraries[:-1]:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(libraries[-1])
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(name: str, *arguments: object) -> None:
        status = getattr(nvrtc, name)(*arguments)
        if status:
            what = nvrtc.nvrtcGetErrorString(status).decode()
            raise RuntimeError(f"{name}: {what}")

    def read(name: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        call(name, program, buffer)
        return buffer.raw[: size.value]

    text = Path(source).read_bytes()
    program = ctypes.c_void_p()
    name = os.path.basename(source).encode()
    call("nvrtcCreateProgram", ctypes.byref(program), text, name, 0, None, None)
    words = (ctypes.c_char_p * len(options))(*map(os.fsencode, options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), words)
    log = read("nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace").strip()
    if log:
        print(log, file=sys.stderr)
    if status:
        if not log:
            print("error:", nvrtc.nvrtcGetErrorString(status).decode(), file=sys.stderr)
        return 1
    Path(cubin).write_bytes(read("nvrtcGetCUBIN"))
    return 0


if __name__ == "__main__":
    try:
        source, cubin, *words = sys.argv[1:]
        end = words.index("--")
        sys.exit(compile_file(source, cubin, words[:end], words[end + 1 :]))
    except (OSError, RuntimeError, AttributeError) as error:
        sys.exit(f"error: {error}")
