"""Writes run directories as training does, with made-up curves, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dqn_fast.bellman import expected_return, greedy_policy, value_iteration
from dqn_fast.envs.line_world import LineWorld

LEVELS = np.array([0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0])
ENV = LineWorld(slip_prob=0.05)
SOLUTION = value_iteration(ENV.mdp(), gamma=0.99)
Q_STAR = SOLUTION.q.numpy()
OPTIMAL_RETURN = expected_return(ENV.mdp(), greedy_policy(SOLUTION.q), ENV.max_steps)


def write_run(
    path: Path,
    members: int = 1,
    log_points: int = 40,
    episodes: int = 300,
    tabular: bool = True,
    env_id: str = "LineWorld-v0",
    **args: Any,
) -> Path:
    """Write the files of a run on LineWorld that learned; values go from 0 to Q*.

    Args:
        path: the directory, new.
        members: M.
        log_points: L, 1 000 transitions apart; every fourth has an evaluation.
        episodes: training episodes of all members together.
        tabular: whether what only tabular environments record is there.
        env_id: as recorded.
        args: settings that differ from those here.
    """
    path.mkdir(parents=True)
    settings: dict[str, Any] = {
        "env_id": env_id,
        "num_envs": 64,
        "num_seeds": members,
        "total_timesteps": 1_000 * log_points,
        "seed": 0,
        "gamma": 0.99,
        "buffer_size": 25_000,
        "batch_size": 64,
        "learning_starts": 500,
        "train_freq": 16,
        "gradient_steps": 1,
        "target_update_interval": 16,
        "tau": 0.02,
        "eval_episodes": 100,
        "hidden_sizes": [128, 128],
        "learning_rate_end": None,
        "name": "dqn",
        "run_dir": str(path),
    } | args
    rng = np.random.default_rng(settings["seed"])
    step = 1_000 * np.arange(1, log_points + 1)
    # How much was learned by each log point, [L, M]: slow, fast, slow.
    learned = 1 / (1 + np.exp(-12 * (step[:, None] / step[-1] - rng.uniform(0.3, 0.5, members))))
    noise = rng.normal(0, 0.01, (log_points, members, *Q_STAR.shape))
    q_values = learned[:, :, None, None] * Q_STAR + noise  # [L, M, X, A]
    returns = -0.4 + learned * (OPTIMAL_RETURN + 0.4)

    table = {
        "charts/episodic_return": returns - 0.05,
        "losses/td_loss": 1e-4 + 1e-2 * learned * (1 - learned),
        "losses/q_value": learned,
        "q/probe_0": q_values[:, :, 0, 0],
        "q/probe_1": q_values[:, :, 0, 1],
    }
    evaluation = {
        "eval/return_mean": returns,
        "eval/return_std": np.full_like(returns, 0.02),
        "eval/q_start": q_values[:, :, 0].max(-1),
        "eval/discounted_return": learned * Q_STAR[0].max(),
        "exact/q_error_max": np.abs(q_values - Q_STAR).max((2, 3)),
        "exact/policy_optimal": (learned > 0.9).astype(float),
    }
    with (path / "metrics.jsonl").open("w") as file:
        for i in range(log_points):
            columns = table | (evaluation if i % 4 == 3 else {})
            row: dict[str, Any] = {"global_step": int(step[i])}
            row |= {name: float(values[i].mean()) for name, values in columns.items()}
            row |= {"charts/epsilon": max(0.05, 1 - 2 * (i + 1) / log_points)}
            row |= {"perf/env_steps_per_s": 1e4 + 100 * (i % 3), "wall_s": 0.1 * (i + 1) ** 1.2}
            if members > 1:
                row["members"] = {name: values[i].tolist() for name, values in columns.items()}
            file.write(json.dumps(row) + "\n")

    member = rng.integers(0, members, episodes).astype(np.int32)
    ended = np.sort(rng.integers(40, step[-1], episodes))
    np.savez(
        path / "episodes.npz",
        global_step=ended,
        episode_return=np.interp(ended, step, returns.mean(1)) + rng.normal(0, 0.05, episodes),
        episode_length=np.full(episodes, 20, np.int32),
        member=member,
        num_dropped=np.array(0),
    )
    write_json(
        path / "config.json",
        {
            "env_id": env_id,
            "env_params": {"n_states": 15, "max_steps": 40},
            "args": settings,
            "derived": {"replay_ratio": 4.0, "rounded": ["learning_starts 500 -> 512"]},
            "software": {"python": "3.12.0", "git_commit": None},
        },
    )
    final = {
        "eval_return_mean": returns[-1],
        "q_error_max": np.abs(q_values - Q_STAR)[-1].max((1, 2)),
    }
    summary: dict[str, Any] = {
        "status": "done",
        "env_id": env_id,
        "seed": settings["seed"],
        "num_seeds": members,
        "global_step": int(step[-1]),
        "num_updates": int(step[-1] - 500) // 16,
        "replay_ratio": 4.0,
        "wall_s": 5.0,
        "env_steps_per_s": 1e4,
        "eval_return_std": 0.02,
        "eval_episodes": 100,
        "optimal_return": OPTIMAL_RETURN if tabular else None,
        "policy_optimal": True if tabular else None,
        **{name: float(values.mean()) for name, values in final.items()},
    }
    if members > 1:
        summary["members"] = [
            {"seed": settings["seed"] + m} | {name: float(v[m]) for name, v in final.items()}
            for m in range(members)
        ]
    write_json(path / "summary.json", summary)

    errors = rng.normal(0, 0.1, (log_points, members, 512)).astype(np.float32)
    diagnostics = {
        "global_step": step,
        "quantile_levels": LEVELS,
        "td_error_quantiles": np.moveaxis(np.quantile(errors, LEVELS, axis=2), 0, 2),
        "td_error_sample": errors[-1],
        "dead_units": np.full((log_points, members), 0.1, np.float32),
        "policy_changes": np.append(
            np.full((1, members), np.nan), rng.random((log_points - 1, members)), axis=0
        ),
        "num_syncs": np.maximum(step - 500, 0) // 16,
    }
    if tabular:
        diagnostics |= {
            "q_values": q_values.astype(np.float32),
            "visits": rng.multinomial(
                1_000, np.append(np.full(14, 1 / 14), 0.0), (log_points, members)
            ),
            "q_star": Q_STAR,
            "terminal": ENV.mdp().terminal.numpy(),
            "optimal_return": np.array(OPTIMAL_RETURN),
        }
    np.savez(path / "diagnostics.npz", **diagnostics)
    return path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes: Any) -> None:
    """Replace entries at the top of a JSON file."""
    write_json(path, json.loads(path.read_text()) | changes)
