"""Members that break down keep their last good networks, and the others learn on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dqn_fast.agent import load_agent
from dqn_fast.envs import LineWorld
from dqn_fast.record.checkpoint import load_checkpoint
from dqn_fast.record.run import TrainingError
from dqn_fast.train import Args, train

SHORT: dict[str, Any] = {
    "total_timesteps": 3_000,
    "num_envs": 8,
    "num_seeds": 3,
    "learning_starts": 300,
    "hidden_sizes": (16,),
    "batch_size": 16,
    "log_interval": 200,
    "eval_interval": 1_000,
    "eval_episodes": 3,
    "checkpoint_interval": 500,
    "engine": "eager",
    "report": False,
    "quiet": True,
}


class Breaks(LineWorld):
    """Its reward is NaN for the copies of the second of three members, from step 150 on."""

    steps = 0

    def step(self, state: Any, action: Tensor, noise: Tensor) -> tuple[Any, Tensor, Tensor]:
        state, reward, terminated = super().step(state, action, noise)
        if len(reward) == 24:
            Breaks.steps += 1
            if Breaks.steps > 150:
                reward = reward.clone()
                reward[8:16] = math.nan
        return state, reward, terminated


def test_a_member_that_breaks_down_is_frozen_and_named(tmp_path, capsys):
    """Its agents are finite; the others are, bit for bit, those of a run without the fault; a
    resumed run knows it still."""
    Breaks.steps = 0
    args = Args(**{**SHORT, "quiet": False}, run_dir=tmp_path / "run")
    train(args, env=Breaks())
    train(Args(**SHORT, run_dir=tmp_path / "good"), env=LineWorld())
    text = capsys.readouterr().out
    assert text.count("member 1 is frozen: Breaks: reward not finite in copy 0 of member 1") == 1
    ours, theirs = (
        load_checkpoint(tmp_path / n / "checkpoint.pt")["q_net"] for n in ("run", "good")
    )
    for name, tensor in ours.items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor[[0, 2]], theirs[name][[0, 2]])
        assert not torch.equal(tensor[1], theirs[name][1])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    reasons = [member["frozen"] for member in summary["members"]]
    assert reasons[0] is reasons[2] is None
    assert reasons[1].startswith("Breaks: reward not finite")
    agent = load_agent(tmp_path / "run", "last", member=1, env=LineWorld(), device="cpu")
    assert agent.q_values(torch.arange(14)).isfinite().all()
    rows = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = rows[-1]["members"]["losses/td_loss"]
    assert losses[1] is None
    assert None not in (losses[0], losses[2])
    result = train(Args(resume=tmp_path / "run", total_timesteps=3_400), env=Breaks())
    assert [member["frozen"] for member in result.summary["members"]] == reasons
    assert all(param.isfinite().all() for param in result.q_net.params)


def test_a_run_ends_when_no_member_learns_any_more(tmp_path):
    """The checkpoint before stands, with finite networks of all members; broken.pt has the last
    good ones."""
    args = Args(
        **{**SHORT, "eval_interval": 0, "checkpoint_interval": 100}, learning_rate=1e30,
        max_grad_norm=math.inf, loss="squared", run_dir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(
        TrainingError, match=r"not finite of member \d in gradient step \d+, at glob"
    ):
        train(args)
    for name in ("checkpoint.pt", "broken.pt"):
        content = load_checkpoint(tmp_path / "run" / name)
        assert all(tensor.isfinite().all() for tensor in content["q_net"].values())
