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
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
"""Environment variables set before wandb is imported, unless the user has set them."""

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
    """Interface of a logger. The methods do nothing; a backend overrides those that it needs."""

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


class CompositeTracker(Tracker):
    """Passes every call to its backends; drops a backend that raises, with one warning."""

    def __init__(self, backends: Sequence[Tracker], num_members: int) -> None:
        self._backends = list(backends)
        self._num_members = num_members

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for backend in tuple(self._backends):
            try:
                call(backend)
            except Exception as error:
                self._backends.remove(backend)
                _warn(
                    f"{type(backend).__name__} failed and is switched off: {_format_error(error)}"
                )

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
        self._each(lambda backend: backend.log(global_step, plain))

    def message(self, text: str) -> None:
        self._each(lambda backend: backend.message(text))

    def log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        self._each(lambda backend: backend.log_figures(global_step, figures))

    def log_artifact(self, path: Path, name: str, type: str) -> None:
        self._each(lambda backend: backend.log_artifact(path, name, type))

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._each(lambda backend: backend.finish(summary, exit_code))
        self._backends.clear()  # a second finish does nothing


class JsonlTracker(Tracker):
    """Appends one JSON object per log point to a file, always as whole lines.

    If a write fails, the lines stay in memory and are written at the next log point or at the end.
    Only `wall_s` and `perf/*` differ between two runs with the same seed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._whole = 0  # bytes of the whole lines in the file
        self._waiting: deque[bytes] = deque()
        self._warned = False
        self._start = time.monotonic()

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
                self._whole += len(self._waiting.popleft())
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):  # a reader would fail at a partial line
                    self._file.truncate(self._whole)
            if not self._warned:
                why = _format_error(error)
                _warn(f"{self._path}: {why}; lines are kept in memory and written later")
            self._warned = True

    def _open(self) -> None:
        self._path.touch()
        self._file = self._path.open("r+b", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        self._whole = self._file.read(size).rfind(b"\n") + 1
        if self._whole < size:  # an earlier process was killed while it wrote a line
            self._file.truncate(self._whole)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._write()
        if self._waiting:
            _warn(f"{self._path}: {len(self._waiting)} lines could not be written and are lost")
        if self._file is not None:
            self._file.close()


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

    A thread of its own makes all wandb calls, in order. Training therefore never waits for wandb's
    slow import, its start, or a server that stopped answering. If the server is not reachable, the
    runs are recorded offline below run_dir/wandb and can be uploaded later.
    """

    def __init__(self, config: TrackerConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._dir = config.run_dir.absolute() / "wandb"
        self._runs: list[Run] = []  # the mean, then members 0, 1, ...
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
        reachable.set_result(self._base_url is not None and _answers(self._base_url))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and reachable.result():
            self._say(f"wandb: uploading, for at most {UPLOAD_S:.0f} s")
            self._thread.join(UPLOAD_S)
        if self._thread.is_alive():
            self._fail(self._unfinished)

    def _put(self, job: Callable[[], None]) -> None:
        if not self._failed:
            self._jobs.put(job)

    def _fail(self, what: str) -> None:
        if not self._failed:
            _warn(f"wandb {what}")
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
        for variable, value in WANDB_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        import wandb

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
        if mode == "offline":
            self._init(mode)
            how = f"upload it later with `wandb sync {self._folders}`"
            if why:
                _warn(f"wandb records offline, because {why}; {how}")
            else:
                self._say(f"wandb records offline; {how}")
        elif self._runs[0].url:
            self._say(f"wandb: {self._runs[0].url}")

    def _choose_mode(self, settings: Settings) -> tuple[str, str]:
        """Return the mode to start in, and the reason if the requested mode is not possible."""
        asked = self._config.wandb_mode or settings.mode  # WANDB_MODE, `wandb offline`, or online
        if asked in ("offline", "dryrun", "disabled"):
            return "offline" if asked == "dryrun" else asked, ""
        if not (
            settings.api_key or settings.identity_token_file or _has_netrc_key(settings.base_url)
        ):
            return "offline", "no API key is configured"  # wandb would prompt for one and wait
        if not _answers(settings.base_url):
            return "offline", f"{settings.base_url} does not answer"
        return asked, ""

    def _init(self, mode: str) -> None:
        import wandb

        config, env = self._config, os.environ
        members = _count_curves(config)
        name = env.get("WANDB_NAME", config.run_name)
        project = config.wandb_project
        if project == TrackerConfig.wandb_project:
            project = env.get("WANDB_PROJECT", project)
        # By default, `finish` and wandb's exit hook wait without limit for an unreachable server.
        # The run is complete on disk before the wait begins.
        settings = wandb.Settings(
            finish_timeout=wandb.setup().settings.finish_timeout or FINISH_S - 1,
            finish_timeout_raises=True,
        )
        common: dict[str, Any] = {
            "dir": str(config.run_dir),
            "project": project,
            "entity": config.wandb_entity,
            "group": config.wandb_group or env.get("WANDB_RUN_GROUP") or (members and name) or None,
            "tags": config.wandb_tags or None,
            "mode": mode,
            "reinit": "create_new",
            "settings": settings,
        }
        job_type = "mean" if members else None
        mean = wandb.init(name=name, config=dict(config.config), job_type=job_type, **common)
        self._runs.append(mean)
        settings.x_disable_stats = True  # the run of the mean records the system metrics
        for i in range(members):
            member = config.members[i]
            args = {**config.config["args"], **member}
            own = {**config.config, "args": args, "member": i}
            run = wandb.init(
                name=" ".join(filter(None, (f"{name}__m{i}", label_of(member)))),
                id=os.urandom(4).hex(),  # WANDB_RUN_ID can name one run only
                config=own,
                job_type="member",
                **common,
            )
            self._runs.append(run)
        for run in self._runs:
            run.define_metric("global_step", hidden=True)  # an axis, not a chart
            run.define_metric("*", step_metric="global_step")
        if 0 < members < config.num_members:
            self._say(f"wandb: curves of {members} of {config.num_members} members and their mean")

    @property
    def _unfinished(self) -> str:
        return f"did not finish; upload the rest with `{SYNC} {self._folders}`"

    @property
    def _folders(self) -> str:
        return f"{shlex.quote(str(self._dir))}/*run-*"

    def _log(self, global_step: int, metrics: Metrics) -> None:
        for run, curve in zip(self._runs, _split_curves(metrics, len(self._runs) - 1), strict=True):
            run.log({"global_step": global_step, **curve})

    def _log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        import plotly.graph_objects as go
        import wandb

        charts = {
            f"figures/{name}": wandb.Plotly(go.Figure(_to_plain_lists(figure.to_plotly_json())))
            for name, figure in figures.items()
        }
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
                wandb.teardown()
        if late and not (reachable.result() and _sync(late, self._config.run_dir)):
            self._fail(self._unfinished)


class TensorBoardTracker(Tracker):
    """Writes TensorBoard event files; each of several members has a folder inside the mean's."""

    def __init__(self, config: TrackerConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = config.run_dir / "tensorboard"
        folders = [folder]
        for i, member in enumerate(config.members[: _count_curves(config)]):
            folders.append(folder / " ".join(filter(None, (f"member_{i}", label_of(member)))))
        self._writers: list[SummaryWriter] = [SummaryWriter(str(path)) for path in folders]

    def log(self, global_step: int, metrics: Metrics) -> None:
        curves = _split_curves(metrics, len(self._writers) - 1)
        for writer, curve in zip(self._writers, curves, strict=True):
            for name, value in curve.items():
                writer.add_scalar(name, value, global_step)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        for writer in self._writers:
            writer.close()


def make_tracker(config: TrackerConfig) -> Tracker:
    """Build the tracker of a run.

    A backend that cannot start causes a warning, not an exception. With `track`, the call takes at
    most START_S: a slower wandb continues to start while the run trains.
    """
    console = ConsoleTracker(config.total_timesteps, config.quiet)
    backends: list[Tracker] = [JsonlTracker(config.run_dir / "metrics.jsonl"), console]
    if config.tensorboard:
        try:
            backends.append(TensorBoardTracker(config))
        except ImportError:
            _warn("no TensorBoard files: `pip install tensorboard` first")
        except Exception as error:
            _warn(f"no TensorBoard files: {_format_error(error)}")
    if config.track:
        backends.append(WandbTracker(config, console.message))
    return CompositeTracker(backends, config.num_members)


def _warn(text: str) -> None:
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


def _answers(url: str) -> bool:
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


def _has_netrc_key(url: str) -> bool:
    """Whether `wandb login` has stored a key for this server."""
    try:
        entries = netrc.netrc(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(url).hostname or "") is not None


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
