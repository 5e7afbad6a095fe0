"""A user's environment that breaks its contract: the message says where, and no result is lost."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from dqn_fast.envs import EnvError, TensorEnv
from dqn_fast.envs.from_gymnasium import from_gymnasium
from dqn_fast.record.checkpoint import load_checkpoint
from dqn_fast.settings import UsageError
from dqn_fast.train import Args, train

STEP, COPY = 300, 5  # where the environments break: vector step, from 1, and env copy, from 0


def settings(run_dir: Path) -> Args:
    return Args(
        num_envs=8,
        total_timesteps=8_000,
        learning_starts=100,
        log_interval=800,
        eval_interval=0,
        checkpoint_interval=800,
        report=False,
        quiet=True,
        run_dir=run_dir,
    )


class CountState(NamedTuple):
    """steps since the run began and number of the copy, both [E]."""

    steps: Tensor
    copy: Tensor


@dataclass(frozen=True)
class Counter(TensorEnv):
    """Counts its steps; an episode never terminates. `broken` names the fault, which depends on the
    count: a reset does not set it back."""

    broken: str = ""
    max_steps: int = 1_000
    num_actions: ClassVar[int] = 2

    def reset(self, noise: Tensor) -> CountState:
        if self.broken == "reset raises":
            raise RuntimeError("no board")
        copy = torch.arange(len(noise), device=noise.device)
        return CountState(torch.zeros_like(copy), copy)

    def step(self, state: CountState, action: Tensor, noise: Tensor) -> Any:
        steps = state.steps + 1
        here = (steps >= STEP) & (state.copy == COPY)
        reward = torch.ones(len(steps))
        terminated = torch.zeros(len(steps), dtype=torch.bool)
        if self.broken == "reward is nan":
            reward = torch.where(here, math.nan, reward)
        if self.broken == "reward is infinite":
            reward = torch.where(here, math.inf, reward)
        if self.broken == "step raises" and bool(here.any()):
            raise RuntimeError("fell off the table")
        if self.broken == "reward has a shape too many":
            reward = reward[:, None]
        if self.broken == "reward is double":
            reward = reward.double()
        if self.broken == "terminated is a number":
            terminated = terminated.float()
        if self.broken == "state changes its dtype":
            steps = steps.float()
        return CountState(steps, state.copy), reward, terminated

    def observe(self, state: CountState) -> Tensor:
        obs = torch.stack([state.steps, state.copy], -1) / STEP
        if self.broken == "obs is nan":
            here = (state.steps >= STEP) & (state.copy == COPY)
            obs = torch.where(here[:, None], math.nan, obs)
        return obs


class HostCounter(gymnasium.Env[Any, Any]):
    """The same on the host; all copies break in the same step, and the first one is named."""

    observation_space = gymnasium.spaces.Box(-math.inf, math.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, broken: str) -> None:
        self.broken, self.steps = broken, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        here = self.steps == STEP
        obs = np.full(2, self.steps / STEP, np.float32)
        reward: Any = 1.0
        if here:
            match self.broken:
                case "reward is nan":
                    reward = math.nan
                case "reward is text":
                    reward = "much"
                case "obs is nan":
                    obs[0] = math.nan
                case "obs has another shape":
                    obs = np.zeros(3, np.float32)
                case "obs has another dtype":
                    obs = np.array(["a", "b"])
                case "step raises":
                    raise RuntimeError("fell off the table")
                case "action is refused":
                    raise ValueError(f"action {action} out of range")
        return obs, reward, self.steps % 100 == 0, False, {}


def assert_kept(run_dir: Path, message: str) -> None:
    """The record ends with the error and contains its message."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"].startswith("failed: ")
    assert message in summary["status"]
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in logged][:2] == [800, 1_600]
    weights = load_checkpoint(run_dir / "checkpoint.pt")["q_net"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


@pytest.mark.parametrize("broken", ["reward is nan", "reward is infinite", "obs is nan"])
def test_a_tensor_environment_that_is_not_finite_is_named_with_copy_and_step(broken, tmp_path):
    """Found where its NaN reaches the loss, traced back to where it came from."""
    field = "reward" if broken.startswith("reward") else "next_obs"
    message = f"Counter: {field} not finite in copy {COPY}, in vector step {STEP:,}"
    with pytest.raises(EnvError, match=re.escape(message)):
        train(settings(tmp_path / "run"), env=Counter(broken))
    assert_kept(tmp_path / "run", message)


def test_a_tensor_environment_that_raises_loses_nothing(tmp_path):
    """The error has the text of the environment's and the place."""
    message = "Counter: RuntimeError: fell off the table (between global_step "
    nets = []
    with pytest.raises(EnvError, match=re.escape(message)):
        train(
            settings(tmp_path / "run"),
            env=Counter("step raises"),
            on_log=lambda _, training, __: nets.append(training.q_net),
        )
    assert_kept(tmp_path / "run", message)
    broken = load_checkpoint(tmp_path / "run" / "broken.pt")
    assert all(map(torch.equal, broken["q_net"].values(), nets[-1].params))


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("reward has a shape too many", "reward must be float32 [E], got torch.float32 (2, 1)"),
        ("reward is double", "reward must be float32 [E], got torch.float64 (2,)"),
        ("terminated is a number", "terminated must be bool [E], got torch.float32 (2,)"),
        ("state changes its dtype", "step must keep the state's shapes and dtypes"),
        ("reset raises", "reset raises RuntimeError: no board"),
    ],
)
def test_a_tensor_environment_of_the_wrong_form_is_a_usage_error(broken, rule, tmp_path):
    """Before anything is written."""
    with pytest.raises(UsageError, match=re.escape(f"Counter: {rule}")):
        train(settings(tmp_path / "run"), env=Counter(broken))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    "broken",
    [
        "reward is nan",
        "reward is text",
        "obs is nan",
        "obs has another shape",
        "obs has another dtype",
        "step raises",
        "action is refused",
    ],
)
def test_a_host_environment_is_named_with_copy_and_step(broken, mode, tmp_path):
    """In this process or in a worker, the message has environment, copy and step."""
    env = from_gymnasium(lambda: HostCounter(broken), vectorization_mode=mode)
    with pytest.raises(EnvError, match=rf"HostCounter.*copy 0.*step {STEP}") as caught:
        train(settings(tmp_path / "run"), env=env)
    env.close()
    assert_kept(tmp_path / "run", str(caught.value))
