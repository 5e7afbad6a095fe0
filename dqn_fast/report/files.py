"""Reads single files of a run directory, which may be damaged, foreign or still growing.

Nothing in a file is run, memory stays within a small multiple of the file's size, and a pipe is not
waited for. What is wrong with a file is an `UnreadableError` in a few words. Content comes back in
few types: JSON as dicts, lists, texts, finite numbers, truth values and None; arrays as numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

MAX_JSON_BYTES = 2**26
"""Largest file that is parsed at once; the summary of 100,000 members has half of it."""
MAX_LINES_BYTES, MAX_LINE_BYTES = 2**30, 2**24
"""Largest file of log points, and its longest line; a line of 20,000 members has 6 MB."""
MAX_DEPTH, MAX_CHARACTERS = 16, 2_000
"""Deepest nesting and longest text in JSON; the rest is cut off."""


class UnreadableError(Exception):
    """A file cannot be used; the message says why, in a few words."""


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading, without waiting for one that is no regular file.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it cannot be opened, or it is a directory, a pipe or a device.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UnreadableError("it is not a regular file")
    return os.fdopen(number, "rb")


# ------------------------------------------------------------------------------------------ JSON


def parse_json(content: bytes) -> Any:
    """JSON as plain values; a number that is not finite becomes None.

    Raises:
        UnreadableError: it is not JSON in UTF-8, or nested too deeply to be read.
    """
    try:
        value = json.loads(
            content.decode("utf-8-sig"),
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=lambda _: None,
        )
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None
    except ValueError as error:
        raise UnreadableError(f"it is not JSON: {str(error)[:200]}") from None
    return _clean(value)


def _whole(text: str) -> int | float | None:
    return int(text) if len(text) <= 18 else _finite(text)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _clean(value: Any, depth: int = 0) -> Any:
    """The value with texts that can be encoded, and without what lies too deep or is too long."""
    if isinstance(value, str):
        short = value if len(value) <= MAX_CHARACTERS else f"{value[:MAX_CHARACTERS]}..."
        return short.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, (dict, list)) and depth == MAX_DEPTH:
        return "..."
    if isinstance(value, dict):
        return {_clean(key): _clean(item, depth + 1) for key, item in value.items()}
    return [_clean(item, depth + 1) for item in value] if isinstance(value, list) else value


def read_json(path: Path, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is larger, or no JSON object.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, most_bytes) + 1)
        except OSError as error:
            raise UnreadableError(str(error.strerror)) from error
    if len(content) > most_bytes:
        raise UnreadableError(f"it is larger than {most_bytes:,} bytes")
    value = parse_json(content)
    if not isinstance(value, dict):
        raise UnreadableError("it is not a JSON object")
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The JSON object of each line of a file; None for a line that has none.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it cannot be read to its end, or is larger than MAX_LINES_BYTES.
    """
    with open_regular(path) as file:
        total = 0
        while line := _read_line(file):
            total += len(line)
            if total > MAX_LINES_BYTES:
                raise UnreadableError(f"it is larger than {MAX_LINES_BYTES:,} bytes")
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = _read_line(file)
                    total += len(line)
                yield None
                continue
            try:
                row = parse_json(line)
            except UnreadableError:
                row = None
            yield row if isinstance(row, dict) else None


def _read_line(file: IO[bytes]) -> bytes:
    try:
        return file.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise UnreadableError(str(error.strerror)) from error


# ---------------------------------------------------------------------------------------- arrays


def read_arrays(
    path: Path, names: Collection[str]
) -> Iterator[tuple[str, NDArray[Any] | UnreadableError]]:
    """Each named array that a .npz file has, or why it cannot be read.

    An entry's size is compared with its header first, so that no header makes this allocate more
    than the file holds. Entries are stored, as `numpy.savez` does, not compressed.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a zip file.
    """
    with open_regular(path) as raw:
        try:
            archive = zipfile.ZipFile(raw)
        except Exception as error:  # zipfile raises many types for a damaged directory
            raise UnreadableError(_words(error)) from error
        with archive:
            known = {info.filename: info for info in archive.infolist()}
            for name in names:
                if (info := known.get(f"{name}.npy")) is not None:
                    try:
                        yield name, _read_array(archive, info)
                    except UnreadableError as error:
                        yield name, error
                    except Exception as error:  # of zipfile, zlib and numpy, for damaged bytes
                        yield name, UnreadableError(_words(error))


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise UnreadableError("it is compressed")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise UnreadableError(f"its format {version} is not known")
        shape, _, dtype = read(file, max_header_size=10_000)
        held = info.file_size - file.tell()
    if dtype.hasobject or dtype.kind not in "biuf":
        raise UnreadableError(f"it holds {dtype}, not numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise UnreadableError(f"its shape {shape} does not fit its {held:,} bytes")
    with archive.open(info) as file:
        array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=10_000)
    return np.asarray(array, array.dtype.newbyteorder("="))


def _words(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


# --------------------------------------------------------------------------------------- digests

DIGESTS = "digests.json"
"""Sizes and SHA-256 of a run's files, as the run wrote them at its last checkpoint: {"global_step":
n, "files": {name: {"bytes": n, "sha256": hex of the first n bytes}}}."""
GROWING = ("metrics.jsonl",)
"""Files to which lines are added after a checkpoint; all others are as long as their digest says.
"""


def read_digests(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file that `digests.json` names; path as of that file.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not in that form.
    """
    files = read_json(path, 2**20).get("files")
    if not isinstance(files, dict):
        raise UnreadableError("it names no files")
    found = {}
    for name, entry in files.items():
        size, digest = (
            (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        )
        if (
            isinstance(size, int)
            and size >= 0
            and isinstance(digest, str)
            and re.fullmatch("[0-9a-f]{64}", digest)
        ):
            found[name] = (size, digest)
        else:
            raise UnreadableError(f"its entry {name[:80]} has no size and digest")
    return found


def differing(folder: Path, digests: Mapping[str, tuple[int, str]]) -> list[str]:
    """Names of the files whose content is not the one that the run wrote; missing ones are not
    among them."""
    return [
        name for name, (size, digest) in digests.items() if _differs(folder / name, size, digest)
    ]


def _differs(path: Path, size: int, digest: str) -> bool:
    try:
        with open_regular(path) as file:
            longer = os.fstat(file.fileno()).st_size - size
            if longer < 0 or (longer > 0 and path.name not in GROWING):
                return True
            sha256, left = hashlib.sha256(), size
            while left and (block := file.read(min(left, 2**20))):
                sha256.update(block)
                left -= len(block)
            return sha256.hexdigest() != digest
    except FileNotFoundError:
        return False
    except (OSError, UnreadableError):
        return True
