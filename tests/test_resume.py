"""A run that stops and goes on is the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dqn_fast import tree
from dqn_fast.record.checkpoint import load_checkpoint
from dqn_fast.settings import UsageError
from dqn_fast.train import Args, train

TIMES = ("wall_s", "startup_s", "compile_s", "eval_s", "loop_s", "env_steps_per_s", "updates_per_s")


def settings(run_dir: Path, **more: Any) -> Args:
    """A short run with log points, evaluations and checkpoints at odd places."""
    short: dict[str, Any] = {
        "run_dir": run_dir,
        "total_timesteps": 2_000,
        "num_envs": 8,
        "learning_starts": 300,
        "buffer_size": 700,  # its end is crossed
        "hidden_sizes": (16,),
        "batch_size": 16,
        "log_interval": 130,
        "eval_interval": 500,
        "eval_episodes": 3,
        "checkpoint_interval": 600,
        "engine": "eager",
        "report": False,
        "quiet": True,
    }
    return Args(**{**short, **more})


def after(chunks: int) -> Callable[[], bool]:
    """`should_stop` that is true from its n-th call on."""
    asked = iter(range(1_000_000))
    return lambda: next(asked) >= chunks


def content(run_dir: Path) -> dict[str, Any]:
    """Everything that a run leaves, without times."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        keys = ("wall_s", "perf/env_steps_per_s", "perf/updates_per_s")
        members = {k: v for k, v in row.get("members", {}).items() if k not in keys}
        rows.append({**{k: v for k, v in row.items() if k not in keys}, "members": members})
    summary = json.loads((run_dir / "summary.json").read_text())
    arrays = {}
    for name in ("episodes.npz", "diagnostics.npz"):
        with np.load(run_dir / name) as file:
            arrays |= {f"{name}/{key}": file[key].tobytes() for key in file}
    checkpoint = load_checkpoint(run_dir / "checkpoint.pt")
    resume = checkpoint["resume"]
    record = {k: v for k, v in resume["record"].items() if k not in ("spent", "eval_s", "tracker")}
    record["window"] = record["window"][:2]
    kept = {**resume, "record": record}
    tensors = [t.numpy().tobytes() for t in tree.leaves((checkpoint["q_net"], kept))]
    best = load_checkpoint(run_dir / "best.pt")
    return {
        "rows": rows,
        "summary": {k: v for k, v in summary.items() if k not in TIMES},
        "arrays": arrays,
        "tensors": tensors,
        "plain": repr([v for v in plain(kept)]),
        "best": [t.numpy().tobytes() for t in tree.leaves(best)],
    }


def plain(value: Any) -> Any:
    """The values of a tree that are no tensors."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from plain(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from plain(item)
    elif not isinstance(value, torch.Tensor):
        yield value


KINDS: dict[str, dict[str, Any]] = {
    "line_world": {},
    "cartpole": {"env_id": "CartPole-v1", "num_envs": 7, "max_grad_norm": 0.5},
    "table": {"env_id": "FrozenLake-v1", "eps_repeat": 0.6, "double_q": True},
    "members": {"num_seeds": 4, "chunk_steps": 3},
    "sweep": {"sweep": {"gamma": (0.9, 0.99), "eps_end": (0.1, 0.5)}},
    "gymnasium": {"env_id": "gym:CartPole-v1", "total_timesteps": 1_200},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_undisturbed_one(kind, tmp_path):
    """Parameters, moments, replay, metrics, episodes, diagnostics and summary; stopped before
    learning starts, in a log window, and after the ring's end, three times in one run."""
    more = KINDS[kind]
    train(settings(tmp_path / "whole", **more))
    expected = content(tmp_path / "whole")
    generator = random.Random(kind)
    stops = [generator.randrange(1, 4), *(generator.randrange(3, 25) for _ in range(3))]
    run_dir = tmp_path / "parts"
    result = train(settings(run_dir, **more), should_stop=after(stops[0]))
    assert result.summary["status"] == "stopped"
    for stop in [*stops[1:], 10**9]:
        if result.summary["status"] == "stopped":
            result = train(Args(resume=run_dir), should_stop=after(stop))
    found = content(run_dir)
    for name, value in expected.items():
        assert found[name] == value, name
