"""The tracker: complete metrics after any failure, and wandb that never delays a run.

The tests use the real wandb, offline or with local servers, and read its records from its own file.
A test of the time or the output of a whole process starts a process that runs `SCRIPT`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from dqn_fast.record import tracker as tracker_module
from dqn_fast.record.tracker import (
    CompositeTracker,
    JsonlTracker,
    Tracker,
    TrackerConfig,
    WandbTracker,
    make_tracker,
)

SCRIPT = """
import json, os, sys, time
from pathlib import Path
from dqn_fast.record import tracker as tracker_module
from dqn_fast.record.tracker import TrackerConfig, make_tracker

run_dir, options, before, middle = Path(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:]
for name in ("START_S", "PROBE_S", "FINISH_S"):  # a busy machine is no reason to give up
    setattr(tracker_module, name, 60.0)
exec(before)
start = time.monotonic()
tracker = make_tracker(TrackerConfig(
    run_dir=run_dir, run_name="r", config={"args": {"seed": 0}}, total_timesteps=1000,
    num_members=1, **options))
made = time.monotonic()
for step in range(100, 1001, 100):
    tracker.progress(step - 50)
    tracker.log(step, {"charts/epsilon": 1 - step / 1000, "charts/episodic_return": [step / 7],
                       "perf/env_steps_per_s": step * 1000.0 / 3})
    time.sleep(0.02)
exec(middle)
end = time.monotonic()
tracker.finish({"eval_return_mean": 0.5})
times = {"start": made - start, "finish": time.monotonic() - end}
(run_dir / "times.json").write_text(json.dumps(times))
"""
LIMITS = "".join(
    f"tracker_module.{name} = {getattr(tracker_module, name)}\n"
    for name in ("START_S", "PROBE_S", "FINISH_S")
)
"""The longest waits of a user's run."""
LATE_S = 9.0
"""Seconds that such a run may be late: five, and four for stalls of the machine. Without a limit,
wandb's own waits take ten seconds or more."""

STAND_IN_SERVER = """
import gzip, http.server, re, threading
class Server(http.server.BaseHTTPRequestHandler):
    # Knows just enough of wandb's protocol for a run to start.
    hang = threading.Event()
    posts_hang = {posts_hang}
    slow_s = 0  # before the history is taken
    steps = set()  # those of the history
    history = {{}}  # lines of each run, by their offset
    def do_GET(self):
        self.answer({{}})
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.posts_hang:
            threading.Event().wait()
        if "file_stream" in self.path:
            time.sleep(self.slow_s)
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            self.steps.update(map(int, re.findall(rb"global_step[^0-9]+([0-9]+)", body)))
            sent = json.loads(body).get("files", {{}}).get("wandb-history.jsonl")
            for i, line in enumerate(sent["content"] if sent else []):
                lines = self.history.setdefault(self.path.split("/")[-2], {{}})
                lines[sent["offset"] + i] = json.loads(line)
        name = json.loads(body)["variables"].get("name") if b"variables" in body else None
        bucket = {{"id": "QQ==", "name": name, "displayName": "r", "config": "{{}}",
                  "project": {{"name": "p", "entity": {{"name": "e"}}}}}}
        if b"RunResumeStatus" in body:
            lines = self.history.get(name)
            last = json.dumps(lines[max(lines)]) if lines else "{{}}"
            bucket |= {{"historyLineCount": len(lines or ()), "historyTail": json.dumps([last]),
                       "summaryMetrics": last, "eventsTail": "[]", "eventsLineCount": 0,
                       "logLineCount": 0, "tags": [], "wandbConfig": json.dumps({{"t": 1}})}}
            model = {{"id": "x", "name": "p", "entity": {{"id": "e", "name": "e"}},
                     "bucket": bucket if lines else None}}
            return self.answer({{"data": {{"model": model}}}})
        answers = {{"upsertBucket": {{"bucket": bucket, "inserted": True}},
                   "createRunFiles": {{"runID": "QQ==", "uploadHeaders": [], "files": []}}}}
        self.answer({{"data": {{name: answer for name, answer in answers.items()
                              if name.lower().encode() in body.lower()}}}})
    def answer(self, reply):
        if self.hang.is_set():
            threading.Event().wait()
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
server.handle_error = lambda *args: None  # of a client that has given up
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % server.server_address[1]
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No wandb settings of the person who runs the tests, and none left behind; long waits, because
    a busy machine is no reason to give up."""
    for name in ("START_S", "PROBE_S", "FINISH_S"):
        monkeypatch.setattr(tracker_module, name, 60.0)
    before = dict(os.environ)
    for name in before:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def config(run_dir: Path, **options: Any) -> TrackerConfig:
    defaults: dict[str, Any] = {
        "run_name": "LineWorld__x",
        "config": {"args": {"seed": 3, "learning_rate": 1e-3, "hidden_sizes": [128, 128]}},
        "total_timesteps": 1000,
        "num_members": 1,
    }
    return TrackerConfig(run_dir=run_dir, **(defaults | options))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, read by a parser that refuses NaN and Infinity."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def script(run_dir: Path, before: str = "", middle: str = "", **options: Any) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(run_dir), json.dumps(options), before, middle]


def run_script(run_dir: Path, **options: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run SCRIPT in a process of its own; what it left, and the seconds it took."""
    start = time.monotonic()
    done = subprocess.run(script(run_dir, **options), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done, time.monotonic() - start


class WandbFile:
    """The records of a run, read from its .wandb file.

    A header of 7 bytes, then blocks of 32 KiB (the header counts to the first) of chunks: CRC-32 of
    type and data, length and type (whole, first, middle, last), data. A chunk never crosses a
    block; the end of a block too short for a chunk's head is padding. Data: protobuf records.
    """

    def __init__(self, path: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: list[Any] = []
        self.artifacts: list[Any] = []
        self.run: Any = None
        self.exit_code: int | None = None
        for data in self._chunks(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            match record.WhichOneof("record_type"):
                case "run":
                    self.run = record.run
                    self.config |= self._values(record.run.config.update)
                case "history":
                    self.history.append(self._values(record.history.item))
                case "summary":
                    self.summary |= self._values(record.summary.update)
                case "metric":
                    self.metrics.append(record.metric)
                case "artifact":
                    self.artifacts.append(record.artifact)
                case "exit":
                    self.exit_code = record.exit.exit_code

    @staticmethod
    def _chunks(data: bytes) -> Iterator[bytes]:
        assert data[:4] in (b":W&B", b"")
        block, at, whole = 32 * 1024, 7, b""
        while at + 7 <= len(data):
            if block - at % block < 7:
                at += block - at % block
                continue
            crc, length, kind = struct.unpack_from("<IHB", data, at)
            chunk = data[at + 7 : at + 7 + length]
            if len(chunk) < length:  # still being written
                return
            assert zlib.crc32(bytes([kind]) + chunk) == crc
            at += 7 + length
            whole += chunk
            if kind in (1, 4):
                yield whole
                whole = b""

    @staticmethod
    def _values(items: Any) -> dict[str, Any]:
        return {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items
        }


def closed_files(run_dir: Path, pattern: str = "*run-*") -> list[WandbFile]:
    """The runs of a folder, once they are closed: shortly after wandb says so."""
    deadline = time.monotonic() + 60
    while True:
        paths = run_dir.glob(f"wandb/{pattern}/run-*.wandb")
        files = [WandbFile(path) for path in paths]
        if all(file.exit_code is not None for file in files) or time.monotonic() > deadline:
            return files
        time.sleep(0.05)


def wandb_files(run_dir: Path, pattern: str = "*run-*") -> dict[str, WandbFile]:
    """The runs of a folder by name, once they are closed."""
    return {file.run.display_name: file for file in closed_files(run_dir, pattern)}


class Recorder(Tracker):
    """Remembers the names of the calls it got; fails at one of them."""

    def __init__(self, fail_at: str = "") -> None:
        self.calls: list[str] = []
        self._fail_at = fail_at

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self._fail_at:
            raise RuntimeError("broken")

    def progress(self, global_step: int) -> None:
        self._note("progress")

    def log(self, global_step: int, metrics: Mapping[str, float | Sequence[float]]) -> None:
        self._note("log")

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._note("finish")


# --- the composite -----------------------------------------------------------------------------


def test_import_is_cheap() -> None:
    """Importing the tracker imports none of the packages that only some runs need."""
    code = "import sys, dqn_fast.record.tracker; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"wandb", "plotly", "tensorboard", "torch"} & set(output.split())


@pytest.mark.parametrize("fail_at", ["progress", "log", "finish"])
def test_failing_backend_is_dropped_with_one_warning(
    fail_at: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An exception in one backend reaches neither the caller nor the other backends."""
    good, bad = Recorder(), Recorder(fail_at)
    tracker = CompositeTracker([bad, JsonlTracker(tmp_path / "metrics.jsonl"), good], 1)
    for step in (1, 2):
        tracker.progress(step)
        tracker.log(step, {"charts/epsilon": 1.0})
    tracker.finish({})
    tracker.finish({})
    assert good.calls == ["progress", "log", "progress", "log", "finish"]
    assert bad.calls[-1] == fail_at
    assert bad.calls.count(fail_at) == 1
    assert len(rows(tmp_path)) == 2
    assert warnings(capfd.readouterr().err) == [
        "warning: Recorder failed and is switched off: RuntimeError: broken"
    ]


def test_wrong_number_of_members_is_refused(tmp_path: Path) -> None:
    """A metric that is neither one value nor one per member is a mistake of the caller."""
    tracker = make_tracker(config(tmp_path, num_members=3))
    with pytest.raises(ValueError, match="losses/td_loss"):
        tracker.log(1, {"losses/td_loss": [1.0, 2.0]})


# --- metrics.jsonl -----------------------------------------------------------------------------


def test_jsonl_of_one_member(tmp_path: Path) -> None:
    """One strict JSON object per log point: means in the order given, null for no value."""
    tracker = make_tracker(config(tmp_path))
    tracker.log(64, {"charts/epsilon": 0.5, "charts/episodic_return": [math.nan], "eval/x": 2})
    tracker.log(128, {"losses/td_loss": np.array([0.25], dtype=np.float32), "q/y": math.inf})
    tracker.finish({})
    first, second = rows(tmp_path)
    assert list(first) == [
        "global_step", "charts/epsilon", "charts/episodic_return", "eval/x", "wall_s",
    ]  # fmt: skip
    assert first | {"wall_s": 0} == {
        "global_step": 64,
        "charts/epsilon": 0.5,
        "charts/episodic_return": None,
        "eval/x": 2.0,
        "wall_s": 0,
    }
    assert second["losses/td_loss"] == 0.25
    assert second["q/y"] is None
    assert second["wall_s"] >= first["wall_s"] >= 0


def test_jsonl_of_several_members(tmp_path: Path) -> None:
    """The mean leaves out members without a value; `members` holds every member's own."""
    tracker = make_tracker(config(tmp_path, num_members=3))
    tracker.log(
        64,
        {
            "charts/epsilon": 0.5,
            "charts/episodic_return": [1.0, math.nan, 3.0],
            "losses/td_loss": [math.nan] * 3,
            "q/x": [math.inf, -math.inf, 0.0],
        },
    )
    tracker.finish({})
    (row,) = rows(tmp_path)
    assert row["charts/episodic_return"] == 2.0
    assert row["losses/td_loss"] is None
    assert row["q/x"] is None
    assert row["members"] == {
        "charts/episodic_return": [1.0, None, 3.0],
        "losses/td_loss": [None, None, None],
        "q/x": [None, None, 0.0],
    }


def test_same_content_twice(tmp_path: Path) -> None:
    """Two runs with the same numbers differ in wall_s and perf/* only."""

    def write(name: str) -> list[dict[str, Any]]:
        run_dir = tmp_path / name
        run_dir.mkdir()
        tracker = make_tracker(config(run_dir, num_members=2))
        rng = np.random.default_rng(0)
        for step in range(50):
            loss = rng.normal(size=2).astype(np.float32)
            tracker.log(step, {"losses/td_loss": loss, "perf/updates_per_s": time.monotonic()})
        tracker.finish({})
        timed = {"wall_s", "perf/updates_per_s"}
        assert all(timed <= set(row) for row in rows(run_dir))
        return [{k: v for k, v in row.items() if k not in timed} for row in rows(run_dir)]

    assert write("a") == write("b")


def test_half_a_line_is_cut_on_reopening(tmp_path: Path) -> None:
    """A resumed run appends, after cutting what a killed process left of its last line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"global_step": 1}\n{"global_step": 2, "charts/eps')
    tracker = make_tracker(config(tmp_path))
    tracker.log(2, {})
    tracker.finish({})
    assert [row["global_step"] for row in rows(tmp_path)] == [1, 2]


def test_lines_that_the_disk_refused_are_written_later(tmp_path: Path) -> None:
    """No half line is left, nothing is lost, the order is kept, and one warning says so."""
    limit = "import resource; hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1];"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, hard))"
    check = """
text = (run_dir / "metrics.jsonl").read_text()
assert text.endswith("}\\n") and 0 < text.count("\\n") < 10, text
"""
    done, _ = run_script(tmp_path, before=limit.format(500), middle=check + limit.format("hard"))
    assert [row["global_step"] for row in rows(tmp_path)] == list(range(100, 1001, 100))
    assert len(warnings(done.stderr)) == 1


def test_lines_that_never_fit_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be written at all costs one warning, and one that counts the loss."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = make_tracker(config(tmp_path))
    for step in range(3):
        tracker.log(step, {})
    tracker.finish({})
    first, last = warnings(capfd.readouterr().err)
    assert "No space left on device" in first
    assert "3 lines" in last


# --- metrics.jsonl of a resumed run ------------------------------------------------------------


UNFINISHED: list[Tracker] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    """Close the files of trackers that a test leaves as a killed process does."""
    yield
    while UNFINISHED:
        UNFINISHED.pop().finish({})


def logged(run_dir: Path, *steps: int, state: Any = None, at: int | None = None) -> Tracker:
    """A tracker, new or resumed, that has logged rows."""
    tracker = make_tracker(config(run_dir), state, at)
    UNFINISHED.append(tracker)
    for step in steps:
        tracker.log(step, {"charts/epsilon": 1 / step})
    return tracker


def steps_of(run_dir: Path) -> list[int]:
    return [row["global_step"] for row in rows(run_dir)]


def test_resume_cuts_the_rows_after_the_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows after the checkpoint, half ones too, are repeated; the bytes before it are untouched."""
    tracker = logged(tmp_path, 10, 20)
    state = tracker.state()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert tracker.digest() == (len(before), hashlib.sha256(before).hexdigest())
    tracker.log(30, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 40, "ch')

    resumed = logged(tmp_path, state=json.loads(json.dumps(state)), at=25)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert resumed.state()["jsonl"] | {"wall_s": 0} == state["jsonl"] | {"wall_s": 0}
    for step in (30, 40):
        resumed.log(step, {"charts/epsilon": 0.5})
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.startswith(before)
    assert resumed.digest() == (len(content), hashlib.sha256(content).hexdigest())
    resumed.finish({})
    assert steps_of(tmp_path) == [10, 20, 30, 40]
    assert resumed.lost() == []
    assert capfd.readouterr().err == ""


def test_resume_goes_on_with_the_clock(tmp_path: Path) -> None:
    """`wall_s` counts the seconds of all processes of the run."""
    state = logged(tmp_path, 10).state()
    state["jsonl"]["wall_s"] = 1000.0
    logged(tmp_path, 20, state=state).finish({})
    assert 1000 <= rows(tmp_path)[-1]["wall_s"] < 1010


def test_no_two_rows_of_one_step(tmp_path: Path) -> None:
    """The first row of a step stays, in one process and across a resume, in every backend."""
    recorder = Recorder()
    jsonl = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker = CompositeTracker([jsonl, recorder], 1)
    UNFINISHED.append(tracker)
    for step in (10, 20, 20, 15):
        tracker.log(step, {"charts/epsilon": len(recorder.calls)})
    assert recorder.calls == ["log"] * 2
    resumed = logged(tmp_path, 20, 30, state=tracker.state())
    resumed.finish({})
    assert [row.get("charts/epsilon") for row in rows(tmp_path)] == [0, 1, 1 / 30]


@pytest.mark.parametrize(
    ("damage", "kept", "why"),
    [
        pytest.param(lambda path: path.unlink(), [], "is missing", id="missing"),
        pytest.param(lambda path: os.truncate(path, 60), [10], "has 60 bytes", id="shorter"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes().replace(b"0.1,", b"0.2,")),
            [10, 20, 30],
            "was changed",
            id="changed",
        ),
        pytest.param(
            lambda path: path.write_bytes(
                path.read_bytes().replace(b'{"global_step": 20', b"\xff")
            ),
            [10, 30],
            "was changed",
            id="damaged-line",
        ),
    ],
)
def test_file_that_is_not_the_checkpoints(
    damage: Callable[[Path], object],
    kept: list[int],
    why: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One warning says what is wrong; good rows up to the checkpoint stay, none twice."""
    tracker = logged(tmp_path, 10, 20, 30)
    state = tracker.state()
    tracker.log(40, {})
    damage(tmp_path / "metrics.jsonl")
    resumed = logged(tmp_path, 40, 50, state=state)
    resumed.finish({})
    assert steps_of(tmp_path) == [*kept, 40, 50]
    (warning,) = warnings(capfd.readouterr().err)
    assert why in warning
    assert f"{len(kept)} rows" in warning
    assert not list(tmp_path.glob(".*"))


JSONL_STATE = {"bytes": 0, "sha256": "", "last_step": 0, "wall_s": 0.0, "waiting": []}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({}, id="empty"),
        pytest.param([1], id="no-mapping"),
        pytest.param({"jsonl": {"bytes": "1"}}, id="types"),
        pytest.param({"jsonl": JSONL_STATE | {"wall_s": math.nan}}, id="nan"),
        pytest.param({"jsonl": JSONL_STATE | {"waiting": ["x"]}}, id="lines"),
    ],
)
def test_state_of_wrong_types(
    state: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A state that does not hold is missing: rows up to the checkpoint's global_step stay."""
    logged(tmp_path, 10, 20, 30)
    logged(tmp_path, 21, state=state, at=20).finish({})
    assert steps_of(tmp_path) == [10, 20, 21]
    assert len(warnings(capfd.readouterr().err)) == 1


def test_lines_that_wait_for_space_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Rows that a full disk refused are written by the process that resumes the run."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    tracker = logged(tmp_path, 10, 20)
    state = tracker.state()
    assert tracker.lost() == ["metrics.jsonl"]
    path.unlink()
    logged(tmp_path, 30, state=json.loads(json.dumps(state))).finish({})
    assert steps_of(tmp_path) == [10, 20, 30]


def test_cut_does_not_follow_a_link(tmp_path: Path) -> None:
    """A link in a run directory from elsewhere cannot have another file emptied."""
    victim = tmp_path / "victim"
    victim.write_text('{"global_step": 5}\n')
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    state = logged(run_dir).state()
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    (run_dir / "metrics.jsonl").symlink_to(victim)
    logged(run_dir, 10, state=state, at=0).finish({})
    assert victim.read_text() == '{"global_step": 5}\n'
    assert steps_of(run_dir) == [10]


def test_lost_files_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that is removed during the run, or whose backend failed, is incomplete."""
    tracker = logged(tmp_path, 10)
    (tmp_path / "metrics.jsonl").unlink()
    tracker.log(20, {})
    tracker.finish({})
    assert tracker.lost() == ["metrics.jsonl"]
    broken = Recorder(fail_at="log")
    broken.name = "tensorboard"
    composite = CompositeTracker([broken], 1)
    composite.log(1, {})
    composite.finish({})
    assert composite.lost() == ["tensorboard"]
    assert "removed during the run" in capfd.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; skips where this user may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


FILL = """
filler = run_dir / "filler"
descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(descriptor, bytes(512))
except OSError:
    os.close(descriptor)
"""
FREE = """
metrics = run_dir / "metrics.jsonl"
assert not metrics.exists() or 0 == metrics.stat().st_size or metrics.read_text().endswith("}\\n")
time.sleep(1.5)  # wandb writes its log every second
filler.unlink()
"""
LOG_MORE = """
for step in range(1100, 5001, 100):
    tracker.log(step, {"charts/epsilon": step / 3})
assert metrics.read_text().count("\\n") < 50
"""


@pytest.mark.parametrize(
    ("before", "middle", "last"),
    [
        pytest.param(FILL, FREE, 1000, id="from-the-start"),
        pytest.param(
            "", FILL + "metrics = run_dir / 'metrics.jsonl'" + LOG_MORE + FREE, 5000, id="later"
        ),
    ],
)
def test_full_disk_under_wandb(before: str, middle: str, last: int, small_disk: Path) -> None:
    """The disk is full under all files: the run goes on, says so once, and loses no metric."""
    done, _ = run_script(small_disk, before=before, middle=middle, track=True, wandb_mode="offline")
    assert [row["global_step"] for row in rows(small_disk)] == list(range(100, last + 1, 100))
    assert 1 <= len(warnings(done.stderr)) <= 2  # of metrics.jsonl, and perhaps of wandb
    assert done.stderr.count("\n") == len(warnings(done.stderr)), done.stderr


# --- the console -------------------------------------------------------------------------------


def test_console_is_silent_without_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Into a pipe go messages, and no bar; with quiet, nothing."""
    for quiet in (False, True):
        tracker = make_tracker(config(tmp_path, quiet=quiet))
        tracker.message("hello")
        tracker.progress(500)
        tracker.log(500, {"charts/epsilon": 0.5})
        tracker.finish({})
        assert capfd.readouterr() == ("" if quiet else "hello\n", "")


def on_terminal(command: list[str]) -> str:
    """Run a command on a terminal of 160 columns and return its output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    with subprocess.Popen(command, stdout=slave, stderr=slave) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                written += os.read(master, 4096)
            except OSError:  # the other end is closed
                break
    os.close(master)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_bar_agrees_with_metrics(tmp_path: Path) -> None:
    """Every figure that the bar shows is one of metrics.jsonl; it ends full, at the last one."""
    shown = on_terminal(script(tmp_path, middle='tracker.message("hello")'))
    logged = [
        (
            f"{row['perf/env_steps_per_s']:,.0f} steps/s",
            f"return {row['charts/episodic_return']:.3f}",
            f"epsilon {row['charts/epsilon']:.3f}",
        )
        for row in rows(tmp_path)
    ]
    figures = re.findall(r"([\d,]+ steps/s), (return [\d.]+), (epsilon [\d.]+)\]", shown)
    assert len(figures) >= 2
    assert set(figures) <= set(logged)
    assert figures[-1] == logged[-1]
    last = shown.rstrip().splitlines()[-1]
    assert "100%" in last
    assert re.search(r"1000/1000 \[\d+:\d+<\d+:\d+, ", last)
    assert "hello\r\n" in shown
    assert on_terminal(script(tmp_path, quiet=True)) == ""


# --- Weights & Biases --------------------------------------------------------------------------


def test_wandb_offline_run_holds_everything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Config, history over global_step, summary, figure and artifact are in the run's own file."""
    tracker = make_tracker(
        config(tmp_path, track=True, wandb_mode="offline", wandb_group="g", wandb_tags=("a", "b"))
    )
    for step in (64, 128, 192):
        tracker.log(step, {"charts/epsilon": 1 / step, "losses/td_loss": [math.nan]})
    heatmap = go.Figure(go.Heatmap(z=np.array([[0.5, np.nan], [1.0, 2.0]])))
    tracker.log_figures(192, {"q_values": heatmap})
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"weights")
    tracker.log_artifact(checkpoint, "LineWorld:x", "model")
    tracker.finish({"eval_return_mean": 0.845, "optimal_return": None}, exit_code=3)

    (file,) = wandb_files(tmp_path).values()
    assert file.run.project == "dqn_fast"
    assert file.run.run_group == "g"
    assert list(file.run.tags) == ["a", "b"]
    assert file.run.display_name == "LineWorld__x"
    assert file.config["args"]["learning_rate"] == 1e-3
    assert file.config["args"]["hidden_sizes"] == [128, 128]
    assert [row["global_step"] for row in file.history] == [64, 128, 192, 192]
    assert [row.get("charts/epsilon") for row in file.history] == [1 / 64, 1 / 128, 1 / 192, None]
    assert not any("losses/td_loss" in row for row in file.history)
    assert [m.step_metric for m in file.metrics if m.glob_name == "*"] == ["global_step"]
    assert file.summary["eval_return_mean"] == 0.845
    assert file.summary["optimal_return"] is None
    assert file.exit_code == 3

    assert file.history[-1]["figures/q_values/_type"] == "plotly-file"
    (chart,) = tmp_path.glob("wandb/offline-run-*/files/media/plotly/figures/*.json")
    assert json.loads(chart.read_text())["data"][0]["z"] == [[0.5, None], [1.0, 2.0]]
    (artifact,) = file.artifacts
    assert (artifact.name, artifact.type) == ("LineWorld_x", "model")
    (content,) = artifact.manifest.contents
    assert Path(content.local_path).read_bytes() == b"weights"
    assert Path(content.local_path).is_relative_to(tmp_path / "wandb")

    out, err = capfd.readouterr()
    assert err == ""
    assert (
        out == f"wandb records offline; upload it later with `wandb sync {tmp_path}/wandb/*run-*`\n"
    )
    assert not list(tmp_path.glob("home/**/*.pt")), "wandb copied the checkpoint elsewhere"


def test_wandb_members_are_runs_of_one_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each member up to a printed limit has a run, and so has the mean; WANDB_* are respected."""
    monkeypatch.setattr(tracker_module, "MAX_MEMBER_CURVES", 2)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tracker = make_tracker(config(tmp_path, track=True, wandb_mode="offline", num_members=3))
    tracker.log(64, {"charts/epsilon": 0.5, "charts/episodic_return": [1.0, math.nan, 3.0]})
    members = [{"eval_return_mean": 0.1 * i} for i in range(3)]
    tracker.finish({"eval_return_mean": 0.1, "members": members})

    files = wandb_files(tmp_path)
    assert set(files) == {"LineWorld__x", "LineWorld__x__m0", "LineWorld__x__m1"}
    assert {file.run.project for file in files.values()} == {"mine"}
    assert {file.run.run_group for file in files.values()} == {"LineWorld__x"}
    mean, first, second = (files[name] for name in sorted(files))
    assert mean.run.job_type == "mean"
    assert first.run.job_type == second.run.job_type == "member"
    assert [file.config["args"]["seed"] for file in (mean, first, second)] == [3, 3, 4]
    assert mean.history[0]["charts/episodic_return"] == 2.0
    assert mean.history[0]["charts/epsilon"] == 0.5
    assert first.history[0]["charts/episodic_return"] == 1.0
    assert "charts/episodic_return" not in second.history[0]
    assert second.summary["eval_return_mean"] == 0.1
    assert "members" not in mean.summary
    assert capfd.readouterr().out.count("curves of 2 of 3 members") == 1


def test_wandb_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One warning, and the rest goes on."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = make_tracker(config(tmp_path, track=True))
    tracker.log(64, {"charts/epsilon": 0.5})
    tracker.finish({})
    assert len(rows(tmp_path)) == 1
    assert len(warnings(capfd.readouterr().err)) == 1


def test_logging_to_wandb_does_not_block(tmp_path: Path) -> None:
    """1 000 log points are taken in while wandb takes none, and none is lost."""
    tracker = make_tracker(config(tmp_path, track=True, wandb_mode="offline"))
    assert isinstance(tracker, CompositeTracker)
    (wandb,) = (each for each in tracker._backends if isinstance(each, WandbTracker))
    taken_in, held = threading.Event(), list[bool]()
    wandb._put(lambda: held.append(taken_in.wait(60)))
    for step in range(1000):
        tracker.log(step, {f"losses/{i}": [float(step)] for i in range(10)})
    taken_in.set()
    tracker.finish({})
    assert held == [True]
    (file,) = wandb_files(tmp_path).values()
    assert [row["global_step"] for row in file.history] == list(range(1000))


ONE_KEY = 'os.environ["WANDB_API_KEY"] = "a" * 40;'
REFUSED = ONE_KEY + 'os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"'
BLACKHOLE = (
    ONE_KEY
    + """
import socket
listener = socket.create_server(("127.0.0.1", 0))
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % listener.getsockname()[1]
"""
)


@pytest.mark.parametrize(
    ("before", "mode", "reason"),
    [
        pytest.param(REFUSED, "online", "does not answer", id="refused"),
        pytest.param(BLACKHOLE, "online", "does not answer", id="blackhole"),
        pytest.param("", None, "no API key", id="no-account"),
    ],
)
def test_unreachable_wandb_costs_little_time(
    before: str, mode: str | None, reason: str, tmp_path: Path
) -> None:
    """Training starts, and the process ends, at most 5 s late; the run is recorded offline."""
    done, seconds = run_script(tmp_path, before=LIMITS + before, track=True, wandb_mode=mode)
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["start"] < LATE_S
    assert times["finish"] < LATE_S
    assert seconds - sum(times.values()) < LATE_S  # the hooks of wandb at the exit of the process
    assert len(rows(tmp_path)) == 10
    assert len(wandb_files(tmp_path)["r"].history) == 10
    (warning,) = warnings(done.stderr)
    assert reason in warning
    assert f"wandb sync {tmp_path}/wandb/*run-*" in warning
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_wandb_mode_of_the_environment(tmp_path: Path) -> None:
    """WANDB_MODE=offline asks for what is then no reason to warn."""
    before = REFUSED + '; os.environ["WANDB_MODE"] = "offline"'
    done, _ = run_script(tmp_path, before=before, track=True)
    assert done.stderr == ""
    assert "wandb sync" in done.stdout
    assert wandb_files(tmp_path)["r"].summary["eval_return_mean"] == 0.5


def test_server_that_takes_no_runs(tmp_path: Path) -> None:
    """A server that answers, but not to wandb: training starts, and wandb goes offline later."""
    before = LIMITS + ONE_KEY + 'os.environ["WANDB_INIT_TIMEOUT"] = "4"\n'
    before += STAND_IN_SERVER.format(posts_hang=True)
    done, _ = run_script(tmp_path, before=before, track=True, wandb_mode="online")
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["start"] < LATE_S
    assert times["finish"] < LATE_S
    assert len(warnings(done.stderr)) == 1
    assert len(wandb_files(tmp_path, "offline-run-*")["r"].history) == 10


def test_server_that_goes_away(tmp_path: Path) -> None:
    """The server stops answering during the run: it ends soon, with all of it on the disk."""
    done, seconds = run_script(
        tmp_path,
        before=ONE_KEY + STAND_IN_SERVER.format(posts_hang=False),
        middle=LIMITS + "Server.hang.set()",
        track=True,
        wandb_mode="online",
    )
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["finish"] < LATE_S
    assert seconds - sum(times.values()) < LATE_S
    assert "/e/p/runs/" in done.stdout
    assert len(warnings(done.stderr)) == 1
    file = wandb_files(tmp_path)["r"]
    assert len(file.history) == 10
    assert file.summary["eval_return_mean"] == 0.5


# Kills the children of the process: wandb has started the only one.
KILL_WANDB = """
import signal
for children in Path("/proc/self/task").glob("*/children"):
    for pid in children.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
"""
LOG_AFTER = """
time.sleep(0.3)
tracker.log(2000, {"charts/epsilon": 0.0})
"""


@pytest.mark.parametrize(
    "middle",
    [
        pytest.param(KILL_WANDB + LOG_AFTER, id="while-logging"),
        pytest.param(KILL_WANDB, id="before-finish"),
    ],
)
def test_wandb_that_dies(middle: str, tmp_path: Path) -> None:
    """wandb's own process is killed during the run: one warning, and a clean end."""
    done, _ = run_script(tmp_path, middle=middle, track=True, wandb_mode="offline")
    assert len(rows(tmp_path)) == 10 + middle.count("tracker.log")
    assert len(warnings(done.stderr)) == 1
    assert done.stderr.count("\n") == 1


def test_wandb_that_dies_while_it_finishes(tmp_path: Path) -> None:
    """wandb's own process is killed while it waits for the server: one warning, and a clean end."""
    kill = f"""
{LIMITS}
Server.hang.set()
import threading
def kill():
    time.sleep(1)
    {KILL_WANDB.strip().replace(chr(10), chr(10) + "    ")}
threading.Thread(target=kill).start()
"""
    before = ONE_KEY + STAND_IN_SERVER.format(posts_hang=False)
    done, seconds = run_script(
        tmp_path, before=before, middle=kill, track=True, wandb_mode="online"
    )
    assert seconds < 60
    assert len(rows(tmp_path)) == 10
    assert len(warnings(done.stderr)) == 1
    assert done.stderr.count("\n") == 1


def test_slow_server_gets_everything(tmp_path: Path) -> None:
    """The server is slower than `finish` waits: the upload is completed, and nothing warns."""
    middle = "import atexit; atexit.register(lambda: print(sorted(Server.steps)))"
    done, _ = run_script(
        tmp_path,
        before=ONE_KEY + STAND_IN_SERVER.format(posts_hang=False) + "Server.slow_s = 4\n" + LIMITS,
        middle=middle,
        track=True,
        wandb_mode="online",
    )
    assert done.stderr == ""
    assert "wandb: uploading" in done.stdout
    assert str(list(range(100, 1001, 100))) in done.stdout


# --- wandb runs of a resumed run ---------------------------------------------------------------

RESUMED = """
state = tracker.state()
for step in (1100, 1200):  # sent, but after the checkpoint
    tracker.log(step, {"charts/epsilon": 0.0})
tracker.finish({"eval_return_mean": 0.5})
time.sleep(1)  # wandb names a folder after the second
tracker = make_tracker(TrackerConfig(
    run_dir=run_dir, run_name="r", config={"args": {"seed": 0}}, total_timesteps=2000,
    num_members=1, **(options | again)), state)
for step in (1100, 1200, 1300, 1400):
    tracker.log(step, {"charts/epsilon": 0.0, "charts/episodic_return": [step / 7]})
"""
SHOW = """
import atexit
def show():
    for run_id, lines in Server.history.items():
        print("history", run_id, sorted(lines), [lines[i]["global_step"] for i in sorted(lines)])
atexit.register(show)
"""
ALL_STEPS = list(range(100, 1401, 100))


def histories(output: str) -> list[tuple[str, list[int], list[int]]]:
    """Run id, offsets and global_steps of each run that the stand-in server has."""
    found = re.findall(r"history (\S+) (\[.*?\]) (\[.*?\])", output)
    return [(run_id, json.loads(lines), json.loads(steps)) for run_id, lines, steps in found]


def test_wandb_run_goes_on_online(tmp_path: Path) -> None:
    """One run on the server with every row once, those after the checkpoint too."""
    done, _ = run_script(
        tmp_path,
        before=ONE_KEY + STAND_IN_SERVER.format(posts_hang=False) + "again = {}",
        middle=RESUMED + SHOW,
        track=True,
        wandb_mode="online",
    )
    assert done.stderr == ""
    ((_, offsets, steps),) = histories(done.stdout)
    assert steps == ALL_STEPS
    assert offsets == list(range(len(ALL_STEPS)))


def test_offline_folders_of_a_resumed_run_are_one_run(tmp_path: Path) -> None:
    """`wandb sync` of both folders, as printed, uploads one run with every row once."""
    sync = """
import glob, subprocess
tracker.finish({})
command = [sys.executable, "-m", *SYNC.split(), *glob.glob(str(run_dir / "wandb/*run-*"))]
subprocess.run(command, cwd=run_dir, check=True, capture_output=True)
"""
    done, _ = run_script(
        tmp_path,
        before=ONE_KEY
        + STAND_IN_SERVER.format(posts_hang=False)
        + "again = {}; from dqn_fast.record.tracker import SYNC",
        middle=RESUMED + sync + SHOW,
        track=True,
        wandb_mode="offline",
    )
    assert done.stderr == ""
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    ((_, offsets, steps),) = histories(done.stdout)
    assert steps == ALL_STEPS
    assert offsets == list(range(len(ALL_STEPS)))


def test_offline_run_that_was_killed_has_every_row(tmp_path: Path) -> None:
    """What a kill took from the file of wandb is written by the process that resumes the run."""
    middle = """
(path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
while tracker_module._last_step(path) < 1000:  # wandb writes its file every second
    time.sleep(0.1)
import signal
for children in Path("/proc/self/task").glob("*/children"):
    for pid in children.read_text().split():
        os.kill(int(pid), signal.SIGSTOP)  # the rest stays unwritten
for step in range(1001, 1400):
    tracker.log(step, {"charts/epsilon": 0.0})
state = tracker.state()
(run_dir / "state.json").write_text(json.dumps(state))
os.killpg(0, signal.SIGKILL)
"""
    command = script(tmp_path, middle=middle, track=True, wandb_mode="offline")
    assert subprocess.run(command, start_new_session=True).returncode == -signal.SIGKILL
    (killed,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert WandbFile(killed).history[-1]["global_step"] == 1000
    state = json.loads((tmp_path / "state.json").read_text())
    again = TrackerConfig(
        run_dir=tmp_path, run_name="r", config={"args": {"seed": 0}}, total_timesteps=2000,
        num_members=1, track=True, wandb_mode="offline",
    )  # fmt: skip
    tracker = make_tracker(again, state)
    tracker.log(1400, {"charts/epsilon": 0.0})
    tracker.finish({})
    (resumed,) = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - {killed}
    steps = [row["global_step"] for path in (killed, resumed) for row in WandbFile(path).history]
    assert steps == [*range(100, 1001, 100), *range(1001, 1401)]


def test_rows_that_the_server_lacks_are_sent_again(tmp_path: Path) -> None:
    """A run whose first part was recorded offline is whole on the server that it goes on with."""
    done, _ = run_script(
        tmp_path,
        before=ONE_KEY
        + STAND_IN_SERVER.format(posts_hang=False)
        + "again = {'wandb_mode': 'online'}",
        middle=RESUMED + SHOW,
        track=True,
        wandb_mode="offline",
    )
    assert done.stderr == ""
    ((_, _, steps),) = histories(done.stdout)
    assert steps == ALL_STEPS


def test_members_runs_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each member's run keeps its id; a run tracked from its resume on has the rows before it."""
    first = config(tmp_path, track=True, wandb_mode="offline", num_members=2)
    tracker = make_tracker(first)
    tracker.log(64, {"charts/episodic_return": [1.0, math.nan], "charts/epsilon": 0.5})
    state = tracker.state()
    tracker.finish({})
    time.sleep(1)  # wandb names a folder after the second
    tracker = make_tracker(first, state)
    tracker.log(128, {"charts/episodic_return": [3.0, 5.0]})
    tracker.finish({})
    ids = state["wandb"]["run_ids"]
    assert len(set(ids)) == 3
    for run_id in ids:
        assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run_id}"))) == 2

    other = config(tmp_path, track=True, wandb_mode="offline", num_members=2, wandb_project="new")
    tracker = make_tracker(other, {"wandb": state["wandb"]})
    tracker.finish({})
    files = closed_files(tmp_path)
    (mean,) = (f for f in files if f.run.project == "new" and f.run.job_type == "mean")
    assert [row["charts/episodic_return"] for row in mean.history] == [1.0, 4.0]
    assert mean.run.run_id not in ids


# --- runs that the program or an agent of wandb has begun ----------------------------------------


@contextmanager
def begun(folder: Path, **options: Any) -> Iterator[Any]:
    """A run of the program itself, recorded offline below a folder."""
    import wandb

    folder.mkdir(exist_ok=True)
    usual: dict[str, Any] = {"project": "theirs", "mode": "offline", "dir": str(folder)}
    settings = wandb.Settings(silent=True, console="off")
    with wandb.init(settings=settings, **{**usual, **options}) as run:
        yield run


def test_a_run_that_the_program_began_is_logged_into(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has all rows beside the program's own, stays open, and is the only run."""
    before = dict(os.environ)
    with begun(tmp_path / "theirs", tags=["mine"], config={"lr": 1}) as run:
        run.log({"own": 1.0})
        run.log({"own": 2.0})
        tracker = make_tracker(config(tmp_path, track=True, wandb_tags=("a",), quiet=True))
        tracker.log(64, {"charts/epsilon": 0.5, "eval/return_mean": [0.25]})
        tracker.log(128, {"charts/epsilon": 0.25})
        tracker.log_figures(128, {"q_values": go.Figure(go.Scatter(y=[1.0]))})
        assert tracker.state()["wandb"]["run_ids"] == [run.id]
        tracker.finish({"eval_return_mean": 0.845})
        assert run.summary["eval/return_mean"] == 0.25
        run.log({"own": 3.0})
    assert capfd.readouterr().err == ""
    assert dict(os.environ) == before
    assert not list(tmp_path.glob("wandb/*run-*"))
    (file,) = closed_files(tmp_path / "theirs")
    assert (file.run.project, list(file.run.tags)) == ("theirs", ["mine", "a"])
    assert [row["own"] for row in file.history if "own" in row] == [1.0, 2.0, 3.0]
    ours = [row for row in file.history if "charts/epsilon" in row]
    assert [(row["global_step"], row["charts/epsilon"]) for row in ours] == [(64, 0.5), (128, 0.25)]
    assert any("figures/q_values/_type" in row for row in file.history)
    axes = {m.glob_name: m.step_metric for m in file.metrics if m.glob_name}
    assert axes == dict.fromkeys(("charts/*", "eval/*", "figures/*"), "global_step")
    assert file.summary["eval_return_mean"] == 0.845


def test_two_trainings_in_one_run_lose_no_row(tmp_path: Path) -> None:
    """The second begins at step 0 again, and wandb takes no row for an old one."""
    with begun(tmp_path / "theirs"):
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            tracker = make_tracker(config(tmp_path / name, track=True, quiet=True))
            for step in (64, 128):
                tracker.log(step, {"charts/epsilon": 0.5})
            tracker.finish({})
    (file,) = closed_files(tmp_path / "theirs")
    assert [row["global_step"] for row in file.history] == [64, 128, 64, 128]


def test_a_resumed_training_goes_on_in_the_programs_run(tmp_path: Path) -> None:
    """In the run that has its rows it sends new ones only, to another run all of them."""
    options = config(tmp_path, track=True, quiet=True)
    with begun(tmp_path / "theirs") as run:
        tracker = make_tracker(options)
        tracker.log(64, {"charts/epsilon": 0.5})
        tracker.log(128, {"charts/epsilon": 0.5})
        state, run_id = tracker.state(), run.id
        tracker.finish({})
        tracker = make_tracker(options, state)
        tracker.log(192, {"charts/epsilon": 0.5})
        state = tracker.state()
        tracker.finish({})
    with begun(tmp_path / "other") as run:
        tracker = make_tracker(options, state)
        tracker.log(256, {"charts/epsilon": 0.5})
        assert tracker.state()["wandb"]["run_ids"] == [run.id] != [run_id]
        tracker.finish({})
    with begun(tmp_path / "again", id=run_id):  # of another process: this folder has no rows
        tracker = make_tracker(options, state)
        tracker.log(320, {"charts/epsilon": 0.5})
        tracker.finish({})
    steps = {
        name: [row["global_step"] for file in closed_files(tmp_path / name) for row in file.history]
        for name in ("theirs", "other", "again")
    }
    assert steps == {"theirs": [64, 128, 192], "other": [64, 128, 192, 256], "again": [320]}


def test_members_beside_the_programs_run(tmp_path: Path) -> None:
    """They have runs only in a group that is named; the program's run has their mean."""
    for name, options in (("alone", {}), ("named", {"group": "g"})):
        (tmp_path / name).mkdir()
        with begun(tmp_path / name / "theirs", **options):
            tracker = make_tracker(config(tmp_path / name, track=True, quiet=True, num_members=2))
            tracker.log(64, {"charts/episodic_return": [1.0, 3.0]})
            tracker.finish({"members": [{"eval_return_mean": 1.0}] * 2})
        (file,) = closed_files(tmp_path / name / "theirs")
        assert file.history[0]["charts/episodic_return"] == 2.0
    assert not list(tmp_path.glob("alone/wandb/*run-*"))
    files = wandb_files(tmp_path / "named")
    assert set(files) == {"LineWorld__x__m0", "LineWorld__x__m1"}
    assert {file.run.run_group for file in files.values()} == {"g"}
    assert [file.history[0]["charts/episodic_return"] for _, file in sorted(files.items())] == [
        1.0,
        3.0,
    ]


def test_what_the_programs_run_does_not_have_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A line for each setting that only `wandb.init` could have followed."""
    with begun(tmp_path / "theirs", group="theirs"):
        asked = config(tmp_path, track=True, quiet=True, wandb_group="g", wandb_project="p")
        make_tracker(asked).finish({})
    project, group = warnings(capfd.readouterr().err)
    assert "--wandb-project p: the run of this program has the project theirs" in project
    assert "--wandb-group g: the run of this program has the group theirs" in group


SWEEP = """
import os, sys
from pathlib import Path
folder = Path(sys.argv[1])
os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
import wandb
from dqn_fast.record.tracker import TrackerConfig, make_tracker
for job in ("first001", "second02"):  # as `wandb.agent` calls a function
    os.environ |= {"WANDB_RUN_ID": job, "WANDB_SWEEP_ID": "sweep001"}
    wandb.teardown()
    if sys.argv[2] == "begun":
        wandb.init(config={"lr": 1e-3}, settings=wandb.Settings(silent=True))
    run_dir = folder / job
    run_dir.mkdir()
    tracker = make_tracker(TrackerConfig(
        run_dir=run_dir, run_name="r", config={"args": {"seed": 0}}, total_timesteps=100,
        num_members=2, track=True, quiet=True))
    tracker.log(64, {"eval/return_mean": [1.0, 3.0]})
    tracker.finish({})
    wandb.finish()
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        del os.environ[name]
"""


@pytest.mark.parametrize("who", ["begun", pytest.param("agent", marks=pytest.mark.slow)])
def test_a_trial_of_a_sweep_is_one_run(who: str, tmp_path: Path) -> None:
    """The one whose id the agent has set, begun by the function or not; nothing is warned of."""
    command = [sys.executable, "-c", SWEEP, str(tmp_path), who]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    paths = sorted(tmp_path.glob("**/run-*.wandb"), key=lambda path: path.name)
    files = [WandbFile(path) for path in paths]
    assert [file.run.run_id for file in files] == ["first001", "second02"]
    for file in files:
        assert file.run.sweep_id == "sweep001"
        assert [(row["global_step"], row["eval/return_mean"]) for row in file.history] == [
            (64, 2.0)
        ]


# --- TensorBoard -------------------------------------------------------------------------------


def test_tensorboard_curves(tmp_path: Path) -> None:
    """The mean and each member have their curves over global_step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make_tracker(config(tmp_path, tensorboard=True, num_members=2))
    for step in (64, 128):
        tracker.log(step, {"charts/epsilon": 0.5, "losses/td_loss": [1.0, math.nan]})
    tracker.finish({})

    def curve(folder: Path, name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(folder)).Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    folder = tmp_path / "tensorboard"
    assert curve(folder, "losses/td_loss") == [(64, 1.0), (128, 1.0)]
    assert curve(folder, "charts/epsilon") == [(64, 0.5), (128, 0.5)]
    assert curve(folder / "member_0", "losses/td_loss") == [(64, 1.0), (128, 1.0)]
    with pytest.raises(KeyError):
        curve(folder / "member_1", "losses/td_loss")


def test_tensorboard_of_a_resumed_run(tmp_path: Path) -> None:
    """Points after the checkpoint's last row are replaced by those of the resumed run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make_tracker(config(tmp_path, tensorboard=True))
    state: dict[str, Any] = {}
    for step in (64, 128, 150, 192):
        tracker.log(step, {"charts/epsilon": 1.0})
        state = state if step > 128 else tracker.state()
    tracker.finish({})
    tracker = make_tracker(config(tmp_path, tensorboard=True), state, 140)
    for step in (192, 256):
        tracker.log(step, {"charts/epsilon": 0.0})
    tracker.finish({})
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("charts/epsilon")
    assert [(p.step, p.value) for p in points] == [(64, 1.0), (128, 1.0), (192, 0.0), (256, 0.0)]


def test_tensorboard_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One warning that says what to install."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tracker = make_tracker(config(tmp_path, tensorboard=True))
    tracker.log(64, {"charts/epsilon": 0.5})
    tracker.finish({})
    assert len(rows(tmp_path)) == 1
    (warning,) = warnings(capfd.readouterr().err)
    assert "pip install tensorboard" in warning
