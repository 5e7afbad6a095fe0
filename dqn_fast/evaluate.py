"""Greedy evaluation: `python -m dqn_fast.evaluate RUN_DIR`.

Fresh env copies play the greedy policy. Each copy's first episode counts and no other: counting
the first episodes to finish, whoever finishes them, would favour short ones.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from torch import Tensor

from dqn_fast.checkpoint import AgentFile, load_agent
from dqn_fast.envs import TensorEnv
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise, Stream

_STEPS_PER_CHECK = 32


class Evaluation(NamedTuple):
    """Undiscounted return and length in steps of every episode: float32 and int32 [M, episodes]."""

    episode_return: Tensor
    episode_length: Tensor


@torch.no_grad()
def evaluate(
    env: TensorEnv, q_net: QNetwork, num_episodes: int, noise: Noise, epoch: int = 0
) -> Evaluation:
    """Play `num_episodes` greedy episodes of every member.

    Args:
        env: environment.
        q_net: network of M members.
        num_episodes: episodes of each member, >= 1, played side by side.
        noise: of the same M members.
        epoch: number of this evaluation; another one plays other episodes.

    Returns:
        Results on the network's device.
    """
    copies = (q_net.num_members, num_episodes)

    def draw(stream: Stream, start: int, count: int, dim: int) -> Tensor:
        return noise.uniform(stream, start, count, (num_episodes, dim), epoch).flatten(1, 2)

    vector = env.vector_reset(draw(Stream.EVALUATION_RESET, 0, 1, env.reset_noise_dim)[0])
    episode_return = torch.zeros_like(vector.episode_return)
    episode_length = torch.zeros_like(vector.elapsed)
    for start in range(0, env.max_steps, _STEPS_PER_CHECK):
        count = min(_STEPS_PER_CHECK, env.max_steps - start)
        step_noise = draw(Stream.EVALUATION_STEP, start, count, env.step_noise_dim)
        reset_noise = draw(Stream.EVALUATION_RESET, start + 1, count, env.reset_noise_dim)
        for k in range(count):
            q_values = q_net(env.features(vector.obs.unflatten(0, copies)))
            action = q_values.argmax(-1).flatten()
            vector, outcome = env.vector_step(vector, action, step_noise[k], reset_noise[k])
            first = outcome.done & (episode_length == 0)
            episode_return = torch.where(first, outcome.episode_return, episode_return)
            episode_length = torch.where(first, outcome.episode_length, episode_length)
        if bool((episode_length > 0).all()):
            break
    return Evaluation(episode_return.view(copies), episode_length.view(copies))


@dataclass
class EvaluateArgs:
    """Greedy evaluation of a saved agent."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Directory that a training run wrote."""
    episodes: int = 100
    """Episodes of each member, each on a fresh env copy; >= 1."""
    seed: int = 0
    """Seed of the episodes' randomness; >= 0. Other episodes than those of the training run."""
    agent: AgentFile = "best"
    """Weights to play: best (of the best evaluation during training) or last."""
    device: str = "auto"
    """Where to compute: auto (cuda, then cpu), cpu, cuda, cuda:1, mps."""


def main() -> int:
    """Print a line per member and one JSON line last; returns the exit status."""
    args = tyro.cli(EvaluateArgs)
    try:
        for name, value, least in (("episodes", args.episodes, 1), ("seed", args.seed, 0)):
            if value < least:
                raise ValueError(f"--{name} {value}: must be at least {least}")
        agent = load_agent(args.run_dir, args.agent, device=args.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    device = next(agent.q_net.parameters()).device
    noise = Noise(args.seed, agent.q_net.num_members, device)
    # The training run's own evaluations count their epochs from 0.
    result = evaluate(agent.env, agent.q_net, args.episodes, noise, epoch=2**32 - 1)
    rows = []
    for member in range(agent.q_net.num_members):
        returns, lengths = result.episode_return[member], result.episode_length[member]
        row = {
            "member": member,
            "global_step": agent.global_step[member],
            "return_mean": returns.mean().item(),
            "return_std": returns.std(correction=0).item(),
            "return_min": returns.min().item(),
            "return_max": returns.max().item(),
            "length_mean": lengths.float().mean().item(),
        }
        rows.append(row)
        print(
            f"member {member}: return {row['return_mean']:.5g} +- {row['return_std']:.3g} "
            f"(min {row['return_min']:.5g}, max {row['return_max']:.5g}), "
            f"length {row['length_mean']:.4g} over {args.episodes} episodes"
        )
    summary = {
        "run_dir": str(args.run_dir),
        "agent": args.agent,
        "episodes": args.episodes,
        "members": rows,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
