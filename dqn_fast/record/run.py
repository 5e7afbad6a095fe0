"""The record of a run: its directory, its settings, its header, its summary."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dqn_fast import tree
from dqn_fast.device import first_line
from dqn_fast.envs import EnvError
from dqn_fast.envs.render import UndrawableError
from dqn_fast.evaluate import Evaluation
from dqn_fast.film import RUN_FILM, film_run
from dqn_fast.plan import Chunk
from dqn_fast.record.background import FileWriter, HostCopy, Moment
from dqn_fast.record.checkpoint import (
    BestAgent,
    agent_content,
    save_checkpoint,
    saved_part,
    write_digests,
    write_json,
    write_weights,
    write_whole,
)
from dqn_fast.record.describe import (
    closing,
    header,
    image_warning,
    resumed_header,
    summarise,
)
from dqn_fast.record.diagnostics import Diagnostics
from dqn_fast.record.guard import Guard
from dqn_fast.record.lock import LOCK_FILE, RunLock
from dqn_fast.record.metrics import EpisodeLog, Metrics, Reading
from dqn_fast.record.tracker import TrackerConfig, make_tracker, warn
from dqn_fast.report import run_figures, write_report
from dqn_fast.settings import UsageError

if TYPE_CHECKING:
    from dqn_fast.resume import Resumption
    from dqn_fast.setup import Training

Row = tuple[int, dict[str, Any]]
"""global_step of a log point, and its metrics: one value per member or one for all members."""

GOALS = {"total_timesteps", "stop_at_return", "stop_when_optimal"}
"""Settings that say when a run has reached its goal."""

COPIED_BYTES = 2**28
"""Maximum bytes of a checkpoint that is copied and written while the loop runs."""


class TrainingError(RuntimeError):
    """Training cannot continue; the record of the run so far is saved."""


def refuse_used_dir(path: Path | None) -> None:
    """Raise UsageError if a run cannot use this directory, as far as reading can tell."""
    if path is not None and path.is_dir() and any(p.name != LOCK_FILE for p in path.iterdir()):
        raise UsageError(f"--run-dir {path}: is not empty; it must be new or empty")
    if path is not None and path.exists() and not path.is_dir():
        raise UsageError(f"--run-dir {path}: is a file; it must be a directory")


def create_run_dir(
    path: Path | None, env_id: str, name: str, seed: int, runs: Path = Path("runs")
) -> tuple[Path, RunLock]:
    """Make and lock the directory of a new run.

    Args:
        path: the directory, new or empty; None makes a new one in `runs`.
        env_id, name, seed: parts of the new directory's name, together with the time in UTC.

    Raises:
        UsageError: the directory is not empty, another run has it, or it cannot be written;
            nothing was changed.
    """
    if path is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        stem = f"{env_id.replace('/', '-').replace(':', '-')}__{name}__s{seed}__{stamp}"
        candidates = [runs / (stem + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 100)))]
    else:
        refuse_used_dir(path)
        candidates = [path]
    for candidate in candidates:
        existed = candidate.is_dir()
        try:
            candidate.mkdir(parents=True, exist_ok=path is not None)
            lock = RunLock(candidate, f"--run-dir {candidate}")
            try:
                with tempfile.TemporaryFile(dir=candidate):
                    pass
                refuse_used_dir(path)  # another run may have begun and ended since
            except BaseException:
                lock.release()
                raise
        except FileExistsError:
            if path is not None:
                raise UsageError(f"--run-dir {path}: is a file; it must be a directory") from None
            continue  # another run began in the same second
        except OSError as error:
            if not existed and candidate.is_dir():
                shutil.rmtree(candidate, ignore_errors=True)
            raise UsageError(
                f"--run-dir {candidate}: cannot be written ({error.strerror}); "
                "it must be a writable directory"
            ) from error
        return candidate, lock
    raise UsageError(f"--run-dir {candidates[0]}: 99 such directories exist; name another")


class RunRecord:
    """Everything that a run writes; a context manager that completes the files at its end.

    The files have all measurements up to the end of the run, also after an error. A file that
    cannot be written causes one warning and never ends the run.

    The loop waits for none of this. The data of a log point or a checkpoint are copied to the host
    after the device's queued work. Once they have arrived, `settle` turns them into rows and files,
    in order, and a thread writes the files.

    Attributes:
        run_dir: directory of the run.
        config: content of `config.json`.
        status: "done", or why the run ended early.
        num_evaluations: evaluations so far.
        owes_side_jobs: whether the run stopped in the evaluation of its last vector step, so that
            this step's evaluation, log point and checkpoint are still to be made.
        engine: engines that ran the chunks, as in the summary.
        compile_s: seconds that the loop waited for a compiler.
        eval_s: seconds spent on evaluations. Rates in the summary exclude both.
        summary: content of `summary.json`, complete at the end of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        training: Training,
        metrics: Metrics,
        began: float,
        resumed: Resumption | None = None,
    ) -> None:
        """Write `config.json`, start the loggers and print the header.

        Args:
            run_dir: existing directory.
            config: of `describe`.
            training: of the run.
            metrics: records of the chunks, on the device.
            began: time.perf_counter() at the start of the program.
            resumed: the run that goes on, or None.
        """
        self.run_dir, self.config, self.status = run_dir, config, "done"
        self.num_evaluations = 0
        self.owes_side_jobs = False
        self.engine: str = config["derived"]["engine"]
        self._running, self._reason = self.engine, config["derived"]["engine_reason"]
        self.compile_s = self.eval_s = 0.0
        self.summary: dict[str, Any] = {}
        self._args: Mapping[str, Any] = config["args"]
        self._members: list[dict[str, Any]] = config["derived"]["members"]
        self._num_members = len(self._members)
        self._plan, self._metrics = training.plan, metrics
        self._dqn, self._state, self._q_net = training.dqn, training.state, training.q_net
        self._diagnostics = Diagnostics(training.dqn, training.exact)
        self._device = self._q_net.device
        self._files = FileWriter(self._not_written)
        self._pending: deque[tuple[HostCopy, Callable[[Any], Row | None]]] = deque()
        self._must_wait, self._refuses_bad = False, True
        self._frozen: dict[int, str] = {}
        self._num_saving, self._measured_at, self._saved_at = 0, 0, -1
        self._episodes = EpisodeLog(self._num_members)
        self._best = BestAgent(self._num_members)
        self._evaluation: dict[str, list[Any]] = {}
        self._global_step = self._num_updates = self._num_syncs = self._last_diagnosis = 0
        self._unwritten: dict[str, str] = {}
        self._warned: set[str] = set()
        self._spent = dict.fromkeys(("wall_s", "startup_s", "loop_s", "compile_s"), 0.0)
        window = (0, 0, 0.0)
        if resumed is not None:
            try:
                window = self._load(resumed, training)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                text = f"{resumed.path}: its record cannot be read ({first_line(error)})"
                raise UsageError(text) from error
        self._guard = Guard(training.state, self._frozen)
        # A file whose digest is there is whole; so it goes before the file changes.
        kept = resumed.saved["record"]["tracker"] if resumed else None
        self._write_digests(_jsonl_digest(kept), at_once=True)
        tracker = tracker_config(run_dir, config)
        self._tracker = make_tracker(tracker, kept, resumed.global_step if resumed else None)
        self._write("config.json", lambda path: write_json(path, config))
        self._write_digests(self._tracker.digest(), "config.json", at_once=True)
        for line in header(config, run_dir, self._checkpoint_bytes()):
            self._tracker.message(line)
        if (warning := image_warning(training.env, config)) is not None:
            warn(warning)
        if resumed is not None:
            for line in resumed_header(resumed, self._plan.end):
                self._tracker.message(line)
            self._restore_best()
        self._tracker.progress(self._global_step)
        self._began, self._loop_began = began, time.perf_counter()
        self._last_log = (Moment(self._device), *window, self.eval_s)

    def _load(self, resumed: Resumption, training: Training) -> tuple[int, int, float]:
        """Continue the record of an earlier process.

        Returns:
            global_step, gradient steps and age in seconds of the last log point.
        """
        saved = resumed.saved["record"]
        self.num_evaluations, self._evaluation = saved["num_evaluations"], saved["evaluation"]
        self._global_step, self._num_updates = resumed.global_step, resumed.num_updates
        self._num_syncs, self._last_diagnosis = saved["num_syncs"], saved["last_diagnosis"]
        self._measured_at = saved["measured_at"]
        self._spent = {name: float(saved["spent"][name]) for name in self._spent}
        self.eval_s, self.owes_side_jobs = saved["eval_s"], saved["owes_side_jobs"]
        self._frozen = dict(saved["frozen"])
        if saved["solved"] and not resumed.changes.keys() & GOALS:
            self.status = "solved"
        self.engine = saved["engine"]
        if self._running != saved["running"]:
            self.engine += f", {self._running} from {self._global_step:,} on"
        self._best.load_(resumed.saved["best"], self._q_net)
        self._diagnostics.load_(saved["diagnostics"], training.state.params)
        self._episodes.load_(saved["episodes"])
        self._metrics.load_(saved["metrics"])
        if training.cut_episodes:
            self._metrics.cut_(self._global_step, self._args["num_envs"], training.cut_episodes)
        step, num_updates, age = saved["window"]
        return step, num_updates, age

    @property
    def global_step(self) -> int:
        """Transitions of one member so far."""
        return self._global_step

    @property
    def solved(self) -> bool:
        """Whether the run has reached its goal."""
        return self.status == "solved"

    @property
    def missing(self) -> list[str]:
        """Files that could not be written, or that are not there any more; final after the run."""
        names = ["config.json", "episodes.npz", "diagnostics.npz", "summary.json"]
        names += ["checkpoint.pt"] if self._saved_at >= 0 else []
        names += ["best.pt"] if self._best.weights else []
        gone = [name for name in names if not (self.run_dir / name).exists()]
        return sorted({*gone, *self._unwritten, *self._tracker.lost()})

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.status = f"failed: {error}" if str(error) else f"failed: {type(error).__name__}"
            self._refuses_bad = False
            with contextlib.suppress(Exception):  # the device itself may have failed
                if self._measured_at < self._global_step:
                    self._measure({})
            while self._pending:
                with contextlib.suppress(Exception):
                    list(self.settle(wait=True))
            self._files.wait()
            with contextlib.suppress(Exception):
                self._save_broken()
        self._loop_ended = time.perf_counter()
        self._write_arrays(self._episodes)
        if error is None and self._saved_at < 0:  # a finished run that was resumed
            self._write_soon(
                "weights.safetensors", partial(write_weights, content=self._last_agent())
            )
        self._files.wait()
        self._files.close()
        self.summary = self._summarise()
        self._write_digests(self._tracker.digest(), "config.json", at_once=True)
        self._write("summary.json", lambda path: write_json(path, self.summary))
        if (best := self.run_dir / "best.pt").exists():
            self._tracker.log_artifact(best, f"{self.run_dir.name}-best", "model")
        if self._args["track"]:
            self._best_effort("figures", self._log_figures)
        self._tracker.finish(self.summary, exit_code=0 if error is None else 1)
        files = ("config.json", "summary.json")
        self._write_digests(self._tracker.digest(), *files, at_once=True)
        if self._args["report"]:
            if error is None:
                self._best_effort(RUN_FILM, self._film)
            self._best_effort("report.html", self._write_report)
        if not self._args["quiet"]:  # below the progress bar, which is closed
            print(*closing(self.summary, self._args, self.run_dir), sep="\n")
        if missing := self.missing:
            why = next(iter(self._unwritten.values()), "it is not there any more")
            text = f"error: {self.run_dir}: {', '.join(missing)} could not be written ({why})"
            print(text, file=sys.stderr)

    def advance(self, chunk: Chunk) -> None:
        """Set the position of the run to the end of `chunk`."""
        self._global_step = chunk.after
        self._num_updates = chunk.first_update + chunk.num_updates
        self._num_syncs += int(chunk.syncs.sum())
        self._tracker.progress(chunk.after)

    def changed_engine(
        self, engine: str, reason: str, compile_s: float, never_ran: bool = False
    ) -> None:
        """Record and announce a change of engine during the run.

        Args:
            engine: engine from now on.
            reason: why this engine, in a few words.
            compile_s: seconds that the loop has waited for a compiler so far.
            never_ran: whether the engine announced before ran no chunk.
        """
        if (engine, reason) != (self._running, self._reason):
            self._tracker.message(
                f"engine    {engine} from global_step {self._global_step:,} on ({reason})"
            )
        if never_ran:
            self.engine = engine
        elif engine != self._running:
            self.engine += f", {engine} from {self._global_step:,} on"
        self._running, self._reason, self.compile_s = engine, reason, compile_s

    def settle(self, wait: bool = False) -> Iterator[Row]:
        """Finish log points and checkpoints that have arrived; call it before the next chunk.

        Args:
            wait: whether to wait for those that have not arrived.

        Yields:
            global_step and metrics of each log point.

        Raises:
            EnvError, TrainingError: as `check_finite`.
        """
        self._files.settle()
        wait |= self._must_wait
        self._must_wait = False
        while self._pending and (wait or self._pending[0][0].ready):
            copy, finish = self._pending.popleft()
            row = finish(copy.get())
            if row is not None:
                yield row

    def check_finite(self) -> None:
        """Wait for the device and settle everything; replay is read only after a bad gradient step.

        Raises:
            EnvError: no member learns any more, and replay of the last one has a reward or an
                observation that is not finite.
            TrainingError: no member learns any more, and all of that replay is finite.
        """
        for _ in self.settle(wait=True):
            pass
        self._freeze(self._metrics.bad_updates())

    def keep_good(self) -> None:
        """Give members that broke down their last good networks; before these are read."""
        self._guard.check_()

    def _freeze(self, bad_updates: Mapping[int, int]) -> None:
        """Name the members that have broken down; the run ends when there is no other."""
        for member, number in bad_updates.items():
            if member in self._frozen:
                continue
            error = self._breakdown(member, number)
            self._frozen[member] = str(error)
            self._guard.freeze_([member])
            if len(self._frozen) == self._num_members and self._refuses_bad:
                raise error
            if self._num_members > 1:
                self._tracker.message(f"warning: member {member} is frozen: {error}")

    def _breakdown(self, member: int, number: int) -> Exception:
        """Why a gradient step of a member is not finite."""
        which = f" of member {member}" if self._num_members > 1 else ""
        if bad := self._dqn.replay.first_not_finite(self._state.replay, member):
            name, newer = bad
            num_envs = self._args["num_envs"]
            return EnvError(
                f"{self.config['env_id']}: {name} not finite in copy "
                f"{num_envs - 1 - newer % num_envs}{which}, in vector step "
                f"{self._global_step // num_envs - newer // num_envs:,}; it must be finite"
            )
        return TrainingError(
            f"loss or gradient not finite{which} in gradient step {number:,}, "
            f"at global_step {self._plan.step_of_update(number):,}"
        )

    def log_point(self, row: Mapping[str, Any], probe: Mapping[str, Tensor]) -> None:
        """Measure a log point here; `settle` yields its row.

        Args:
            row: metrics that are already on the host.
            probe: metrics on the device, [M] each.
        """
        new_rows = self._global_step - self._last_diagnosis
        self._last_diagnosis = self._global_step
        self._measure(row, probe, self._diagnostics.take(self._state, new_rows))

    def _measure(
        self,
        row: Mapping[str, Any],
        probe: Mapping[str, Tensor] | None = None,
        snapshot: Mapping[str, Tensor] | None = None,
    ) -> None:
        reading_of = self._metrics.take_()
        step, num_updates, num_syncs = self._global_step, self._num_updates, self._num_syncs
        moment, self._measured_at, eval_s = Moment(self._device), step, self.eval_s

        def finish(arrived: dict[str, Any]) -> Row:
            reading: Reading = reading_of()
            self._episodes.add(reading)
            if snapshot is not None:
                self._diagnostics.add(arrived["snapshot"], step, num_syncs)
            before, first_step, first_update, age, eval_before = self._last_log
            self._last_log = moment, step, num_updates, 0.0, eval_s
            seconds = moment.since(before) + age - (eval_s - eval_before)
            rate = self._num_members / max(seconds, 1e-9)
            logged = self._logged(
                step,
                reading.values
                | {
                    "charts/episodes": self._episodes.num_finished.tolist(),
                    "perf/env_steps_per_s": (step - first_step) * rate,
                    "perf/updates_per_s": (num_updates - first_update) * rate,
                }
                | {name: tensor.tolist() for name, tensor in arrived["probe"].items()}
                | dict(row),
            )
            self._freeze(reading.bad_updates)
            return logged

        # New tensors that no other code uses: on a CPU they need no copy.
        parts = {"probe": dict(probe or {}), "snapshot": dict(snapshot or {})}
        self._pending.append(
            (HostCopy(parts, self._device, lent=self._device.type == "cpu"), finish)
        )

    def evaluated(self, result: Evaluation, exact: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Record an evaluation of the current network; a new best agent is saved as `best.pt`.

        Args:
            result: of greedy episodes.
            exact: of `ExactValues.compare`; empty without an exact solution.

        Returns:
            Metrics, one value per member or one for all members.
        """
        self.num_evaluations += 1
        self._evaluation = {
            "eval_return_mean": result.episode_return.mean(1).tolist(),
            "eval_return_std": result.episode_return.std(1, correction=0).tolist(),
            **exact,
        }
        if self._best.offer(self._q_net, self._evaluation["eval_return_mean"], self._global_step):
            self._write_best()
        metrics: dict[str, Any] = {
            "eval/return_mean": self._evaluation["eval_return_mean"],
            "eval/return_std": self._evaluation["eval_return_std"],
            "eval/discounted_return": result.discounted_return.mean(1).tolist(),
            "eval/q_start": result.q_start.mean(1).tolist(),
        }
        if exact:
            metrics |= {f"exact/{name}": values for name, values in exact.items()}
            for name in ("optimal_return", "optimal_start_value"):
                metrics[f"exact/{name}"] = self.config["derived"][name]
        return metrics

    def log(self, row: Mapping[str, Any]) -> None:
        """Log metrics of this global_step that are already on the host; `settle` yields the row."""
        step = self._global_step
        self._pending.append((HostCopy({}, self._device), lambda _: self._logged(step, dict(row))))

    def _logged(self, step: int, metrics: dict[str, Any]) -> Row:
        if self._args["log_interval"] or any(name.startswith("eval/") for name in metrics):
            self._tracker.log(step, metrics)
        return step, metrics

    def _write_best(self) -> None:
        best = agent_content(
            self.config, self._best.weights, self._best.global_step, self._best.return_mean
        )
        content = HostCopy(best, self._device).get()
        self._write_soon("best.pt", partial(save_checkpoint, content=content))
        self._write_soon("best.safetensors", partial(write_weights, content=content))

    def _restore_best(self) -> None:
        """Write the best agent of the checkpoint; what came after it comes again."""
        if self._best.weights:
            self._write_best()
            return
        for name in ("best.pt", "best.safetensors"):
            (self.run_dir / name).unlink(missing_ok=True)

    def save(self) -> None:
        """Write a checkpoint and the episodes so far; twice at one place is once.

        The checkpoint is copied and then written while the loop runs, unless it is larger than
        COPIED_BYTES: then the loop waits, because a second copy of a large replay may not fit.
        """
        if self._saved_at == self._global_step and not self.owes_side_jobs:
            return
        saves_replay = self._args["checkpoint_replay"]
        rows = min(self._dqn.replay.capacity, self._global_step) if saves_replay else 0
        content = self._last_agent() | {"config": self.config}
        content["resume"] = {
            "global_step": self._global_step,
            "num_updates": self._num_updates,
            "learning_starts": self._plan.learning_starts,
            "updates_before": self._plan.updates_before,
            "replay_rows": rows,
            "state": tree.plain(saved_part(self._state, self._dqn, rows)),
            "host": self._dqn.env.host_state(),
            "host_refusal": getattr(self._dqn.env, "host_state_refusal", ""),
            "best": self._best.state(),
            "previous": self._diagnostics.state()["previous"],
        }
        now = {
            "num_evaluations": self.num_evaluations,
            "evaluation": dict(self._evaluation),
            "num_syncs": self._num_syncs,
            "last_diagnosis": self._last_diagnosis,
            "measured_at": self._measured_at,
            "owes_side_jobs": self.owes_side_jobs,
            "solved": self.solved,
            "engine": self.engine,
            "running": self._running,
            "eval_s": self.eval_s,
            "spent": self._spent_so_far(),
        }
        moment, large = Moment(self._device), tree.num_bytes(content) > COPIED_BYTES

        def finish(arrived: dict[str, Any]) -> None:
            self._num_saving -= 1
            interval = so_far()
            self._freeze(interval.bad_updates)
            if len(self._frozen) == self._num_members:
                return  # the earlier checkpoints stand
            before, step, num_updates, age, eval_before = self._last_log
            age += moment.since(before) - (now["eval_s"] - eval_before)
            diagnostics = self._diagnostics.state() | {"previous": arrived["resume"]["previous"]}
            arrived["resume"]["record"] = now | {
                "frozen": [[*pair] for pair in self._frozen.items()],
                "window": [step, num_updates, age],
                "metrics": interval.state(),
                "episodes": self._episodes.state(),
                "diagnostics": diagnostics,
                "tracker": self._tracker.state(),
            }
            keep = self._args["keep_checkpoints"]
            self._write_soon("checkpoint.pt", partial(save_checkpoint, content=arrived, keep=keep))
            self._write_soon("weights.safetensors", partial(write_weights, content=arrived))
            self._write_arrays(self._episodes.with_reading(interval.reading()))
            self._write_digests(self._tracker.digest(), "config.json")
            if large:
                self._files.wait()

        so_far = self._metrics.so_far()
        self._saved_at = self._global_step
        self._pending.append((HostCopy(content, self._device, lent=large), finish))
        # One copy at a time: a host ahead of its GPU would accumulate them.
        self._must_wait |= large or self._num_saving > 0
        self._num_saving += 1

    def _checkpoint_bytes(self) -> int:
        """Bytes of the tensors of a checkpoint at the end of the run; episodes and diagnostics come
        on top."""
        rows = self._dqn.replay.capacity if self._args["checkpoint_replay"] else 0
        rows = min(rows, self._plan.end)
        networks = 3 * tree.num_bytes(self._state.params)  # agent, best agent, last log point
        return tree.num_bytes(saved_part(self._state, self._dqn, rows)) + networks

    def _save_broken(self) -> None:
        """Write the agent of a run that broke off as `broken.pt`; the checkpoints stay."""
        self._guard.check_()
        self._write("broken.pt", lambda path: save_checkpoint(path, self._last_agent()))

    def _write_digests(
        self, metrics: tuple[int, str] | None, *names: str, at_once: bool = False
    ) -> None:
        """Write `digests.json`, with which the report finds text files that were damaged.

        Args:
            metrics: bytes of `metrics.jsonl` and their digest; None: not known.
            names: files that are whole.
            at_once: whether to write it now, not after the files that are still to be written.
        """
        known = {} if metrics is None else {"metrics.jsonl": metrics}
        write = partial(write_digests, global_step=self._global_step, known=known, names=names)
        if at_once:
            self._write("digests.json", write)
        else:
            self._write_soon("digests.json", write)

    def _last_agent(self) -> dict[str, Any]:
        not_known = [math.nan] * self._num_members
        return agent_content(
            self.config,
            self._q_net.named(),
            [self._global_step] * self._num_members,
            self._evaluation.get("eval_return_mean", not_known),
        )

    def _write_soon(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file in the thread, from data that no code changes any more."""

        def job() -> None:
            write(self.run_dir / name)
            self._unwritten.pop(name, None)

        self._files.submit(name, job)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            write(self.run_dir / name)
            self._unwritten.pop(name, None)
        except OSError as error:
            self._not_written(name, error)

    def _not_written(self, name: str, error: Exception) -> None:
        why = (isinstance(error, OSError) and error.strerror) or repr(error)
        self._unwritten[name] = why
        if name not in self._warned:
            self._warned.add(name)
            warn(f"{name} could not be written ({why}); training goes on")

    def _best_effort(self, what: str, make: Callable[[], object]) -> None:
        """Make a film, figure or report; an error causes one warning and never ends the run."""
        try:
            make()
            self._unwritten.pop(what, None)
        except Exception as error:
            if isinstance(error, OSError):
                self._unwritten[what] = error.strerror or repr(error)
            kind = "" if isinstance(error, UndrawableError) else f"{type(error).__name__}: "
            print(f"warning: no {what}: {kind}{error}", file=sys.stderr)

    def _film(self) -> None:
        film_run(self.run_dir, self._diagnostics.env, self._args["seed"])

    def _write_report(self) -> None:
        write_report([self.run_dir], self.run_dir / "report.html")

    def _log_figures(self) -> None:
        self._tracker.log_figures(self._global_step, run_figures(self.run_dir))

    def _write_arrays(self, log: EpisodeLog) -> None:
        episodes = log.arrays() | {"num_dropped": np.array(log.num_dropped)}
        for name, arrays in (
            ("episodes.npz", episodes),
            ("diagnostics.npz", self._diagnostics.arrays()),
        ):
            self._write_soon(name, partial(_write_npz, arrays))

    def _spent_so_far(self) -> dict[str, float]:
        """Seconds of this process and of those before it, as in the summary; evaluations and
        compiling are in "loop_s"."""
        now = time.perf_counter()
        loop_ended = getattr(self, "_loop_ended", now)
        spent = {
            "wall_s": now - self._began,
            "startup_s": self._loop_began - self._began,
            "loop_s": loop_ended - self._loop_began,
            "compile_s": self.compile_s,
        }
        return {name: self._spent[name] + seconds for name, seconds in spent.items()}

    def _summarise(self) -> dict[str, Any]:
        spent = self._spent_so_far()
        seconds = max(spent["loop_s"] - spent["compile_s"] - self.eval_s, 1e-9)
        unknown = [None] * self._num_members
        shared = {
            "status": self.status,
            "env_id": self.config["env_id"],
            "seed": self._args["seed"],
            "num_seeds": self._args["num_seeds"],
            "num_members": self._num_members,
            "num_envs": self._args["num_envs"],
            "global_step": self._global_step,
            "num_updates": self._num_updates,
            "replay_ratio": self.config["derived"]["replay_ratio"],
            "wall_s": spent["wall_s"],
            "startup_s": spent["startup_s"],
            "compile_s": spent["compile_s"],
            "eval_s": self.eval_s,
            "loop_s": seconds,
            "env_steps_per_s": self._global_step * self._num_members / seconds,
            "updates_per_s": self._num_updates * self._num_members / seconds,
            "eval_episodes": self._args["eval_episodes"],
            "episodes_dropped": self._episodes.num_dropped,
            "engine": self.engine,
            "engine_reason": self._reason,
            "device": self.config["derived"]["device"],
        }
        members: dict[str, list[Any]] = {
            "num_episodes": self._episodes.num_finished.tolist(),
            "eval_return_mean": unknown,
            "eval_return_std": unknown,
            "q_error_max": unknown,
            "policy_optimal": unknown,
            "start_value": unknown,
            "eval_return_best": [r if math.isfinite(r) else None for r in self._best.return_mean],
        }
        for name in ("optimal_return", "optimal_start_value"):
            known = self.config["derived"][name]
            members[name] = known if isinstance(known, list) else [known] * self._num_members
        rows = [{**row, "frozen": self._frozen.get(i)} for i, row in enumerate(self._members)]
        return summarise(shared, members | self._evaluation, rows)


def _write_npz(arrays: Mapping[str, Any], path: Path) -> None:
    write_whole(path, lambda file: np.savez(file, **arrays))


def tracker_config(run_dir: Path, config: Mapping[str, Any]) -> TrackerConfig:
    """Settings of the loggers, from the content of `config.json`."""
    args = config["args"]
    names = ("quiet", "track", "tensorboard", "wandb_project", "wandb_entity", "wandb_group")
    return TrackerConfig(
        run_dir=run_dir,
        run_name=run_dir.name,
        config=config,
        total_timesteps=config["derived"]["end"],
        num_members=len(config["derived"]["members"]),
        **{name: args[name] for name in (*names, "wandb_tags", "wandb_mode")},
    )


def _jsonl_digest(saved: Mapping[str, Any] | None) -> tuple[int, str] | None:
    """Bytes of `metrics.jsonl` at a checkpoint, and their digest."""
    jsonl = (saved or {}).get("jsonl")
    return (jsonl["bytes"], jsonl["sha256"]) if jsonl else None
