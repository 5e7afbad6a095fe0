"""Loggers of a run: `metrics.jsonl`, the console, Weights & Biases, TensorBoard.

The training loop calls one `Tracker`, which `make_tracker` builds from a `TrackerConfig`. If a
backend raises, the tracker prints one warning and drops the backend: training never stops for a
logger. `metrics.jsonl` is always written and needs neither network nor account. This module reads
no device: the caller passes host numbers.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import netrc
import os
import queue
import re
import shlex
import shutil
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from dqn_fast.sweep import label_of

if TYPE_CHECKING:  # each takes a second to import, and only some runs use it
    import plotly.graph_objects as go
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run, Settings

Metrics: TypeAlias = Mapping[str, float | Sequence[float]]

MAX_MEMBER_CURVES = 16
"""Largest number of members with their own curves; each member is a run in wandb or TensorBoard."""

START_S, PROBE_S, FINISH_S, UPLOAD_S = 4.0, 2.0, 4.0, 60.0
"""Longest waits in seconds: for wandb to start, for its server to answer a probe, for wandb to
finish, and for an upload to a server that answers. A server that does not answer delays training by
at most START_S at the beginning and FINISH_S at the end."""

WANDB_DEFAULTS = {
    "WANDB_SILENT": "true",  # the tracker prints the one line that matters
    "WANDB_CONSOLE": "off",  # capturing stdout would record every redraw of the progress bar
    "WANDB_ERROR_REPORTING": "false",  # wandb's telemetry delays the exit by 10 s per dead host
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # a killed run loses at most its last second
    "WANDB_INIT_TIMEOUT": "10",  # a process that ends while wandb starts waits for the rest of it
}
"""Environment variables set before wandb is imported, unless the user has set them. In a program
that has imported wandb itself they stay as they are."""

RUN_ID = re.compile(r"[\w-]{1,128}")
"""An id of a wandb run that a checkpoint may name; it becomes part of a folder's name."""

SYNC = "wandb sync --include-online"
"""Uploads unfinished runs; without the flag, `wandb sync` takes only those recorded offline."""


@dataclass(frozen=True)
class TrackerConfig:
    """Settings of the loggers."""

    run_dir: Path
    """Existing folder of the run; all files are written below it."""
    run_name: str
    """Name of the run on dashboards."""
    config: Mapping[str, Any]
    """Content of `config.json`: settings under "args", with the first member's seed."""
    total_timesteps: int
    """global_step at which the progress bar is full."""
    num_members: int
    """Number of independent agents, at least 1; a per-member metric has one value for each."""
    quiet: bool = False
    """Print only warnings."""
    track: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "dqn_fast"
    """WANDB_PROJECT overrides this default."""
    wandb_entity: str | None = None
    wandb_group: str | None = None
    """None: WANDB_RUN_GROUP; if that is not set and there are several members, `run_name`."""
    wandb_tags: tuple[str, ...] = ()
    wandb_mode: Literal["online", "offline"] | None = None
    """None: WANDB_MODE, or online. If the server or the API key is missing: offline."""
    tensorboard: bool = False
    """Write event files under run_dir/tensorboard; needs the extra `tensorboard`."""

    @property
    def members(self) -> list[dict[str, Any]]:
        """Seed and swept settings of each member."""
        seed = self.config["args"]["seed"]
        usual = [{"seed": seed + i} for i in range(self.num_members)]
        known: list[dict[str, Any]] = self.config.get("derived", {}).get("members", usual)
        return known


class Tracker:
    """Interface of a logger. The methods do nothing; a backend overrides those that it needs.

    Attributes:
        name: file or folder in the run directory that is incomplete if the backend fails.
    """

    name = ""

    def progress(self, global_step: int) -> None:
        """Update the progress bar; cheap enough for every chunk. The first call sets the start."""

    def log(self, global_step: int, metrics: Metrics) -> None:
        """Record one log point: a float for all members, or a sequence of one value per member."""

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""

    def log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        """Record Plotly figures by name."""

    def log_artifact(self, path: Path, name: str, type: str) -> None:
        """Store a copy of a file with the run."""

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Write all pending data and close; `exit_code` is 0 for a run that succeeded."""

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint: what `make_tracker` needs to go on after the rows that
        were logged so far."""
        return {}

    def digest(self) -> tuple[int, str] | None:
        """Number of bytes of `metrics.jsonl` that are written, and their SHA-256 in hex; None if
        the file has been given up."""
        return None

    def lost(self) -> list[str]:
        """Names of files in the run directory that are incomplete; final after `finish`."""
        return []


class CompositeTracker(Tracker):
    """Passes every call to its backends; drops a backend that raises, with one warning.

    No two rows have one global_step: a row whose step is not above the last one's is left out of
    every backend. The first row has the measurements of the whole window; a second one comes from
    a run that ends again, and has nothing new.
    """

    def __init__(self, backends: Sequence[Tracker], num_members: int, last_step: int = -1) -> None:
        """Args: backends; M; global_step of the last row that the backends have, -1 for none."""
        self._backends = list(backends)
        self._num_members = num_members
        self._last_step = last_step
        self._lost: list[str] = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for backend in tuple(self._backends):
            try:
                call(backend)
            except Exception as error:
                self._backends.remove(backend)
                if backend.name:
                    self._lost.append(backend.name)
                warn(f"{type(backend).__name__} failed and is switched off: {_format_error(error)}")

    def progress(self, global_step: int) -> None:
        self._each(lambda backend: backend.progress(global_step))

    def log(self, global_step: int, metrics: Metrics) -> None:
        """Record one log point.

        Raises:
            ValueError: a metric has neither one value nor one value per member.
        """
        plain = {
            name: _to_values(name, value, self._num_members) for name, value in metrics.items()
        }
        if global_step > self._last_step:
            self._last_step = global_step
            self._each(lambda backend: backend.log(global_step, plain))

    def message(self, text: str) -> None:
        self._each(lambda backend: backend.message(text))

    def log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        self._each(lambda backend: backend.log_figures(global_step, figures))

    def log_artifact(self, path: Path, name: str, type: str) -> None:
        self._each(lambda backend: backend.log_artifact(path, name, type))

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._each(lambda backend: backend.finish(summary, exit_code))
        for backend in self._backends:
            self._lost += backend.lost()
        self._backends.clear()  # a second finish does nothing

    def state(self) -> dict[str, Any]:
        """The states of the backends that have one: "jsonl", "wandb"."""
        states: dict[str, Any] = {}
        self._each(lambda backend: states.update(backend.state()))
        return states

    def digest(self) -> tuple[int, str] | None:
        known = [digest for backend in self._backends if (digest := backend.digest())]
        return known[0] if known else None

    def lost(self) -> list[str]:
        return [*self._lost, *(name for backend in self._backends for name in backend.lost())]


@dataclass(frozen=True)
class Kept:
    """The rows of `metrics.jsonl` that a resumed run keeps.

    Attributes:
        lines: the kept lines.
        last_step: global_step of the last of them, -1 for none.
        last_logged: global_step of the last row that the earlier process logged; the resumed run
            repeats the rows between the two.
    """

    lines: list[bytes]
    last_step: int
    last_logged: int

    def rows(self, after: int, num_members: int) -> Iterator[tuple[int, Metrics]]:
        """The rows after a global_step, as they were logged; a value that is null is NaN."""
        for line in self.lines:
            row = _row(line)
            if row is None or row["global_step"] <= after:
                continue
            values = {k: v for k, v in row.items() if k not in ("global_step", "wall_s", "members")}
            own = row.get("members")
            values |= own if isinstance(own, dict) else {}
            metrics: dict[str, float | list[float]] = {}
            for name, value in values.items():
                with contextlib.suppress(TypeError, ValueError):
                    plain = np.asarray(value, dtype=np.float64).tolist()  # null becomes NaN
                    metrics[name] = _to_values(name, plain, num_members)
            yield row["global_step"], metrics


class JsonlTracker(Tracker):
    """Appends one JSON object per log point to a file, always as whole lines.

    If a write fails, the lines stay in memory and are written at the next log point or at the end.
    Only `wall_s` and `perf/*` differ between two runs with the same seed.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._whole = 0  # bytes of the whole lines in the file
        self._hash = hashlib.sha256()  # of these bytes
        self._last_step = -1
        self._kept: bytes | None = None  # what the file is to be cut back to
        self._waiting: deque[bytes] = deque()
        self._warned = self._is_lost = False
        self._start = time.monotonic()

    def resume(self, state: Any, global_step: int | None) -> Kept:
        """Cut the file back to a checkpoint, and go on with its clock.

        The rows after the checkpoint are removed, because the resumed run repeats them. If the file
        is not the one that the checkpoint describes, one warning says so, and the whole lines up to
        the checkpoint stay. A crash leaves the old file or the new one.

        Args:
            state: of `state`, from the checkpoint.
            global_step: of the checkpoint; None: that of its last row.
        """
        known = _JsonlState.read(state)
        try:
            known_kind = self._path.is_file() and not self._path.is_symlink()
            content = self._path.read_bytes() if known_kind else b""
        except OSError:
            content = b""
        whole = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        logged = [row["global_step"] for line in whole if (row := _row(line))]
        why = ""
        if known is None:
            why = "is not described in the checkpoint"
        elif not content and known.num_bytes:
            why = "is missing"
        elif len(content) < known.num_bytes:
            why = f"has {len(content):,} bytes, not the {known.num_bytes:,} of the checkpoint"
        elif hashlib.sha256(content[: known.num_bytes]).hexdigest() != known.sha256:
            why = "was changed after it was written"
        if known is not None and not why:
            lines = content[: known.num_bytes].splitlines(keepends=True)
            last_step, waiting = known.last_step, known.waiting
        else:
            limit = known.last_step if known is not None else global_step
            lines, last_step = [], -1
            for line in whole + (known.waiting if known is not None else []):
                row = _row(line)
                if row and last_step < row["global_step"] <= (math.inf if limit is None else limit):
                    lines.append(line)
                    last_step = row["global_step"]
            waiting = []
            warn(f"{self._path}: {why}; {len(lines):,} rows up to the checkpoint are kept")
        self._kept = b"".join(lines)
        self._whole, self._hash = len(self._kept), hashlib.sha256(self._kept)
        self._waiting.extend(waiting)
        self._write()
        self._last_step = last_step
        if known is not None:
            self._start -= known.wall_s
        return Kept(lines + waiting, last_step, max((*logged, last_step)))

    def log(self, global_step: int, metrics: Metrics) -> None:
        row: dict[str, Any] = {"global_step": global_step}
        row |= {name: _finite_or_none(_mean(value)) for name, value in metrics.items()}
        row["wall_s"] = round(time.monotonic() - self._start, 3)
        members = {
            name: [_finite_or_none(x) for x in value]
            for name, value in metrics.items()
            if isinstance(value, Sequence)
        }
        if members:
            row["members"] = members
        self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._last_step = global_step
        self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            while self._waiting:
                self._file.seek(self._whole)
                if self._file.write(self._waiting[0]) < len(self._waiting[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                line = self._waiting.popleft()
                self._whole += len(line)
                self._hash.update(line)
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):  # a reader would fail at a partial line
                    self._file.truncate(self._whole)
            if not self._warned:
                why = _format_error(error)
                warn(f"{self._path}: {why}; lines are kept in memory and written later")
            self._warned = True

    def _open(self) -> None:
        if self._kept is not None:
            _cut(self._path, self._kept)
            self._kept = None
        self._path.touch()
        self._file = self._path.open("r+b", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        content = self._file.read(size)
        self._whole = content.rfind(b"\n") + 1
        self._hash = hashlib.sha256(content[: self._whole])
        if self._whole < size:  # an earlier process was killed while it wrote a line
            self._file.truncate(self._whole)

    def state(self) -> dict[str, Any]:
        """Position in the file, whose bytes so far are on the disk; lines that wait for space."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # the digest tells, should they not be there
                os.fsync(self._file.fileno())
        return {
            "jsonl": {
                "bytes": self._whole,
                "sha256": self._hash.hexdigest(),
                "waiting": [line.decode() for line in self._waiting],
                "last_step": self._last_step,
                "wall_s": time.monotonic() - self._start,
            }
        }

    def digest(self) -> tuple[int, str] | None:
        return self._whole, self._hash.hexdigest()

    def lost(self) -> list[str]:
        return [self.name] if self._is_lost or self._waiting else []

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._write()
        if self._waiting:
            warn(f"{self._path}: {len(self._waiting)} lines could not be written and are lost")
        if self._file is not None:
            try:
                there = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
            except OSError:
                there = False
            if not there:
                warn(f"{self._path}: was removed during the run; its lines are lost")
                self._is_lost = True
            self._file.close()


@dataclass(frozen=True)
class _JsonlState:
    """`JsonlTracker.state`, checked."""

    num_bytes: int
    sha256: str
    waiting: list[bytes]
    last_step: int
    wall_s: float

    @classmethod
    def read(cls, state: Any) -> _JsonlState | None:
        """None if a value is missing or has a wrong type."""
        match state:
            case {
                "bytes": int(num_bytes),
                "sha256": str(sha256),
                "waiting": [*lines],
                "last_step": int(last_step),
                "wall_s": int() | float() as wall_s,
            } if num_bytes >= 0 and wall_s >= 0 and math.isfinite(wall_s):
                if not all(isinstance(line, str) for line in lines):
                    return None
                waiting = [line.encode() for line in lines]
                if not all(_row(line) and line.find(b"\n") == len(line) - 1 for line in waiting):
                    return None
                return cls(num_bytes, sha256, waiting, last_step, float(wall_s))
        return None


class ConsoleTracker(Tracker):
    """Prints messages and, on a terminal, a progress bar with values of the last log point."""

    def __init__(self, total_timesteps: int, quiet: bool) -> None:
        self._total = total_timesteps
        self._quiet = quiet
        self._on = not quiet and sys.stdout.isatty()
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def progress(self, global_step: int) -> None:
        if not self._on:
            return
        if self._bar is None:  # created here: a resumed run starts the bar at its first step
            self._bar = tqdm(
                total=self._total,
                initial=global_step,
                file=sys.stdout,
                dynamic_ncols=True,
                miniters=1,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
        self._bar.update(min(global_step, self._total) - self._bar.n)

    def log(self, global_step: int, metrics: Metrics) -> None:
        if not self._on:
            return
        for name, form in (
            ("perf/env_steps_per_s", "{:,.0f} steps/s"),
            ("charts/episodic_return", "return {:.3f}"),
            ("charts/epsilon", "epsilon {:.3f}"),
        ):
            value = _mean(metrics.get(name, math.nan))
            if not math.isnan(value):  # NaN if no episode has ended: keep the previous value
                self._shown[name] = form.format(value)
        self.progress(global_step)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._shown.values()), refresh=False)

    def message(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(text, file=sys.stdout)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        if self._bar is not None:
            self._bar.close()


class WandbTracker(Tracker):
    """Weights & Biases: one run; with several members, one run for their mean and one for each.

    If the program has a run that `wandb.init` began, it is used as the first of these and stays
    open. Members then have runs of their own only if a group is named. In a sweep they have none,
    because the sweep counts every run as a trial.

    A thread of its own makes all wandb calls, in order. Training therefore never waits for wandb's
    slow import, its start, or a server that stopped answering. If the server is not reachable, the
    runs are recorded offline below run_dir/wandb and can be uploaded later.
    """

    def __init__(
        self,
        config: TrackerConfig,
        say: Callable[[str], None],
        state: Mapping[str, Any] | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Start wandb; waits at most START_S.

        Args:
            config: settings.
            say: prints a line.
            state: of the `state` of an earlier process, whose wandb run goes on.
            kept: rows of the earlier process; those that wandb does not have are sent again.
        """
        self._config = config
        self._say = say
        self._kept = kept
        env = os.environ
        # `wandb.init` with reinit="create_new", as below, does not set `wandb.run`.
        self._program_has_wandb = "wandb" in sys.modules
        self._begun: Run | None = getattr(sys.modules.get("wandb"), "run", None)
        begun = self._begun
        self._in_sweep = bool(env.get("WANDB_SWEEP_ID") or (begun and begun.sweep_id))
        own_group = begun.group if begun else env.get("WANDB_RUN_GROUP")
        self._group = config.wandb_group or own_group or None
        alone = self._in_sweep or (begun is not None and self._group is None)
        self._count = count = 0 if alone else _count_curves(config)
        self._project, self._entity = config.wandb_project, config.wandb_entity
        if begun is not None:
            self._project, self._entity = begun.project, begun.entity
        elif self._project == TrackerConfig.wandb_project:
            self._project = env.get("WANDB_PROJECT", self._project)
        ids = _known_ids(state, self._project, self._entity, 1 + count)
        given = begun.id if begun else env.get("WANDB_RUN_ID")
        if ids and given and given != ids[0]:
            if begun or self._in_sweep:  # this is the run that is to have the rows, all of them
                ids = None
            else:
                warn(f"WANDB_RUN_ID={given} is ignored: wandb run {ids[0]} goes on")
        self._goes_on = ids is not None
        new = [given or os.urandom(4).hex()]  # the name of one run only
        self._ids = ids or new + [os.urandom(4).hex() for _ in range(count)]
        self._sent = [-1] * (1 + count)  # global_step of the last row of each run
        self._dir = config.run_dir.absolute() / "wandb"
        self._runs: list[Run] = []  # the mean, then members 0, 1, ...
        self._defined: set[str] = set()  # first parts of names of metrics
        self._base_url: str | None = None  # None: offline
        self._failed = False
        self._started = threading.Event()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb-tracker", daemon=True)
        self._thread.start()
        self._started.wait(START_S)

    def log(self, global_step: int, metrics: Metrics) -> None:
        self._put(partial(self._log, global_step, metrics))

    def log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        self._put(partial(self._log_figures, global_step, dict(figures)))

    def log_artifact(self, path: Path, name: str, type: str) -> None:
        self._put(partial(self._log_artifact, path, name, type))

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        deadline = time.monotonic() + FINISH_S
        reachable: Future[bool] = Future()
        self._jobs.put(partial(self._finish, dict(summary), exit_code, reachable))
        self._jobs.put(None)
        # Probe the server while the thread finishes the runs.
        reachable.set_result(self._base_url is not None and answers(self._base_url))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and reachable.result():
            self._say(f"wandb: uploading, for at most {UPLOAD_S:.0f} s")
            self._thread.join(UPLOAD_S)
        if self._thread.is_alive():
            self._fail(self._unfinished)

    def state(self) -> dict[str, Any]:
        """Where the runs are; which rows they have, wandb and `metrics.jsonl` know."""
        place = {"project": self._project, "entity": self._entity}
        return {"wandb": {"run_ids": list(self._ids), **place}}

    def _put(self, job: Callable[[], None]) -> None:
        if not self._failed:
            self._jobs.put(job)

    def _fail(self, what: str) -> None:
        if not self._failed:
            warn(f"wandb {what}")
        self._failed = True

    # All methods below run in the thread.

    def _work(self) -> None:
        job: Callable[[], None] | None = self._start
        while job is not None:
            self._try(job)
            self._started.set()
            job = self._jobs.get()

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # wandb raises SystemExit too
            self._fail(_format_failure(error))

    def _start(self) -> None:
        if not self._program_has_wandb:
            for variable, value in WANDB_DEFAULTS.items():
                os.environ.setdefault(variable, value)
        import wandb

        if self._begun is not None:
            mode = "offline" if self._begun.offline else "online"
            self._init("disabled" if self._begun.disabled else mode)
            self._say(f"wandb: logging into the run {self._begun.id} of this program")
            self._send_missing(mode)
            return
        if not self._program_has_wandb:
            # On a full disk, wandb would print a traceback for every line of its own log.
            logging.getLogger("wandb").setLevel(logging.CRITICAL)
        settings = wandb.setup().settings
        mode, why = self._choose_mode(settings)
        if mode != "offline":
            self._base_url = settings.base_url
            try:
                self._init(mode)
            except Exception as error:
                mode, why = "offline", _format_error(error)
                self._base_url = None
                self._runs.clear()
                wandb.teardown()  # its service refuses a second run of one id
        if mode == "offline":
            self._init(mode)
            how = f"upload it later with `wandb sync {self._folders}`"
            if why:
                warn(f"wandb records offline, because {why}; {how}")
            else:
                self._say(f"wandb records offline; {how}")
        elif self._runs[0].url:
            self._say(f"wandb: {self._runs[0].url}")
        self._send_missing(mode)

    def _choose_mode(self, settings: Settings) -> tuple[str, str]:
        """Return the mode to start in, and the reason if the requested mode is not possible."""
        asked = self._config.wandb_mode or settings.mode  # WANDB_MODE, `wandb offline`, or online
        if asked in ("offline", "dryrun", "disabled"):
            return "offline" if asked == "dryrun" else asked, ""
        if not (
            settings.api_key or settings.identity_token_file or has_netrc_key(settings.base_url)
        ):
            return "offline", "no API key is configured"  # wandb would prompt for one and wait
        if not answers(settings.base_url):
            return "offline", f"{settings.base_url} does not answer"
        return asked, ""

    def _init(self, mode: str) -> None:
        import wandb

        config, env, members = self._config, os.environ, self._count
        name = env.get("WANDB_NAME", config.run_name)
        # By default, `finish` and wandb's exit hook wait without limit for an unreachable server.
        # The run is complete on disk before the wait begins.
        settings = wandb.Settings(
            finish_timeout=wandb.setup().settings.finish_timeout or FINISH_S - 1,
            finish_timeout_raises=True,
        )
        if self._program_has_wandb:
            quiet = {"silent": True, "console": "off", "x_transaction_log_flush_interval": 1.0}
            for key, value in quiet.items():
                if f"WANDB_{key.upper()}" not in env:
                    setattr(settings, key, value)
        common: dict[str, Any] = {
            "dir": str(config.run_dir),
            "project": None if self._in_sweep else self._project,  # a sweep has its own
            "entity": None if self._in_sweep else self._entity,
            "group": self._group or (members and name) or None,
            "tags": config.wandb_tags or None,
            "mode": mode,
            "reinit": "create_new",
            "settings": settings,
        }
        if self._goes_on:  # offline too: `wandb sync` appends a later folder to an earlier one
            common["resume"] = "allow"
        if self._begun is not None:
            self._join(self._begun)
        else:
            own = {"name": name, "id": None if self._in_sweep else self._ids[0], **common}
            job_type = "mean" if members else None
            mean = wandb.init(config=dict(config.config), job_type=job_type, **own)
            self._runs.append(mean)
            self._ids[0] = mean.id
        settings.x_disable_stats = True  # the run of the mean records the system metrics
        for i in range(members):
            member = config.members[i]
            args = {**config.config["args"], **member}
            own = {**config.config, "args": args, "member": i}
            run = wandb.init(
                name=" ".join(filter(None, (f"{name}__m{i}", label_of(member)))),
                id=self._ids[1 + i],
                config=own,
                job_type="member",
                **common,
            )
            self._runs.append(run)
        for run in self._runs:
            run.define_metric("global_step", hidden=True)  # an axis, not a chart
            if run is not self._begun:
                run.define_metric("*", step_metric="global_step")
        if 0 < members < config.num_members:
            self._say(f"wandb: curves of {members} of {config.num_members} members and their mean")
        if members == 0 and config.num_members > 1:
            self._say(f"wandb: the mean of {config.num_members} members, in this one run")

    def _join(self, run: Run) -> None:
        """Log into a run of the program; what was asked for and is otherwise there is named."""
        config = self._config
        run.config.update(dict(config.config), allow_val_change=True)
        if config.wandb_tags:
            run.tags = tuple(dict.fromkeys((*(run.tags or ()), *config.wandb_tags)))
        usual = TrackerConfig.wandb_project
        project = None if config.wandb_project == usual else config.wandb_project
        for what, asked, has in (
            ("project", project, run.project),
            ("entity", config.wandb_entity, run.entity),
            ("group", config.wandb_group, run.group),
        ):
            if asked is not None and asked != has:
                warn(
                    f"--wandb-{what} {asked}: the run of this program has the {what} "
                    f"{has or 'None'}; give it to wandb.init"
                )
        self._runs.append(run)

    def _send_missing(self, mode: str) -> None:
        """Find out which rows the runs have, and send the kept ones that they do not have.

        A server says which step comes next. Offline, the files of the earlier process tell: if it
        was killed, its last second is missing in them.
        """
        if self._kept is None:
            return
        if mode == "offline" and self._goes_on:
            for i, run in enumerate(self._runs):
                others = set(self._dir.glob(f"*run-*-{run.id}")) - {Path(run.dir).parent}
                files = [file for folder in others for file in folder.glob("run-*.wandb")]
                self._sent[i] = max(map(_last_step, files), default=self._kept.last_logged)
        else:
            self._sent = [run.starting_step - 1 for run in self._runs]
        if self._begun is not None:  # its steps are not ours
            last = self._begun.summary.get("global_step", self._kept.last_logged)
            self._sent[0] = int(last) if self._goes_on else -1
        for global_step, metrics in self._kept.rows(min(self._sent), self._config.num_members):
            self._log(global_step, metrics)
        self._kept = None

    @property
    def _unfinished(self) -> str:
        return f"did not finish; upload the rest with `{SYNC} {self._folders}`"

    @property
    def _folders(self) -> str:
        return f"{shlex.quote(str(self._dir))}/*run-*"

    def _log(self, global_step: int, metrics: Metrics) -> None:
        curves = _split_curves(metrics, len(self._runs) - 1)
        for i, (run, curve) in enumerate(zip(self._runs, curves, strict=True)):
            if global_step > self._sent[i]:
                step = None if run is self._begun else global_step
                self._define(run, curve)
                run.log({"global_step": global_step, **curve}, step=step, commit=True)

    def _define(self, run: Run, names: Iterable[str]) -> None:
        """Give our metrics in a run of the program their axis; its own metrics have another."""
        if run is self._begun:
            for prefix in {name.partition("/")[0] for name in names} - self._defined:
                run.define_metric(f"{prefix}/*", step_metric="global_step")
                self._defined.add(prefix)

    def _log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        import plotly.graph_objects as go
        import wandb

        charts = {
            f"figures/{name}": wandb.Plotly(go.Figure(_to_plain_lists(figure.to_plotly_json())))
            for name, figure in figures.items()
        }
        self._define(self._runs[0], charts)
        self._runs[0].log({"global_step": global_step, **charts})

    def _log_artifact(self, path: Path, name: str, type: str) -> None:
        import wandb

        # wandb reads the file only when it uploads it, offline perhaps days later. Its own copy
        # would lie in the home folder. A link is enough: a run replaces its files and never
        # modifies them.
        self._dir.mkdir(exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix="artifact-", dir=self._dir)) / path.name
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", name), type)
        artifact.add_file(str(copy), policy="immutable", skip_cache=True)
        self._runs[0].log_artifact(artifact)

    def _finish(self, summary: Mapping[str, Any], exit_code: int, reachable: Future[bool]) -> None:
        mean = {key: value for key, value in summary.items() if key != "members"}
        rows: list[dict[str, Any]] = [mean, *(summary.get("members") or ())]
        late: list[Run] = []
        errors: list[BaseException] = []

        def finish(run: Run, row: dict[str, Any]) -> None:
            try:
                run.summary.update(row)
                if run is not self._begun:
                    run.finish(exit_code=exit_code)
            except TimeoutError:  # of `finish_timeout`
                late.append(run)
            except BaseException as error:
                errors.append(error)

        threads = []  # all runs at the same time, because each waits for its own upload
        for i, run in enumerate(self._runs):
            row = rows[i] if i < len(rows) else {}
            threads.append(threading.Thread(target=finish, args=(run, row), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
        if errors:  # the service has died: without teardown, wandb's exit hook prints a traceback
            self._fail(_format_failure(errors[0]))
            import wandb

            with contextlib.suppress(Exception, SystemExit):
                if self._begun is None:
                    wandb.teardown()
        if late and not (reachable.result() and _sync(late, self._config.run_dir)):
            self._fail(self._unfinished)


class TensorBoardTracker(Tracker):
    """Writes TensorBoard event files; each of several members has a folder inside the mean's."""

    name = "tensorboard"

    def __init__(self, config: TrackerConfig, purge_step: int | None = None) -> None:
        """Open the event files; points from `purge_step` on in earlier ones are void."""
        from torch.utils.tensorboard import SummaryWriter

        folder = config.run_dir / "tensorboard"
        folders = [folder]
        for i, member in enumerate(config.members[: _count_curves(config)]):
            folders.append(folder / " ".join(filter(None, (f"member_{i}", label_of(member)))))
        self._writers: list[SummaryWriter] = [
            SummaryWriter(str(path), purge_step=purge_step) for path in folders
        ]

    def log(self, global_step: int, metrics: Metrics) -> None:
        curves = _split_curves(metrics, len(self._writers) - 1)
        for writer, curve in zip(self._writers, curves, strict=True):
            for name, value in curve.items():
                writer.add_scalar(name, value, global_step)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        for writer in self._writers:
            writer.close()


def make_tracker(
    config: TrackerConfig,
    state: Mapping[str, Any] | None = None,
    global_step: int | None = None,
) -> Tracker:
    """Build the tracker of a run, new or resumed.

    A backend that cannot start causes a warning, not an exception. With `track`, the call takes at
    most START_S: a slower wandb continues to start while the run trains.

    Args:
        config: settings.
        state: of `Tracker.state` in the checkpoint of a run that is resumed. `metrics.jsonl` is cut
            back to it, TensorBoard discards later points, and the wandb run goes on with the first
            row that it does not have. Parts of a wrong type count as missing.
        global_step: of that checkpoint; None for a new run. Without a known `state`, rows up to
            this step are kept.
    """
    resumed = state is not None or global_step is not None
    parts = state if isinstance(state, Mapping) else {}
    console = ConsoleTracker(config.total_timesteps, config.quiet)
    jsonl = JsonlTracker(config.run_dir / "metrics.jsonl")
    kept = jsonl.resume(parts.get("jsonl"), global_step) if resumed else None
    backends: list[Tracker] = [jsonl, console]
    if config.tensorboard:
        try:
            backends.append(TensorBoardTracker(config, kept.last_step + 1 if kept else None))
        except ImportError:
            warn("no TensorBoard files: `pip install tensorboard` first")
        except Exception as error:
            warn(f"no TensorBoard files: {_format_error(error)}")
    if config.track:
        backends.append(WandbTracker(config, console.message, parts.get("wandb"), kept))
    return CompositeTracker(backends, config.num_members, kept.last_step if kept else -1)


def warn(text: str) -> None:
    """Print a warning to stderr, also if `quiet`."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        tqdm.write(f"warning: {text}", file=sys.stderr)


def _format_failure(error: BaseException) -> str:
    return f"failed and is switched off: {_format_error(error)}"


def _format_error(error: BaseException) -> str:
    """Format an exception as one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _to_values(name: str, value: float | Sequence[float], num_members: int) -> float | list[float]:
    """Convert a metric to one float, or with several members to a list of one float each."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim == 0 or array.shape == (num_members,) == (1,):
        return float(array.item())
    if array.shape != (num_members,):
        raise ValueError(f"metric {name}: shape {array.shape} for {num_members} members")
    values: list[float] = array.tolist()
    return values


def _known_ids(
    state: Mapping[str, Any] | None, project: str, entity: str | None, count: int
) -> list[str] | None:
    """The ids of the wandb runs that go on; None for new runs."""
    if not isinstance(state, Mapping):
        return None
    ids = state.get("run_ids")
    if (
        not isinstance(ids, list)
        or len(ids) != count
        or not all(isinstance(run_id, str) and RUN_ID.fullmatch(run_id) for run_id in ids)
    ):
        warn("the checkpoint does not name the wandb runs; a new run begins, with all rows")
        return None
    if (state.get("project"), state.get("entity")) != (project, entity):
        return None  # asked for: the settings of wandb may change
    return ids


def _cut(path: Path, content: bytes) -> None:
    """Make `content` that of a file; a crash leaves the old content or the new."""
    if not path.is_symlink() and path.is_file():  # a link may lead out of the run directory
        with path.open("r+b") as file:
            if file.read(len(content)) == content:
                file.truncate(len(content))
                os.fsync(file.fileno())
                return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of `metrics.jsonl`; None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:  # of the encoding too
        return None
    if not isinstance(row, dict) or not _is_count(row.get("global_step")):
        return None
    return row


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _mean(value: float | Sequence[float]) -> float:
    """Average the members that have a value; NaN if none has."""
    if not isinstance(value, Sequence):
        return value
    known = [x for x in value if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan


def _finite_or_none(value: float) -> float | None:
    """Replace NaN and infinity by None, because strict JSON has neither."""
    return value if math.isfinite(value) else None


def _count_curves(config: TrackerConfig) -> int:
    """Number of members with their own curves; 0 if the run has only one member."""
    return min(config.num_members, MAX_MEMBER_CURVES) if config.num_members > 1 else 0


def _split_curves(metrics: Metrics, members: int) -> list[dict[str, float]]:
    """Split metrics into the mean of all members and the per-member metrics of the first ones.

    Values that are not finite are left out.
    """
    rows = [{name: _mean(value) for name, value in metrics.items()}]
    rows += [
        {name: value[i] for name, value in metrics.items() if isinstance(value, Sequence)}
        for i in range(members)
    ]
    return [{name: x for name, x in row.items() if math.isfinite(x)} for row in rows]


def _to_plain_lists(value: Any) -> Any:
    """Replace the base64 arrays of a figure by lists: some wandb servers do not draw base64."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        shape = [int(n) for n in str(value.get("shape", array.size)).split(",")]
        return _to_plain_lists(array.reshape(shape).tolist())
    if isinstance(value, dict):
        return {key: _to_plain_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain_lists(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def answers(url: str) -> bool:
    """Whether a server answers at `url` within PROBE_S, with any status below 500."""
    answered: list[bool] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_S).close()
            answered.append(True)
        except urllib.error.HTTPError as error:
            error.close()
            answered.append(error.code < 500)
        except urllib.error.URLError as error:
            # wandb may accept a certificate that Python does not know.
            answered.append(isinstance(error.reason, ssl.SSLCertVerificationError))
        except Exception:
            return

    # In a thread, because the name lookup has no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return any(answered)


def has_netrc_key(url: str) -> bool:
    """Whether `wandb login` has stored a key for this server."""
    try:
        entries = netrc.netrc(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(url).hostname or "") is not None


def _last_step(path: Path) -> int:
    """global_step of the last row in a file of wandb that may end anywhere; -1 if none is found.

    After a header of 7 bytes, the file has blocks of 32 KiB, in which chunks lie: CRC-32, length,
    kind (1: a whole record; 2, 3, 4: its first, middle, last part), data.
    """
    from wandb.proto import wandb_internal_pb2

    parse = wandb_internal_pb2.Record.FromString  # type: ignore[attr-defined]
    data = path.read_bytes()
    block, at, last, record = 2**15, 7, -1, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too short for the head of a chunk
            at += block - at % block
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            break
        at += 7 + length
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            for item in parse(record).history.item:
                if "global_step" in (item.key, *item.nested_key):
                    last = int(item.value_json)
    return last


def _sync(runs: Sequence[Run], run_dir: Path) -> bool:
    """Upload unfinished runs from their files; False if it fails or takes longer than UPLOAD_S."""
    command = [
        sys.executable,
        "-m",
        *SYNC.split(),
        *(os.path.abspath(run.sync_dir) for run in runs),
    ]
    null = subprocess.DEVNULL
    try:
        # The command writes its log to the folder `wandb` of the working directory.
        done = subprocess.run(
            command, cwd=run_dir, stdin=null, stdout=null, stderr=null, timeout=UPLOAD_S
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
