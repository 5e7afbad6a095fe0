"""Run directories whose files are damaged, foreign or hostile, for the tests of the report.

Each entry of ODD changes a whole run directory in place.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Change = Callable[[Path], object]
DEEP = "[" * 100_000 + "]" * 100_000
SOME_DEEP = '{"a":' * 600 + "1" + "}" * 600
HUGE = "9" * 400
JSON_VALUES = {
    "null": "null", "a list": "[1, 2]", "a text": '"x"', "a number": "1e400", "NaN": "NaN",
    "a huge number": HUGE, "nothing": "", "deep": DEEP, "half": '{"a": [1,',
    "a surrogate": '{"env_id": "\\ud800", "status": "\\udc00<script>"}',
    "HTML": '{"env_id": "</script><b>", "name": "<img src=x>", "args": {"<b>": "</style>"}}',
    "deep inside": f'{{"args": {SOME_DEEP}, "derived": {SOME_DEEP}}}',
    "duplicates": '{"env_id": "a", "env_id": ["b"], "status": 1, "status": {"x": []}}',
}  # fmt: skip
ODD_PARTS: list[Any] = [
    None, [], {}, "x", 1e300, -1, True, [None], [1, "a"], [[]], {"a": None}, [{}], [{"seed": "x"}],
    [{"seed": 1}, {"seed": [2]}], [{"gamma": 0.5}, {"gamma": 0.9}], [{"seed": 0}] * 5,
]  # fmt: skip
CONFIG_PARTS = ("args", "derived", "env_params", "software", "changed", "env_id")
ARGS = ("num_seeds", "seed", "tau", "batch_size", "buffer_size", "target_update_interval",
        "learning_starts", "total_timesteps", "eval_episodes", "name")  # fmt: skip
SUMMARY = ("members", "status", "num_updates", "global_step", "wall_s", "eval_return_mean",
           "optimal_return", "policy_optimal", "eval_return_std", "num_episodes")  # fmt: skip
NUMBERS = (-1, 0, -1e300, 1e300, 2**62, "5", None, [1], {"a": 1}, True)


def write(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


def change_object(name: str, key: str, value: Any, part: str = "") -> Change:
    """Give a file's object another value, at its top or in one of its parts."""

    def change(path: Path) -> None:
        content = json.loads((path / name).read_text())
        (content[part] if part else content)[key] = value
        (path / name).write_text(json.dumps(content))

    return change


def change_rows(change_row: Callable[[int, dict[str, Any]], Any]) -> Change:
    """Replace each row of the metrics by what the function returns, or by its own change."""

    def change(path: Path) -> None:
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows = [(i, json.loads(line)) for i, line in enumerate(lines)]
        new = [change_row(i, row) or row for i, row in rows]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))

    return change


def change_array(name: str, key: str, make: Callable[[Any], Any], **save: Any) -> Change:
    """Replace one array of a .npz file."""

    def change(path: Path) -> None:
        with np.load(path / name) as file:
            arrays = dict(file)
        arrays[key] = make(arrays[key])
        np.savez(path / name, **arrays)

    return change


def entry(name: str, key: str, content: bytes, **options: Any) -> Change:
    """Replace a .npz file by one with a single entry of these bytes."""

    def change(path: Path) -> None:
        with zipfile.ZipFile(path / name, "w", **options) as archive:
            archive.writestr(f"{key}.npy", content)

    return change


def header(shape: str, dtype: str = "'<f8'", data: bytes = b"\0" * 8) -> bytes:
    """Bytes of a .npy file with such a header."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def in_place_of(name: str, make: Callable[[Path], object]) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


def cut(name: str, share: float) -> Change:
    def change(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(len(content) * share)])

    return change


def flip(name: str, share: float) -> Change:
    def change(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[int(len(content) * share)] ^= 0x55
        (path / name).write_bytes(content)

    return change


def long_line(path: Path) -> None:
    with (path / "metrics.jsonl").open("a") as file:
        for _ in range(100):
            file.write(" " * 1_000_000)
        file.write('{"global_step": 1}\n{"global_step": 99000, "losses/td_loss": 0.5}\n')


def bom(path: Path) -> None:
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())


def object_array(path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}, None], object), allow_pickle=True)
    entry("diagnostics.npz", "global_step", buffer.getvalue())(path)


def bomb(path: Path) -> None:
    data = header("(200_000_000,)".replace("_", ""), data=b"\0" * 20_000_000)
    entry("episodes.npz", "global_step", data, compression=zipfile.ZIP_DEFLATED)(path)


FILES = ("config.json", "summary.json", "metrics.jsonl", "episodes.npz", "diagnostics.npz")
ODD: dict[str, Change] = {
    **{f"{name} is {what}": write(name, text)
       for name in FILES[:3] for what, text in JSON_VALUES.items()},
    **{f"{name} is a directory": in_place_of(name, Path.mkdir) for name in FILES},
    **{f"{name} is a pipe": in_place_of(name, os.mkfifo) for name in FILES},
    **{f"{name} is a loop": in_place_of(name, lambda p: p.symlink_to(p)) for name in FILES},
    **{f"{name} is missing": in_place_of(name, lambda p: None) for name in FILES},
    **{f"{name} is no UTF-8": write(name, b"\xff\xfe{}\x80\n" * 3) for name in FILES},
    **{f"{name} cut at {s}": cut(name, s) for name in FILES for s in (0.0, 0.3, 0.99)},
    **{f"{name} flipped at {s}": flip(name, s) for name in FILES for s in (0.1, 0.5, 0.9)},
    **{f"config {part} is {value!r:.40}": change_object("config.json", part, value)
       for part in CONFIG_PARTS for value in ODD_PARTS},
    **{f"members are {value!r:.60}": change_object("config.json", "members", value, "derived")
       for value in ODD_PARTS},
    **{f"grid_shape is {value}": change_object("config.json", "grid_shape", value, "derived")
       for value in ([3, 5], [-3, -5], [0, 0], [2**40, 1], [1.0, 15], [True, 15], "15", [1, 2, 3])},
    **{f"{name} is {value!r}": change_object("config.json", name, value, "args")
       for name in ARGS for value in NUMBERS},
    **{f"summary {name} is {value!r}": change_object("summary.json", name, value)
       for name in SUMMARY for value in (*NUMBERS, [], [{}], [{"seed": {}}], [{"a": 1}] * 3)},
    "BOM": bom,
    "a line of 100 MB": long_line,
    "rows are lists": change_rows(lambda i, row: [row]),
    "rows are texts": change_rows(lambda i, row: "row"),
    "steps are texts": change_rows(lambda i, row: row | {"global_step": str(i)}),
    "steps are huge": change_rows(lambda i, row: row | {"global_step": 10**30}),
    "steps are infinite": change_rows(lambda i, row: row | {"global_step": float("inf")}),
    "steps are negative": change_rows(lambda i, row: row | {"global_step": -1 - i}),
    "steps are equal": change_rows(lambda i, row: row | {"global_step": 0}),
    "losses are texts": change_rows(lambda i, row: row | {"losses/td_loss": "0.5"}),
    "losses are lists": change_rows(lambda i, row: row | {"losses/td_loss": [[], {}]}),
    "losses are huge": change_rows(lambda i, row: row | {"losses/td_loss": 1.7e308}),
    "losses are huge numbers": change_rows(lambda i, row: row | {"losses/td_loss": 10**400}),
    "all numbers are huge": change_rows(
        lambda i, row: {k: v if k == "global_step" else (-1) ** i * 1.7e308 for k, v in row.items()}
    ),
    "all numbers are null": change_rows(
        lambda i, row: {k: v if k == "global_step" else None for k, v in row.items()}
    ),
    "times go back": change_rows(lambda i, row: row | {"wall_s": -1e300 if i % 2 else 1e300}),
    "members are numbers": change_rows(lambda i, row: row | {"members": 5}),
    "members are ragged": change_rows(
        lambda i, row: row | {"members": {"losses/td_loss": [0.5] * i, "eval/q_start": "x"}}
    ),
    "a million members": change_rows(
        lambda i, row: row | {"members": {"losses/td_loss": [0.0] * (10**6 if i == 0 else 0)}}
    ),
    "many names": change_rows(lambda i, row: row | {f"x/{i}/{k}": 1 for k in range(1_000)}),
    "odd names": change_rows(lambda i, row: row | {"q/probe_x": 1, "": 2, "</script>": 3, "\0": 4}),
    "probes without end": change_rows(lambda i, row: row | {f"q/probe_{k}": k for k in range(50)}),
    **{f"episodes {key} {what}": change_array("episodes.npz", key, make)
       for key in ("global_step", "episode_return", "episode_length", "member")
       for what, make in {
           "shorter": lambda a: a[:5], "2-d": lambda a: a[:, None], "empty": lambda a: a[:0],
           "text": lambda a: a.astype(str), "NaN": lambda a: np.full(len(a), np.nan),
           "negative": lambda a: -1 - np.abs(a), "complex": lambda a: a.astype(complex),
           "huge": lambda a: np.full(len(a), 1e308), "big-endian": lambda a: a.astype(">f8"),
           "float16": lambda a: a.astype(np.float16), "bool": lambda a: a.astype(bool),
           "unsigned": lambda a: np.full(len(a), 2**64 - 1, np.uint64),
       }.items()},
    **{f"diagnostics {key} {what}": change_array("diagnostics.npz", key, make)
       for key in ("global_step", "quantile_levels", "td_error_quantiles", "td_error_sample",
                   "dead_units", "num_syncs", "q_values", "visits", "q_star", "terminal",
                   "optimal_return")
       for what, make in {
           "NaN": lambda a: np.full(np.shape(a), np.nan), "scalar": lambda a: np.array(3.0),
           "empty": lambda a: np.zeros((0, *np.shape(a)[1:])), "text": lambda a: np.array("x"),
           "infinite": lambda a: np.full(np.shape(a), np.inf), "5-d": lambda a: np.zeros([1] * 5),
           "negative": lambda a: -1.0 - np.abs(a), "huge": lambda a: np.full(np.shape(a), 1e308),
           "no axis": lambda a: np.zeros((*np.shape(a)[:-1], 0)),
       }.items()},
    "no state": change_array("diagnostics.npz", "q_values", lambda a: a[:, :, :0]),
    "an object array": object_array,
    "a zip bomb": bomb,
    **{f"header {shape} {dtype}": entry("diagnostics.npz", "global_step", header(shape, dtype))
       for shape, dtype in (("(1000000000000,)", "'<f8'"), ("(-1,)", "'<i8'"), ("(1, -1)", "'<f8'"),
                            ("'x'", "'<f8'"), ("(1.5,)", "'<f8'"), ("(1,)", "'O'"),
                            ("(1,)", "[('a', '<f8')]"), ("(1,)", "'<f99'"), ("()", "'<f8'"),
                            ("(" * 300 + ")" * 300, "'<f8'"), ("(1,)", "'<M8[s]'"),
                            ("(True,)", "'<f8'"))},
    "an empty entry": entry("diagnostics.npz", "global_step", b""),
    "an entry of text": entry("diagnostics.npz", "global_step", b"x" * 500),
    "a header of another version": entry(
        "episodes.npz", "member", b"\x93NUMPY\x09\x00" + b"\0" * 100
    ),
    "an empty zip": write("episodes.npz", b"PK\x05\x06" + b"\0" * 18),
    "agent.gif is a pipe": lambda path: os.mkfifo(path / "agent.gif"),
    "agent.gif is a directory": lambda path: (path / "agent.gif").mkdir(),
    "agent.gif is large": write("agent.gif", b"GIF8" + b"\0" * 3_000_000),
    "agent.gif is cut": write("agent.gif", b"GIF89a\x01"),
    "agent.gif is HTML": write("agent.gif", b"GIF8</script>"),
    **{f"digests.json is {what}": write("digests.json", text)
       for what, text in JSON_VALUES.items()},
    "digests.json is a pipe": lambda path: os.mkfifo(path / "digests.json"),
    **{f"digests.json has {value!r:.40}": write("digests.json", json.dumps({"files": value}))
       for value in (*ODD_PARTS, {"metrics.jsonl": {"bytes": -1, "sha256": "0" * 64}},
                     {"metrics.jsonl": {"bytes": 1, "sha256": "x"}},
                     {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}},
                     {"metrics.jsonl": {"bytes": 2**70, "sha256": "0" * 64}})},
}  # fmt: skip
"""What is odd, and the function that makes it so."""

NO_RUNS: dict[str, Change] = {
    "missing": shutil.rmtree,
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
    "a loop": lambda path: (shutil.rmtree(path), path.symlink_to(path)),
    "a dangling link": lambda path: (shutil.rmtree(path), path.symlink_to("nowhere")),
    "a pipe": lambda path: (shutil.rmtree(path), os.mkfifo(path)),
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
    "without any file of a run": lambda path: [(path / name).unlink() for name in FILES],
}
"""Nothing that a report could show."""
