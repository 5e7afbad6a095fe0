"""Where a run's numbers go: `metrics.jsonl`, the console, Weights & Biases, TensorBoard.

The training loop holds one `Tracker` and never asks what is behind it; `make_tracker` builds what a
`TrackerConfig` asks for. A backend that raises is warned about once and left out from there on:
training does not stop for a logger. `metrics.jsonl` needs neither network nor account and is always
written. Nothing here reads a device: the caller hands over host numbers.
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
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:  # each costs a second to import, and only some runs want them
    import plotly.graph_objects as go
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run, Settings

Metrics: TypeAlias = Mapping[str, float | Sequence[float]]

MAX_MEMBER_CURVES = 16
"""Members that get a curve of their own in wandb and TensorBoard; each is a run there."""

START_S, PROBE_S, FINISH_S, UPLOAD_S = 4.0, 2.0, 2.5, 60.0
"""Longest waits, in seconds: for wandb to start, for its server to answer a probe, for wandb to
finish, and for it to upload the rest where the server answers. So a server that does not answer
costs at most START_S at the beginning and FINISH_S + PROBE_S at the end."""

WANDB_DEFAULTS = {
    "WANDB_SILENT": "true",  # the tracker says the one line that matters
    "WANDB_CONSOLE": "off",  # capturing stdout would record every redraw of the progress bar
    "WANDB_ERROR_REPORTING": "false",  # wandb's own telemetry holds the exit for 10 s per dead host
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # what a killed run can lose, in seconds
    "WANDB_INIT_TIMEOUT": "10",
    "WANDB_FINISH_TIMEOUT": f"{UPLOAD_S:.0f}",  # the exit hook of wandb waits for ever by default
}
"""Set in the environment, where what the person has set wins, before wandb is first imported."""


@dataclass(frozen=True)
class TrackerConfig:
    """What to track, and where to."""

    run_dir: Path
    """Existing folder of the run; everything is written below it."""
    run_name: str
    """Name of the run on dashboards."""
    config: Mapping[str, Any]
    """Content of `config.json`: settings under "args", with the first member's seed."""
    total_timesteps: int
    """Value of global_step at which the progress bar is full."""
    num_members: int
    """Independent agents in the run, at least 1; each has a value of every per-member metric."""
    quiet: bool = False
    """Print nothing but warnings."""
    track: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "dqn_fast"
    """Left at this default, WANDB_PROJECT goes before it."""
    wandb_entity: str | None = None
    wandb_group: str | None = None
    """None: WANDB_RUN_GROUP, or with several members the name of the run."""
    wandb_tags: tuple[str, ...] = ()
    wandb_mode: Literal["online", "offline"] | None = None
    """None: WANDB_MODE, or online. Without an answering server and an API key: offline."""
    tensorboard: bool = False
    """Write event files under run_dir/tensorboard; needs the extra `tensorboard`."""


class Tracker:
    """What the training loop may say. A backend inherits it and overrides what it cares about."""

    def progress(self, global_step: int) -> None:
        """Say how far the run is; cheap enough for every chunk. The first call sets the start."""

    def log(self, global_step: int, metrics: Metrics) -> None:
        """Record one log point: a float holds for all members, a sequence has one per member."""

    def message(self, text: str) -> None:
        """Print a line for the person, above the progress bar."""

    def log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        """Show Plotly figures, by name."""

    def log_artifact(self, path: Path, name: str, type: str) -> None:
        """Keep a file with the run."""

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Write out what is held; `exit_code` is 0 when the run did what it was asked."""


class CompositeTracker(Tracker):
    """Passes every call on to its backends; one that raises is warned about once and dropped."""

    def __init__(self, backends: Sequence[Tracker], num_members: int) -> None:
        self._backends = list(backends)
        self._num_members = num_members

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for backend in tuple(self._backends):
            try:
                call(backend)
            except Exception as error:
                self._backends.remove(backend)
                _warn(f"{type(backend).__name__} failed and is off from here: {_line(error)}")

    def progress(self, global_step: int) -> None:
        self._each(lambda backend: backend.progress(global_step))

    def log(self, global_step: int, metrics: Metrics) -> None:
        """Record one log point.

        Raises:
            ValueError: a metric has neither one value nor one per member.
        """
        plain = {name: _values(name, value, self._num_members) for name, value in metrics.items()}
        self._each(lambda backend: backend.log(global_step, plain))

    def message(self, text: str) -> None:
        self._each(lambda backend: backend.message(text))

    def log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        self._each(lambda backend: backend.log_figures(global_step, figures))

    def log_artifact(self, path: Path, name: str, type: str) -> None:
        self._each(lambda backend: backend.log_artifact(path, name, type))

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._each(lambda backend: backend.finish(summary, exit_code))
        self._backends.clear()  # so that a second finish does nothing


class JsonlTracker(Tracker):
    """One JSON object per log point, appended to a file as whole lines.

    Lines that the disk would not take wait in memory and are tried again at every log and at the
    end. `wall_s` and `perf/*` are the only values that differ between two runs of one seed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._whole = 0  # bytes of the file that are whole lines
        self._waiting: deque[bytes] = deque()
        self._warned = False
        self._start = time.monotonic()

    def log(self, global_step: int, metrics: Metrics) -> None:
        row: dict[str, Any] = {"global_step": global_step}
        row |= {name: _finite(_mean(value)) for name, value in metrics.items()}
        row["wall_s"] = round(time.monotonic() - self._start, 3)
        members = {
            name: [_finite(x) for x in value]
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
                with contextlib.suppress(OSError):  # no half line for a reader to trip over
                    self._file.truncate(self._whole)
            if not self._warned:
                _warn(f"{self._path}: {_line(error)}; lines wait in memory until it can be written")
            self._warned = True

    def _open(self) -> None:
        self._path.touch()
        self._file = self._path.open("r+b", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        self._whole = self._file.read(size).rfind(b"\n") + 1
        if self._whole < size:  # an earlier process died inside a line
            self._file.truncate(self._whole)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._write()
        if self._waiting:
            _warn(f"{self._path}: {len(self._waiting)} lines could not be written and are lost")
        if self._file is not None:
            self._file.close()


class ConsoleTracker(Tracker):
    """A progress bar on a terminal, with the figures of the last log point, and messages."""

    def __init__(self, total_timesteps: int, quiet: bool) -> None:
        self._total = total_timesteps
        self._quiet = quiet
        self._on = not quiet and sys.stdout.isatty()
        self._bar: tqdm[Any] | None = None
        self._figures: dict[str, str] = {}

    def progress(self, global_step: int) -> None:
        if not self._on:
            return
        if self._bar is None:  # made here, so that a resumed run does not count as a fast start
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
            if not math.isnan(value):  # no episode ended since the last log point: keep the old one
                self._figures[name] = form.format(value)
        self.progress(global_step)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._figures.values()), refresh=False)

    def message(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(text, file=sys.stdout)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        if self._bar is not None:
            self._bar.close()


class WandbTracker(Tracker):
    """Weights & Biases: one run, or with several members their mean and a run for each of them.

    Everything that touches wandb happens in a thread of its own, in order, so that neither its slow
    import, nor its start, nor a server that stopped answering holds up training. Where the server
    cannot be reached the runs are recorded offline, below run_dir/wandb, to be uploaded later.
    """

    def __init__(self, config: TrackerConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._dir = config.run_dir.absolute() / "wandb"
        self._runs: list[Run] = []  # the mean first, then members 0, 1, ...
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
        self._jobs.put(partial(self._finish, dict(summary), exit_code))
        self._jobs.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive() and self._base_url and _answers(self._base_url):
            self._say(f"wandb: uploading, for at most {UPLOAD_S:.0f} s")
            self._thread.join(UPLOAD_S)
        if stuck := self._thread.is_alive():
            self._fail(f"did not finish; upload what is missing with `{self._sync_command}`")
        if self._failed:
            _release_wandb(stuck)

    def _put(self, job: Callable[[], None]) -> None:
        if not self._failed:
            self._jobs.put(job)

    def _fail(self, what: str) -> None:
        if not self._failed:
            _warn(f"wandb {what}")
        self._failed = True

    # Everything below runs in the thread.

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
            self._fail(f"failed and is off from here: {_line(error)}")

    def _start(self) -> None:
        for variable, value in WANDB_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        import wandb

        # On a full disk every line of wandb's own log would print a traceback.
        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        settings = wandb.setup().settings
        mode, why = self._mode(settings)
        if mode != "offline":
            self._base_url = settings.base_url
            try:
                self._init(mode)
            except Exception as error:
                mode, why = "offline", _line(error)
                self._base_url = None
                self._runs.clear()
        if mode == "offline":
            self._init(mode)
            how = f"upload it later with `{self._sync_command}`"
            if why:
                _warn(f"wandb records offline, because {why}; {how}")
            else:
                self._say(f"wandb records offline; {how}")
        elif self._runs[0].url:
            self._say(f"wandb: {self._runs[0].url}")

    def _mode(self, settings: Settings) -> tuple[str, str]:
        """The mode to start in, and why it is not the one that was asked for."""
        asked = self._config.wandb_mode or settings.mode  # WANDB_MODE, `wandb offline`, or online
        if asked in ("offline", "dryrun", "disabled"):
            return "offline" if asked == "dryrun" else asked, ""
        if not (settings.api_key or settings.identity_token_file or _netrc_key(settings.base_url)):
            return "offline", "no API key is configured"  # wandb would ask for one, and wait
        if not _answers(settings.base_url):
            return "offline", f"{settings.base_url} does not answer"
        return asked, ""

    def _init(self, mode: str) -> None:
        import wandb

        config, env = self._config, os.environ
        members = _num_curves(config)
        name = env.get("WANDB_NAME", config.run_name)
        project = config.wandb_project
        if project == TrackerConfig.wandb_project:
            project = env.get("WANDB_PROJECT", project)
        common: dict[str, Any] = {
            "dir": str(config.run_dir),
            "project": project,
            "entity": config.wandb_entity,
            "group": config.wandb_group or env.get("WANDB_RUN_GROUP") or (members and name) or None,
            "tags": config.wandb_tags or None,
            "mode": mode,
            "reinit": "create_new",
        }
        job_type = "mean" if members else None
        mean = wandb.init(name=name, config=dict(config.config), job_type=job_type, **common)
        self._runs.append(mean)
        for i in range(members):
            args = config.config["args"]
            own = {**config.config, "args": {**args, "seed": args["seed"] + i}, "member": i}
            run = wandb.init(
                name=f"{name}__m{i}",
                id=os.urandom(4).hex(),  # WANDB_RUN_ID can name one run only
                config=own,
                job_type="member",
                settings=wandb.Settings(x_disable_stats=True),  # system metrics once is enough
                **common,
            )
            self._runs.append(run)
        for run in self._runs:
            run.define_metric("global_step", hidden=True)  # an axis, not a chart
            run.define_metric("*", step_metric="global_step")
        if 0 < members < config.num_members:
            self._say(f"wandb: curves of {members} of {config.num_members} members and their mean")

    @property
    def _sync_command(self) -> str:
        return f"wandb sync {shlex.quote(str(self._dir))}/*run-*"

    def _log(self, global_step: int, metrics: Metrics) -> None:
        for run, curve in zip(self._runs, _curves(metrics, len(self._runs) - 1), strict=True):
            run.log({"global_step": global_step, **curve})

    def _log_figures(self, global_step: int, figures: Mapping[str, go.Figure]) -> None:
        import plotly.graph_objects as go
        import wandb

        charts = {
            f"figures/{name}": wandb.Plotly(go.Figure(_plain_lists(figure.to_plotly_json())))
            for name, figure in figures.items()
        }
        self._runs[0].log({"global_step": global_step, **charts})

    def _log_artifact(self, path: Path, name: str, type: str) -> None:
        import wandb

        # wandb reads the file when it uploads it, offline perhaps days later, and the copy it would
        # make lies in the home folder. Files of a run are replaced, not written into: link them.
        self._dir.mkdir(exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix="artifact-", dir=self._dir)) / path.name
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", name), type)
        artifact.add_file(str(copy), policy="immutable", skip_cache=True)
        self._runs[0].log_artifact(artifact)

    def _finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        rows = [{key: value for key, value in summary.items() if key != "members"}]
        rows += summary.get("members") or []
        for run, row in zip(self._runs, rows, strict=False):
            run.summary.update(row)
        finishing = []  # all at once, because each waits for its own uploads
        for run in self._runs:
            job = partial(run.finish, exit_code=exit_code)
            finishing.append(threading.Thread(target=self._try, args=(job,), daemon=True))
            finishing[-1].start()
        for thread in finishing:
            thread.join()


class TensorBoardTracker(Tracker):
    """TensorBoard event files; with several members a folder for each inside that of their mean."""

    def __init__(self, config: TrackerConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = config.run_dir / "tensorboard"
        folders = [folder, *(folder / f"member_{i}" for i in range(_num_curves(config)))]
        self._writers: list[SummaryWriter] = [SummaryWriter(str(path)) for path in folders]

    def log(self, global_step: int, metrics: Metrics) -> None:
        curves = _curves(metrics, len(self._writers) - 1)
        for writer, curve in zip(self._writers, curves, strict=True):
            for name, value in curve.items():
                writer.add_scalar(name, value, global_step)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        for writer in self._writers:
            writer.close()


def make_tracker(config: TrackerConfig) -> Tracker:
    """The tracker that `config` asks for.

    Never raises for a backend that cannot start, and with `track` returns after START_S at the
    latest: where wandb takes longer, it goes on starting while the run goes on training.
    """
    console = ConsoleTracker(config.total_timesteps, config.quiet)
    backends: list[Tracker] = [JsonlTracker(config.run_dir / "metrics.jsonl"), console]
    if config.tensorboard:
        try:
            backends.append(TensorBoardTracker(config))
        except ImportError:
            _warn("no TensorBoard files: `pip install tensorboard` first")
        except Exception as error:
            _warn(f"no TensorBoard files: {_line(error)}")
    if config.track:
        backends.append(WandbTracker(config, console.message))
    return CompositeTracker(backends, config.num_members)


def _warn(text: str) -> None:
    """Print a warning line to stderr, quiet or not."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        tqdm.write(f"warning: {text}", file=sys.stderr)


def _line(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _values(name: str, value: float | Sequence[float], num_members: int) -> float | list[float]:
    """A metric as one Python float, or as a list of one per member when there are several."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim == 0 or array.shape == (num_members,) == (1,):
        return float(array.item())
    if array.shape != (num_members,):
        raise ValueError(f"metric {name}: shape {array.shape} for {num_members} members")
    values: list[float] = array.tolist()
    return values


def _mean(value: float | Sequence[float]) -> float:
    """Mean over the members that have a value; NaN when none has."""
    if not isinstance(value, Sequence):
        return value
    known = [x for x in value if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan


def _finite(value: float) -> float | None:
    """What strict JSON can hold of a float."""
    return value if math.isfinite(value) else None


def _num_curves(config: TrackerConfig) -> int:
    """Members that get a curve beside the mean of all."""
    return min(config.num_members, MAX_MEMBER_CURVES) if config.num_members > 1 else 0


def _curves(metrics: Metrics, members: int) -> list[dict[str, float]]:
    """The finite values of the mean, then of the first members (of their own metrics only)."""
    rows = [{name: _mean(value) for name, value in metrics.items()}]
    rows += [
        {name: value[i] for name, value in metrics.items() if isinstance(value, Sequence)}
        for i in range(members)
    ]
    return [{name: x for name, x in row.items() if math.isfinite(x)} for row in rows]


def _plain_lists(value: Any) -> Any:
    """A figure's dictionary without base64 arrays, which some wandb servers draw as nothing."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        shape = [int(n) for n in str(value.get("shape", array.size)).split(",")]
        return _plain_lists(array.reshape(shape).tolist())
    if isinstance(value, dict):
        return {key: _plain_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_lists(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _answers(url: str) -> bool:
    """Whether a server answers at `url` within PROBE_S, whatever it says short of an error."""
    answered: list[bool] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_S).close()
            answered.append(True)
        except urllib.error.HTTPError as error:
            error.close()
            answered.append(error.code < 500)
        except urllib.error.URLError as error:
            # A certificate that Python does not know may be one that wandb does.
            answered.append(isinstance(error.reason, ssl.SSLCertVerificationError))
        except Exception:
            return

    # A thread, because looking a name up knows no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return any(answered)


def _netrc_key(url: str) -> bool:
    """Whether `wandb login` has left a key for this server."""
    try:
        entries = netrc.netrc(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(url).hostname or "") is not None


def _release_wandb(stop: bool) -> None:
    """Keep wandb's service process from holding up the exit of this one.

    With `stop` it is ended; what it was told more than a second ago is on the disk. Without, only
    one that has died is let go, because other runs of this process may be using it. wandb has no
    public way to give up; should its insides change, the exit waits for WANDB_FINISH_TIMEOUT.
    """
    with contextlib.suppress(Exception, SystemExit):  # teardown() exits with a killed service
        import wandb

        process = wandb.setup()._connection._proc._process  # type: ignore[union-attr]
        if stop:
            process.terminate()
        if stop or process.poll() is not None:
            wandb.teardown()
