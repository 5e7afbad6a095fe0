"""The record of a run: its directory, its settings, its header, its summary."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dqn_fast.checkpoint import (
    BestAgent,
    agent_content,
    save_checkpoint,
    write_json,
    write_whole,
)
from dqn_fast.evaluate import Evaluation
from dqn_fast.metrics import EpisodeLog, Metrics
from dqn_fast.networks import QNetwork
from dqn_fast.tracker import Tracker

PACKAGES = ("torch", "numpy", "gymnasium", "plotly", "tyro", "wandb")


class UsageError(ValueError):
    """Input that makes no sense; the message names the flag, the value and what is allowed."""


class TrainingError(RuntimeError):
    """Training cannot go on; what was recorded up to here is saved."""


def create_run_dir(path: Path | None, env_id: str, name: str, seed: int) -> Path:
    """Make the directory of a new run.

    Args:
        path: the directory, new or empty; None makes a new one under `runs`.
        env_id, name, seed: make up the name of the latter, together with the time in UTC.

    Raises:
        UsageError: the directory holds something or cannot be written; nothing was changed.
    """
    if path is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        stem = f"{env_id.replace('/', '-').replace(':', '-')}__{name}__s{seed}__{stamp}"
        candidates = [
            Path("runs") / (stem + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 100)))
        ]
    else:
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(f"--run-dir {path}: is not empty; it must be new or empty")
        candidates = [path]
    for candidate in candidates:
        existed = candidate.is_dir()
        try:
            candidate.mkdir(parents=True, exist_ok=path is not None)
            with tempfile.TemporaryFile(dir=candidate):
                pass
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
        return candidate
    raise UsageError(f"--run-dir {candidates[0]}: exists 99 times over; name another")


def software() -> dict[str, str | None]:
    """Versions of Python and the packages, the processor, and the git commit if there is one."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions | {"platform": platform.platform(), "git_commit": _git_commit()}


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The device for people: its type, and the card's name if it has one."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


class RunRecord:
    """Everything that a run writes; as a context manager it ends the run well.

    However the run ends, what was measured until then is in the files. A file that cannot be
    written costs one warning and never the run.

    Attributes:
        run_dir: directory of the run.
        config: content of `config.json`.
        status: "done" unless something else ended the run.
        num_evaluations: evaluations so far.
        summary: content of `summary.json`, complete once the run has ended.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        tracker: Tracker,
        metrics: Metrics,
        began: float,
    ) -> None:
        """Write `config.json` and the header; `began` is the time.perf_counter() of the start."""
        self.run_dir, self.config, self.status = run_dir, config, "done"
        self.num_evaluations = 0
        self.summary: dict[str, Any] = {}
        self._args: Mapping[str, Any] = config["args"]
        self._num_members: int = self._args["num_seeds"]
        self._tracker, self._metrics = tracker, metrics
        self._episodes = EpisodeLog(self._num_members)
        self._best = BestAgent(self._num_members)
        self._evaluation: dict[str, list[Any]] = {}
        self._global_step = self._num_updates = 0
        self._warned: set[str] = set()
        self._write("config.json", lambda path: write_json(path, config))
        for line in header(config, run_dir):
            tracker.message(line)
        tracker.progress(0)
        self._began, self._loop_began = began, time.perf_counter()
        self._last_log = (self._loop_began, 0, 0)

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
            with contextlib.suppress(Exception):  # the device itself may be what failed
                self.log(self.read())
        self.summary = self._summarise()
        self._write("summary.json", lambda path: write_json(path, self.summary))
        self._write("episodes.npz", self._write_episodes)
        for line in closing(self.summary, self._args, self.run_dir):
            self._tracker.message(line)
        if (best := self.run_dir / "best.pt").exists():
            self._tracker.log_artifact(best, f"{self.run_dir.name}-best", "model")
        self._tracker.finish(self.summary, exit_code=0 if error is None else 1)

    def advance(self, global_step: int, num_updates: int) -> None:
        """Note how far the run is."""
        self._global_step, self._num_updates = global_step, num_updates
        self._tracker.progress(global_step)

    def read(self) -> dict[str, Any]:
        """Metrics since the last reading, a value per member, and the speed; keeps episodes."""
        reading = self._metrics.read_()
        self._episodes.add(reading)
        now = (time.perf_counter(), self._global_step, self._num_updates)
        seconds, steps, updates = (new - old for new, old in zip(now, self._last_log, strict=True))
        self._last_log = now
        return reading.values | {
            "charts/episodes": self._episodes.num_finished.tolist(),
            "perf/env_steps_per_s": steps * self._num_members / seconds,
            "perf/updates_per_s": updates * self._num_members / seconds,
        }

    def evaluated(
        self, result: Evaluation, exact: Mapping[str, list[Any]], q_net: QNetwork
    ) -> dict[str, list[Any]]:
        """Take in an evaluation of the network as it is; a best one is saved as `best.pt`.

        Args:
            result: of greedy episodes.
            exact: of `ExactValues.compare`, empty where nothing is known exactly.
            q_net: the network.

        Returns:
            Metrics, a value per member.
        """
        self.num_evaluations += 1
        self._evaluation = {
            "eval_return_mean": result.episode_return.mean(1).tolist(),
            "eval_return_std": result.episode_return.std(1, correction=0).tolist(),
            **exact,
        }
        if self._best.offer(q_net, self._evaluation["eval_return_mean"], self._global_step):
            best = agent_content(
                self.config, self._best.weights, self._best.global_step, self._best.return_mean
            )
            self._write("best.pt", lambda path: save_checkpoint(path, best))
        return {
            "eval/return_mean": self._evaluation["eval_return_mean"],
            "eval/return_std": self._evaluation["eval_return_std"],
            "eval/discounted_return": result.discounted_return.mean(1).tolist(),
            "eval/q_start": result.q_start.mean(1).tolist(),
        } | {f"exact/{name}": values for name, values in exact.items()}

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand metrics to the loggers, at the current global_step."""
        if self._args["log_interval"] or any(name.startswith("eval/") for name in row):
            self._tracker.log(self._global_step, row)

    def save(self, learner_state: Mapping[str, Any]) -> None:
        """Write `checkpoint.pt` and the episodes up to here."""
        not_known = [math.nan] * self._num_members
        content = agent_content(
            self.config,
            learner_state["q_net"],
            [self._global_step] * self._num_members,
            self._evaluation.get("eval_return_mean", not_known),
        )
        content["resume"] = {
            "learner": learner_state,
            "best": self._best.state_dict(),
            "num_updates": self._num_updates,
            "num_evaluations": self.num_evaluations,
        }
        self._write("checkpoint.pt", lambda path: save_checkpoint(path, content))
        self._write("episodes.npz", self._write_episodes)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            write(self.run_dir / name)
        except OSError as error:
            if name not in self._warned:
                self._warned.add(name)
                self._tracker.message(
                    f"warning: {name} could not be written ({error.strerror}); training goes on"
                )

    def _write_episodes(self, path: Path) -> None:
        arrays = self._episodes.arrays() | {"num_dropped": np.array(self._episodes.num_dropped)}
        write_whole(path, lambda file: np.savez(file, **arrays))

    def _summarise(self) -> dict[str, Any]:
        now = time.perf_counter()
        seconds = max(now - self._loop_began, 1e-9)
        unknown = [None] * self._num_members
        shared = {
            "status": self.status,
            "env_id": self.config["env_id"],
            "seed": self._args["seed"],
            "num_seeds": self._num_members,
            "num_envs": self._args["num_envs"],
            "global_step": self._global_step,
            "num_updates": self._num_updates,
            "replay_ratio": self.config["derived"]["replay_ratio"],
            "wall_s": now - self._began,
            "startup_s": self._loop_began - self._began,
            "env_steps_per_s": self._global_step * self._num_members / seconds,
            "updates_per_s": self._num_updates * self._num_members / seconds,
            "eval_episodes": self._args["eval_episodes"],
            "optimal_return": self.config["derived"]["optimal_return"],
            "episodes_dropped": self._episodes.num_dropped,
            "engine": self.config["derived"]["engine"],
            "device": self.config["derived"]["device"],
        }
        members: dict[str, list[Any]] = {
            "num_episodes": self._episodes.num_finished.tolist(),
            "eval_return_mean": unknown,
            "eval_return_std": unknown,
            "q_error_max": unknown,
            "policy_optimal": unknown,
        }
        return summarise(shared, members | self._evaluation, self._num_members)


def header(config: Mapping[str, Any], run_dir: Path) -> list[str]:
    """What a run is about to do, for people."""
    args, derived = config["args"], config["derived"]
    params = ", ".join(f"{name}={value}" for name, value in config["env_params"].items())
    threads = f", {derived['num_threads']} thread(s)" if derived["device"] == "cpu" else ""
    rounded = [f"rounded   {text}" for text in derived["rounded"]]
    return [
        f"env       {config['env_id']} ({params})",
        f"device    {derived['device']}{threads}; engine {derived['engine']} "
        f"({derived['engine_reason']})",
        f"run       {args['num_seeds']} x {args['num_envs']} envs (seed {args['seed']}), "
        f"{derived['end']:,} transitions in {derived['total_vector_steps']:,} vector steps",
        f"learning  {derived['total_updates']:,} gradient steps of {args['batch_size']} "
        f"transitions, replay ratio {derived['replay_ratio']:g}",
        f"network   {'-'.join(map(str, derived['sizes']))}, {derived['num_parameters']:,} "
        f"parameters; replay {args['buffer_size']:,} x {derived['replay_bytes_per_transition']} "
        f"bytes, {derived['replay_bytes'] / 1e6:.2g} MB",
        *rounded,
        f"writing   {run_dir}",
    ]


def closing(summary: Mapping[str, Any], args: Mapping[str, Any], run_dir: Path) -> list[str]:
    """What a run did, for people."""
    lines = [
        f"{summary['status']}: {summary['global_step']:,} transitions and "
        f"{summary['num_updates']:,} gradient steps in {summary['wall_s']:.1f} s; "
        f"{summary['env_steps_per_s']:,.0f} env steps/s, {summary['updates_per_s']:,.0f} updates/s"
    ]
    if summary["eval_return_mean"] is not None:
        lines.append(
            f"greedy return {summary['eval_return_mean']:.5g} +- "
            f"{summary['eval_return_std']:.2g} over {args['eval_episodes']} episodes"
            + (f", mean of {args['num_seeds']} members" if args["num_seeds"] > 1 else "")
        )
    if summary["optimal_return"] is not None and summary["q_error_max"] is not None:
        lines.append(
            f"optimal return {summary['optimal_return']:.5g}; largest value error "
            f"{summary['q_error_max']:.2g}; policy optimal: "
            f"{'yes' if summary['policy_optimal'] else 'no'}"
        )
    return [*lines, f"results in {run_dir}"]


def summarise(
    shared: Mapping[str, Any], members: Mapping[str, list[Any]], num_members: int
) -> dict[str, Any]:
    """The summary of a run: means over members at the top, and a row each if there are several.

    Args:
        shared: what is the same for all members.
        members: by name, one value per member, or None where it is not known.
        num_members: M.
    """
    summary = dict(shared)
    for name, values in members.items():
        if any(value is None for value in values):
            summary[name] = None
        elif isinstance(values[0], bool):
            summary[name] = all(values)
        else:
            summary[name] = float(np.mean(values)) if num_members > 1 else values[0]
    if num_members > 1:
        summary["members"] = [
            {"seed": shared["seed"] + i} | {name: values[i] for name, values in members.items()}
            for i in range(num_members)
        ]
    return summary
