"""Going on with a run from its newest whole checkpoint.

    python -m dqn_fast.train --resume RUN_DIR
    train(Args(resume=run_dir, total_timesteps=200_000))

`open_run` locks the directory and reads the checkpoint, `Resumption.complete` gives the settings,
and `restore_` overwrites a new state. On a CPU the resumed run equals the undisturbed one bit for
bit, unless a setting or the software has changed that moves a sum or a schedule.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dqn_fast import tree
from dqn_fast.dqn import DQN, State
from dqn_fast.envs import NotNamedError, OwnedError, Recipe, TensorEnv
from dqn_fast.noise import Noise
from dqn_fast.record.checkpoint import (
    kept_paths,
    load_newest,
    remove_leftovers,
    saved_part,
)
from dqn_fast.record.lock import RunLock
from dqn_fast.settings import UsageError, absolute, check_settings, flag, one_line

if TYPE_CHECKING:
    from dqn_fast.train import Args

A = TypeVar("A", bound="Args")

ROUNDING = "results differ by rounding from here on"
MAY_CHANGE: dict[str, str] = {
    "resume": "",
    "run_dir": "",
    "total_timesteps": "schedules follow the new length from here on",
    "log_interval": "log points lie at other steps",
    "eval_interval": "evaluations lie at other steps, and play other episodes",
    "eval_episodes": "evaluations play other episodes",
    "eval_envs": "",
    "checkpoint_interval": "",
    "checkpoint_replay": "",
    "keep_checkpoints": "",
    "stop_at_return": "",
    "stop_when_optimal": "",
    "device": ROUNDING,
    "engine": ROUNDING,
    "keep_generated": "",
    "chunk_steps": "",
    "num_threads": ROUNDING,
    "matmul_precision": ROUNDING,
    "report": "",
    "quiet": "",
    "track": "",
    "wandb_project": "",
    "wandb_entity": "",
    "wandb_group": "",
    "wandb_tags": "",
    "wandb_mode": "",
    "tensorboard": "",
}
"""Settings that a resumed run may change, each with its effect on the results."""


ENVIRONMENT = ("env", "env_params", "wrappers")
"""Settings that name an environment which a Python program had made."""

SAVED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(
        ("global_step", "num_updates", "learning_starts", "updates_before", "replay_rows"), int
    ),
    **dict.fromkeys(("state", "best", "record"), dict),
    "host": (dict, type(None)),
    "host_refusal": str,
}
"""Types of what a checkpoint has for `Resumption.saved`; counts are at least 0."""


@dataclass
class Resumption:
    """A run that goes on.

    Attributes:
        run_dir: its directory, locked by `lock`.
        path: the checkpoint that was read.
        config: content of `config.json` at the checkpoint.
        saved: state of environments, learner and records; see `RunRecord.save`.
        lock: of the directory.
        notes: what differs from an undisturbed run, a line each.
        changes: settings that have changed, by name.
    """

    run_dir: Path
    path: Path
    config: Mapping[str, Any]
    saved: Mapping[str, Any]
    lock: RunLock
    notes: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def global_step(self) -> int:
        return self.saved["global_step"]

    @property
    def num_updates(self) -> int:
        return self.saved["num_updates"]

    @property
    def updates_before(self) -> int:
        """Gradient steps before `learning_starts`."""
        return self.saved["updates_before"] if self.saved["replay_rows"] else self.num_updates

    def learning_starts(self, usual: int) -> int:
        """Transitions before the next gradient step: if replay was not saved it has to fill again.

        Args:
            usual: transitions before the first gradient step of a new run.
        """
        if self.saved["replay_rows"] or self.global_step == 0:
            return self.saved["learning_starts"]
        starts = self.global_step + usual
        self.notes.append(
            "replay was not saved (--checkpoint-replay false): it fills again, with no gradient "
            f"step before global_step {starts:,}"
        )
        return starts

    def history(self) -> list[dict[str, Any]]:
        """When the run was resumed, with what differs since then, for `config.json`."""
        now = {"global_step": self.global_step, "differs": self.notes}
        return [*self.config.get("resumed", ()), now]

    def args_of(self, cls: type[A]) -> A:
        """Settings of the run, as they were.

        Raises:
            UsageError: the checkpoint is of a version with other settings.
        """
        known = {setting.name for setting in dataclasses.fields(cls)}
        saved = {**self.config["args"], "resume": self.run_dir, "run_dir": self.run_dir}
        if unknown := saved.keys() - known:
            text = one_line(min(map(str, unknown)))
            raise UsageError(f"--resume {self.run_dir}: has the unknown setting {text}")
        return check_settings(cls(**saved))

    def complete(self, args: A, env: TensorEnv | None = None, exact: bool = False) -> A:
        """The settings of the resumed run.

        Args:
            args: settings that change; those at their defaults stay as they were in the run.
            env: the caller's own environment, or None.
            exact: whether settings at their defaults count too.

        Raises:
            UsageError: a setting may not change, or the environment has to be named.
        """
        cls = type(args)
        args, before, usual = check_settings(args), self.args_of(cls), cls()
        names = [setting.name for setting in dataclasses.fields(cls)]
        given = {n for n in names if exact or getattr(args, n) != getattr(usual, n)}
        if args.run_dir is not None and args.run_dir.absolute() != self.run_dir.absolute():
            raise UsageError(f"--run-dir {args.run_dir}: must be {self.run_dir}, as --resume")
        for name in names:
            old, new = getattr(before, name), getattr(args, name)
            if name not in given or new == old or name in ("resume", "run_dir"):
                continue
            if self.recipe.is_owned and name in ENVIRONMENT:
                self.changes[name] = new
                continue
            if name not in MAY_CHANGE:
                raise UsageError(
                    f"{flag(name)} {new}: must be {old}, as in {self.run_dir}, which is resumed"
                )
            self.changes[name] = new
            if MAY_CHANGE[name]:
                self.notes.append(f"{name} {old} -> {new}: {MAY_CHANGE[name]}")
        complete = dataclasses.replace(before, **self.changes)
        if env is not None:
            complete = dataclasses.replace(complete, env=None, env_params={}, wrappers=())
        if -(-complete.total_timesteps // complete.num_envs) * complete.num_envs < self.global_step:
            raise UsageError(
                f"--total-timesteps {complete.total_timesteps}: must be at least "
                f"{self.global_step}, the transitions that {self.run_dir} has taken"
            )
        if self.recipe.is_owned and env is None and complete.env is None:
            raise UsageError(
                f"--resume {self.run_dir}: its environment {OwnedError(self.recipe.hint)}"
            )
        return complete

    @property
    def recipe(self) -> Recipe:
        """How the environment of the run was made."""
        return Recipe.read(self.config)

    def named(
        self,
        env_id: str | None,
        env_params: Mapping[str, Any],
        env: str | None = None,
        wrappers: Sequence[str] | None = None,
    ) -> None:
        """Check that the environment may be made: a path to code in a file is only a name, and is
        imported where the person names it too.

        Args:
            env_id, env_params, env, wrappers: as the person has named them; None: not named.

        Raises:
            UsageError: something has to be named.
        """
        if self.recipe.is_owned and env is None:
            return  # `complete` asks for it
        try:
            self.recipe.named(env_id, env_params, env, wrappers)
        except NotNamedError as unnamed:
            flags = unnamed.flags or "--env-id and --env-params"
            raise UsageError(
                f"--resume {self.run_dir}: its environment is {self.config['env_id']!r}; {unnamed} "
                f"is done only if you name it: add {flags}"
            ) from None
        except ValueError as error:
            raise UsageError(str(error)) from None

    def restore_(self, state: State, dqn: DQN, noise: Noise) -> list[dict[str, Any]]:
        """Overwrite the state of a new run with the saved one.

        Args:
            state: written.
            dqn: the algorithm.
            noise: of the members.

        Returns:
            Episodes that are cut off here, because the environment's state cannot be saved.

        Raises:
            UsageError: the checkpoint does not fit the settings.
        """
        path, step = self.path, self.global_step // dqn.num_envs
        target = saved_part(state, dqn, self.saved["replay_rows"])
        try:
            tree.load_(target, self.saved["state"])
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
        if not dqn.env.on_host:
            return []
        try:
            if self.saved["host"] is None:
                why = self.saved["host_refusal"]
                raise ValueError(f"the environment's state cannot be saved ({why})")
            dqn.env.load_host_state_(self.saved["host"])
        except ValueError as error:
            self.notes.append(f"all copies begin new episodes: {error}")
            return dqn.begin_episodes_(state, noise, step)
        return []


def open_run(run_dir: Path) -> Resumption:
    """Lock the directory of a run and read its newest whole checkpoint.

    Raises:
        UsageError: there is no such run, it has no whole checkpoint, or another process has it.
    """
    name = f"--resume {run_dir}"
    if not run_dir.is_dir():
        raise UsageError(f"{name}: must be the directory of a run")
    if not any(path.exists() for path in kept_paths(run_dir / "checkpoint.pt")):
        raise UsageError(f"{name}: has no checkpoint.pt, so there is nothing to go on with")
    run_dir = absolute(run_dir)
    lock = RunLock(run_dir, name)
    try:
        remove_leftovers(run_dir)
        newest = run_dir / "checkpoint.pt"
        try:
            path, content, notes = load_newest(newest, check=_check_types)
        except ValueError as error:
            raise UsageError(f"{name}: {error}; there is nothing to go on with") from error
        notes += _software_changes(content["config"]["software"])
        return Resumption(run_dir, path, content["config"], content["resume"], lock, notes)
    except BaseException:
        lock.release()
        raise


def _check_types(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint has not what `Resumption` reads."""
    config, saved = content.get("config"), content.get("resume")
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds an agent only")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(name), dict) for name in ("args", "software")
    ):
        raise ValueError(f"{path}: its settings cannot be read")
    if not isinstance(config["args"].get("env_params"), dict) or not isinstance(
        config["args"].get("env_id"), str
    ):
        raise ValueError(f"{path}: its environment cannot be read")
    Recipe.read(config)
    for name, allowed in SAVED.items():
        value = saved.get(name)
        if not isinstance(value, allowed) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{path}: its {name} cannot be read")


def _software_changes(before: Mapping[str, Any]) -> list[str]:
    """Versions on which rounding depends and that are not those of the checkpoint."""
    now = {"torch": torch.__version__, "platform": platform.platform()}
    return [
        f"{name} {before[name]} -> {version}: {ROUNDING}"
        for name, version in now.items()
        if before.get(name) not in (version, None)
    ]
