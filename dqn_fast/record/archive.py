"""What a file must be before torch may read it as a checkpoint.

With `weights_only`, torch.load runs no code from a file. But it waits for a pipe, unpacks archives
that are a thousand times larger than their file, and gives a pickle the memory that it asks for.
"""

from __future__ import annotations

import os
import pickletools
import stat
import zipfile
from pathlib import Path
from typing import IO

GLOBALS = frozenset(
    [f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Untyped")]
    + [f"torch {kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")]
    + [f"torch Complex{kind}Storage" for kind in ("Float", "Double")]
    + [f"torch uint{bits}" for bits in (16, 32, 64)]
    + [f"torch._utils _rebuild_tensor_v{version}" for version in (2, 3)]
    + ["collections OrderedDict"]
)
"""Names that the pickle of a checkpoint uses: those of plain tensors on a device."""


def check_archive(path: Path | str) -> None:
    """Refuse a file that is not one that `save_checkpoint` could have written.

    It must be a regular file, a zip archive without compression, and name nothing but what plain
    tensors need.

    Raises:
        ValueError: it is not; the message names the file.
        OSError: it cannot be opened.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise ValueError(f"{path}: is {kind}")
    with os.fdopen(descriptor, "rb") as file:
        try:
            problem = _problem(file, status.st_size)
        except Exception as error:  # zipfile and pickletools raise many types for damaged files
            raise ValueError(f"{path}: not a checkpoint of this program") from error
    if problem:
        raise ValueError(f"{path}: not a checkpoint of this program ({problem})")


def _problem(file: IO[bytes], size: int) -> str:
    """What is wrong with an archive of `size` bytes; empty if nothing is."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            return "two of its entries have one name"
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return "it is compressed"
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
            return "its entries are larger than the file"
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            return f"it has {len(pickles)} entries data.pkl"
        content = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and argument not in GLOBALS:
            return f"it names {ascii(argument)[:100]}, which is no plain data"
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BYTEARRAY8"):
            return f"its opcode {opcode.name} is for no plain data"
    return ""
