"""Greedy evaluation: `python -m dqn_fast.evaluate RUN_DIR`, in Python `evaluate(run_dir)`.

Env copies play the greedy policy in rounds. Only the first episode of each copy counts in a round:
the first episodes to finish, over all copies, would favour short ones. Episode i draws the same
random numbers for any number of copies.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.agent import Agent, AgentFile, load_agent, shown
from dqn_fast.ambient import global_numbers, standard_state
from dqn_fast.device import run_conditions, upload
from dqn_fast.dqn import QFunction
from dqn_fast.engines import StopRequested
from dqn_fast.envs import EnvError, TensorEnv
from dqn_fast.envs.spaces import describe_error
from dqn_fast.film import EVALUATION_EPOCH, ready, record
from dqn_fast.memory import check_evaluation, copies_of
from dqn_fast.noise import Noise, Stream
from dqn_fast.process import command
from dqn_fast.settings import at_least, check_settings, check_value, parse
from dqn_fast.sweep import label_of

_STEPS_PER_CHECK = 32
HOST_COPIES = 16
"""Copies of an environment on the host that the command line makes for each member."""


class Evaluation(NamedTuple):
    """Every episode of an evaluation, [M, episodes] each: row i is that of member i.

    Attributes:
        episode_return: undiscounted sum of rewards, float32.
        episode_length: steps, int32.
        discounted_return: sum of gamma^t * reward, float32.
        q_start: max_a Q(s0, a), the network's estimate of the discounted return, float32.
    """

    episode_return: Tensor
    episode_length: Tensor
    discounted_return: Tensor
    q_start: Tensor


def evaluate(
    run_or_agent: Agent | Path | str,
    env: TensorEnv | None = None,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int | None = None,
) -> Evaluation:
    """Play greedy episodes of a trained agent, as `python -m dqn_fast.evaluate` does.

        evaluate("runs/my_run").episode_return.mean()

    Args:
        run_or_agent: directory of a run, whose best agent plays, or an agent of `load_agent`.
        env: the environment, which stays open; None: that of the run or the agent.
        episodes: episodes of each member, >= 1.
        seed: of the episodes, >= 0; they always differ from those of the training run.
        num_envs: env copies that play them, for each member, >= 1; None: one for each episode, but
            on the host at most HOST_COPIES.

    Returns:
        The results on the agent's device.

    Raises:
        ValueError: the run cannot be loaded, see `load_agent`, the environment does not fit, or an
            argument is not allowed; one line.
        EnvError: the environment broke its contract.
    """
    episodes = check_value(EvaluateArgs, "episodes", episodes)
    seed = check_value(EvaluateArgs, "seed", seed)
    num_envs = check_value(EvaluateArgs, "num_envs", num_envs)
    with standard_state(), contextlib.ExitStack() as stack:
        if isinstance(run_or_agent, Agent):
            agent = run_or_agent if env is None else run_or_agent.on(env)
        else:
            agent = load_agent(run_or_agent, env=env)
            if env is None:
                stack.callback(agent.env.close)
        stack.enter_context(run_conditions(1, agent.q_net.device))
        q_net, own = agent.q_net, agent.env
        copies = copies_of(own.on_host, episodes, HOST_COPIES, num_envs)
        hidden = tuple(q_net.network.sizes[1:-1])
        name = "--num-envs" if num_envs else "--episodes"
        check_evaluation(own, q_net.num_members, copies, hidden, q_net.device, name)
        noise = Noise(seed, q_net.num_members, q_net.device)
        return play_episodes(
            own.for_evaluation(), q_net, episodes, noise, EVALUATION_EPOCH, num_copies=copies
        )


@torch.no_grad()
def play_episodes(
    env: TensorEnv,
    q_net: QFunction,
    num_episodes: int,
    noise: Noise,
    epoch: int = 0,
    gamma: float | NDArray[np.float64] = 1.0,
    should_stop: Callable[[], bool] = lambda: False,
    num_copies: int | None = None,
) -> Evaluation:
    """Play `num_episodes` greedy episodes of every member.

    The episodes do not depend on `num_copies`, if a seed determines an episode: not with a
    VectorEnv that takes one seed for all copies, or where an episode depends on the one before.
    The process's own random numbers follow `noise.seed` and `epoch`, and are as before afterwards.

    Args:
        env: environment.
        q_net: Q-values of M members.
        num_episodes: episodes of each member, >= 1.
        noise: of the same M members.
        epoch: number of this evaluation; each number gives different episodes.
        gamma: discount of `discounted_return`, a number or one per member, [M].
        should_stop: asked every few steps.
        num_copies: env copies of each member, >= 1; None: one for each episode.

    Returns:
        Results on the network's device.

    Raises:
        StopRequested: `should_stop` returned true.
    """
    copies = num_copies or num_episodes
    with env.evaluating(), global_numbers(noise.seed, 1, epoch):
        rounds = [
            _play_round(env, q_net, first, copies, num_episodes, noise, epoch, gamma, should_stop)
            for first in range(0, num_episodes, copies)
        ]
    return Evaluation(
        *(torch.cat(parts, 1)[:, :num_episodes] for parts in zip(*rounds, strict=True))
    )


def _play_round(
    env: TensorEnv,
    q_net: QFunction,
    first: int,
    num_copies: int,
    num_episodes: int,
    noise: Noise,
    epoch: int,
    gamma: float | NDArray[np.float64],
    should_stop: Callable[[], bool],
) -> Evaluation:
    """Episodes first .. first + num_copies - 1 of every member; those from `num_episodes` on need
    not end. Other arguments and results as `play_episodes`."""
    copies = (q_net.num_members, num_copies)
    needed = num_episodes - first

    def draw(stream: Stream, start: int, count: int, dim: int) -> Tensor:
        drawn = noise.uniform(stream, start, count, (num_copies, dim), epoch, skip=first * dim)
        return drawn.flatten(1, 2)

    def q_values(obs: Tensor) -> Tensor:
        return q_net(env.features(obs.view(*copies, *obs.shape[1:])))  # [M, copies, A]

    vector = env.vector_reset(draw(Stream.EVALUATION_RESET, 0, 1, env.reset_noise_dim)[0])
    q = q_values(vector.obs)
    q_start = q.amax(-1)
    episode_return = torch.zeros_like(vector.episode_return)
    episode_length = torch.zeros_like(vector.elapsed)
    discounted_return = torch.zeros_like(vector.episode_return)
    gammas = np.broadcast_to(np.asarray(gamma, np.float64), (copies[0],))
    for start in range(0, env.max_steps, _STEPS_PER_CHECK):
        if should_stop():
            raise StopRequested
        count = min(_STEPS_PER_CHECK, env.max_steps - start)
        step_noise = draw(Stream.EVALUATION_STEP, start, count, env.step_noise_dim)
        reset_noise = draw(Stream.EVALUATION_RESET, start + 1, count, env.reset_noise_dim)
        powers = gammas ** np.arange(start, start + count)[:, None]  # [count, M]
        discount = upload(torch.from_numpy(powers.astype(np.float32)), q.device)
        discount = discount[..., None].expand(-1, *copies).flatten(1)
        for k in range(count):
            action = q.argmax(-1).flatten()
            vector, outcome = env.vector_step(vector, action, step_noise[k], reset_noise[k])
            running = episode_length == 0
            ends = outcome.done & running
            episode_return = torch.where(ends, outcome.episode_return, episode_return)
            episode_length = torch.where(ends, outcome.episode_length, episode_length)
            discounted_return += discount[k] * outcome.reward * running
            if env.on_host and bool((episode_length.view(copies)[:, :needed] > 0).all()):
                break  # a further step may be dear
            q = q_values(vector.obs)
        if bool((episode_length.view(copies)[:, :needed] > 0).all()):
            break
    return Evaluation(
        episode_return.view(copies),
        episode_length.view(copies),
        discounted_return.view(copies),
        q_start,
    )


@torch.no_grad()
def q_probe(q_net: QFunction, features: Tensor) -> dict[str, Tensor]:
    """Q-values of one start state as metrics, [M] each; features [M, 1, F]."""
    q_values = q_net(features)[:, 0].unbind(-1)
    return {f"q/probe_{action}": values for action, values in enumerate(q_values)}


@dataclass
class EvaluateArgs:
    """Greedy evaluation of a saved agent."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Directory that a training run wrote."""
    episodes: Annotated[int, at_least(1)] = 100
    """Episodes of each member."""
    num_envs: Annotated[int | None, at_least(1)] = None
    """Copies of the environment that play them, for each member. None: one for each episode, but on
    the host at most 16."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the episodes; they always differ from those of the training run."""
    agent: AgentFile = "best"
    """Weights to play: best (of the best evaluation during training) or last."""
    env_id: str | None = None
    """Name of the environment. Only needed where the run's own is of another module, MODULE:ID,
    which is imported only if you name it."""
    env: str | None = None
    """Callable that makes the environment, module:callable, in place of an id. Needed where a
    callable or a Python program has made the run's own."""
    wrappers: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="[MODULE:WRAPPER[,NAME=VALUE] ...]")
    ] = None
    """Wrappers around the environment, the first one innermost. Needed where the run has any."""
    env_params: Annotated[
        dict[str, str | int | float | bool], tyro.conf.arg(metavar="[NAME VALUE ...]")
    ] = field(default_factory=dict)
    """Parameters of the environment in place of the run's own, as pairs. Those that may name a file
    or a module are used only if you name them."""
    device: str = "auto"
    """Device: auto (cuda, then cpu), cpu, cuda, cuda:1, mps, or part of a card's name."""
    video: Path | None = None
    """Film to write of the best member's first episodes, .gif or .mp4; needs the extra:
    pip install -e ".[video]"."""
    video_episodes: Annotated[int, at_least(1)] = 1
    """Episodes in the film."""
    video_steps: Annotated[int, at_least(1)] = 500
    """Maximum number of steps of each episode in the film."""


@command()
def main() -> int:
    """Print one line per member, then one JSON line; returns the exit status."""
    try:
        args = check_settings(parse(EvaluateArgs))
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", RuntimeWarning)
            agent = load_agent(
                args.run_dir,
                args.agent,
                env=args.env,
                device=args.device,
                env_id=args.env_id,
                env_params=args.env_params,
                wrappers=args.wrappers,
            )
        for warned in notes:
            print(f"note: {warned.message}", file=sys.stderr)
        if args.env_id is not None and args.env_id != agent.env_id:
            named = f"note: the run is of {shown(agent.env_id)}, and plays {args.env_id} here"
            print(named, file=sys.stderr)
        draws = ready(agent, args.video) if args.video else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    with contextlib.ExitStack() as stack:  # to close a copy may end the library that draws others
        if draws:
            stack.callback(draws.close)
        stack.callback(agent.env.for_evaluation().close)
        try:
            result = evaluate(agent, None, args.episodes, args.seed, args.num_envs)
        except (EnvError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1 if isinstance(error, EnvError) else 2
        summary = print_result(args, agent, result)
        if args.video and draws:
            sizes = args.video_episodes, args.seed, args.video_steps
            try:
                count = record(agent, draws, args.video, *sizes)
            except Exception as error:
                reason = getattr(error, "strerror", None)
                if reason is None:
                    reason = error if isinstance(error, ValueError) else describe_error(error)
                print(f"error: --video {args.video}: {reason}", file=sys.stderr)
                return 2
            print(f"film of member {agent.member}: {args.video} ({count} pictures)")
    print(json.dumps(summary))
    return 0


def print_result(args: EvaluateArgs, agent: Agent, result: Evaluation) -> dict[str, Any]:
    """Print one line per member; returns the JSON values."""
    rows = []
    for member in range(agent.q_net.num_members):
        returns, lengths = result.episode_return[member], result.episode_length[member]
        row = {
            "member": member,
            **agent.members[member],
            "global_step": agent.global_step[member],
            "return_mean": returns.mean().item(),
            "return_std": returns.std(correction=0).item(),
            "return_min": returns.min().item(),
            "return_max": returns.max().item(),
            "length_mean": lengths.float().mean().item(),
        }
        rows.append(row)
        own = f" ({label})" if (label := label_of(agent.members[member])) else ""
        print(
            f"member {member}{own}: return {row['return_mean']:.5g} +- {row['return_std']:.3g} "
            f"(min {row['return_min']:.5g}, max {row['return_max']:.5g}), "
            f"length {row['length_mean']:.4g} over {args.episodes} episodes"
        )
    return {
        "run_dir": str(args.run_dir),
        "agent": args.agent,
        "episodes": args.episodes,
        "members": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
