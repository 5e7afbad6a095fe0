"""One run of a peer to its goal, in a process of its own; `benchmarks.runs` times it.

    python -m benchmarks.peers.to_goal reference '{"env_id": "LineWorld-v0", "seed": 0}'

Sides are the reference loop, Stable-Baselines3's DQN and the loop in JAX. Each is judged as runs
here are; what only the judge needs is imported after the side's own packages and timed apart. So
nothing but the standard library is imported up here. Prints one JSON line, times in seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gymnasium
    from torch import nn

    from dqn_fast.dqn import QFunction
    from dqn_fast.train import Args

    Env = Callable[[], gymnasium.Env[Any, Any]]
    Judge = Callable[[nn.Module], tuple[bool, float]]


@dataclass
class ToGoal:
    """What a run tells of itself.

    Attributes:
        loop_at: time of day at which set-up was over and compiling or the loop began.
        judge_s: import of what only the judge needs, before that; charged to nobody.
        end_at: time of day at which the goal was met, or the run over.
        compile_s: spent on compiling, after `loop_at`.
        eval_s: spent on evaluations.
        reached: whether the goal was met.
        measure: at the end: largest value error of LineWorld, mean return of CartPole-v1.
        global_step, num_updates: at the end.
    """

    loop_at: float = 0.0
    judge_s: float = 0.0
    end_at: float = 0.0
    compile_s: float = 0.0
    eval_s: float = 0.0
    reached: bool = False
    measure: float | None = None
    global_step: int = 0
    num_updates: int = 0


@dataclass
class Judged:
    """Wraps a judgement so that its time and its verdict are noted.

    Attributes:
        judge: what it is asked, from the network to (goal met, measure).
        told: where it is noted.
    """

    judge: Judge
    told: ToGoal

    def __call__(self, network: nn.Module) -> bool:
        """Whether the network meets the goal."""
        start = time.perf_counter()
        self.told.reached, self.told.measure = self.judge(network)
        self.told.end_at = time.time()
        self.told.eval_s += time.perf_counter() - start
        return self.told.reached


def fresh(sizes: tuple[int, ...]) -> QFunction:
    """Q-values of one member, to be overwritten by `copied`."""
    from dqn_fast.dqn import QFunction
    from dqn_fast.heads import ScalarHead
    from dqn_fast.networks import QNetwork
    from dqn_fast.noise import Noise

    network = QNetwork(sizes)
    return QFunction(network, ScalarHead(), network.init(Noise(0, 1)))


def copied(q_net: QFunction, network: nn.Module) -> QFunction:
    """`q_net`, of one member, with the weights of the linear layers of `network`."""
    import torch
    from torch import nn

    linears = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    given = [tensor for linear in linears for tensor in (linear.weight.T, linear.bias)]
    with torch.no_grad():
        for param, tensor in zip(q_net.parameters(), given, strict=True):
            param[0].copy_(tensor)
    return q_net


def exact_judge(
    env_id: str, env_params: dict[str, Any], gamma: float, sizes: tuple[int, ...]
) -> Judge:
    """Optimal in every state, and the largest value error; see `ExactValues.compare`."""

    from dqn_fast.envs import make_env
    from dqn_fast.exact import solve

    exact = solve(make_env(env_id, env_params), [gamma])
    assert exact is not None
    q_net = fresh(sizes)

    def judge(network: nn.Module) -> tuple[bool, float]:
        known = exact.compare(copied(q_net, network))
        return known["policy_optimal"][0], known["q_error_max"][0]

    return judge


def return_judge(args: Args, sizes: tuple[int, ...]) -> Judge:
    """Whether the mean return of greedy episodes is `stop_at_return`, and that return."""
    import itertools

    import torch

    from dqn_fast.envs import make_env
    from dqn_fast.evaluate import play_episodes
    from dqn_fast.noise import Noise
    from dqn_fast.setup import episodes_on

    env, q_net, least = make_env(args.env_id), fresh(sizes), args.stop_at_return
    assert least is not None
    noise, epoch = Noise(args.seed, 1, torch.device("cpu")), itertools.count()

    def judge(network: nn.Module) -> tuple[bool, float]:
        episodes = episodes_on(env, args)
        played = play_episodes(env, copied(q_net, network), episodes, noise, next(epoch))
        mean = played.episode_return.mean().item()
        return mean >= least, mean

    return judge


# -------------------------------------------------------------------------------------- the sides


def run_reference(settings: dict[str, Any]) -> ToGoal:
    """The scalar loop at its own settings, judged every 100 transitions and gradient steps."""
    import torch

    from benchmarks.reference import ReferenceConfig, train_reference

    imported = time.time()
    from dqn_fast.envs import make_env

    torch.set_num_threads(1)
    env_id, env_params = settings["env_id"], settings.get("env_params", {})
    config = ReferenceConfig(seed=settings["seed"], **make_env(env_id, env_params).params)
    sizes = (config.n_states, *config.hidden_sizes, 2)
    told = ToGoal()
    judged = Judged(exact_judge(env_id, env_params, config.gamma, sizes), told)
    told.loop_at = time.time()
    told.judge_s = told.loop_at - imported
    result = train_reference(
        config,
        max_transitions=settings["total_timesteps"],
        on_check=lambda _, q_net: judged(q_net),
        check_interval=100,
    )
    told.end_at = told.end_at if told.reached else time.time()
    told.global_step, told.num_updates = result.transitions, result.num_updates
    return told


def sb3_cartpole(settings: dict[str, Any]) -> tuple[Args, Env, Judge]:
    """Settings, environment and judge of CartPole-v1: SB3's own tuned settings."""
    import gymnasium

    from benchmarks.comparison import ZOO_CARTPOLE
    from dqn_fast.train import Args

    asked = {name: settings[name] for name in ("seed", "eval_interval", "stop_at_return")}
    args = Args.for_env("CartPole-v1", **{**ZOO_CARTPOLE, **asked})
    judge = return_judge(args, sizes=(4, *args.hidden_sizes, 2))
    return args, lambda: gymnasium.make("CartPole-v1"), judge


def sb3_line_world(settings: dict[str, Any]) -> tuple[Args, Env, Judge]:
    """The same of LineWorld: the settings here, and the reference loop's environment, a copy of
    which costs a fraction of one of tensors."""
    import dataclasses
    from functools import partial

    from benchmarks.peers.sb3_loop import ScalarLineWorld
    from dqn_fast.envs import make_env
    from dqn_fast.train import Args

    args = Args.for_env(**settings)
    params = make_env(args.env_id, args.env_params).params
    # SB3 synchronises once for all gradient steps that it takes in a row.
    block = max(args.train_freq, args.num_envs)
    spacing = max(args.target_update_interval, args.train_freq / args.gradient_steps)
    tau = 1.0 - (1.0 - args.tau) ** (block / spacing)
    judge = exact_judge(
        args.env_id, args.env_params, args.gamma, (params["n_states"], *args.hidden_sizes, 2)
    )
    return (
        dataclasses.replace(args, target_update_interval=block, tau=tau),
        partial(ScalarLineWorld, **params),
        judge,
    )


def run_sb3(settings: dict[str, Any]) -> ToGoal:
    """Stable-Baselines3's DQN, judged between a block of gradient steps and the next step.

    LineWorld is learnt at the settings here; `tau` is raised so that the target network follows at
    the same pace although it is synchronised less often. CartPole-v1 is learnt at SB3's own.
    """
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    imported = time.time()
    import dataclasses

    from benchmarks.peers.sb3 import sb3_settings
    from dqn_fast.plan import crossed
    from dqn_fast.setup import intervals

    torch.set_num_threads(1)
    case = sb3_cartpole if settings["env_id"] == "CartPole-v1" else sb3_line_world
    args, make, judge = case(settings)
    interval = intervals(args)["eval_interval"]
    told = ToGoal(judge_s=time.time() - imported)
    judged = Judged(judge, told)

    class UntilGoal(BaseCallback):
        model: stable_baselines3.DQN
        judged_at = 0

        def _on_rollout_start(self) -> None:
            if crossed(self.judged_at, self.num_timesteps, interval):
                self.judged_at = self.num_timesteps
                if judged(self.model.q_net):
                    told.global_step, told.num_updates = self.num_timesteps, self.model._n_updates

        def _on_step(self) -> bool:
            return not told.reached

    theirs = sb3_settings(dataclasses.replace(args, env_params={}))
    model = stable_baselines3.DQN(env=DummyVecEnv([make] * args.num_envs), **theirs)
    told.loop_at = time.time()
    model.learn(args.total_timesteps, callback=UntilGoal(), log_interval=args.total_timesteps)
    if not told.reached:
        told.end_at = time.time()
        told.global_step, told.num_updates = model.num_timesteps, model._n_updates
    return told


def run_jax(settings: dict[str, Any]) -> ToGoal:
    """The loop in JAX at the settings here; it judges itself as runs here do."""
    import jax.numpy  # noqa: F401

    imported = time.time()
    from benchmarks.peers.jax_dqn import train_jax
    from dqn_fast.train import Args

    args = Args.for_env(**settings)
    told = ToGoal(loop_at=time.time())
    told.judge_s = told.loop_at - imported
    result = train_jax(args)
    last = result["history"][-1]
    told.end_at = told.loop_at + last["wall_s"]
    told.compile_s, told.eval_s = result["startup_s"], result["eval_s"]
    told.reached = result["solved"]
    told.measure = last["q_error_max" if args.stop_when_optimal else "return_mean"]
    told.global_step, told.num_updates = result["global_step"], result["num_updates"]
    return told


SIDES: dict[str, Callable[[dict[str, Any]], ToGoal]] = {
    "reference": run_reference,
    "sb3": run_sb3,
    "jax": run_jax,
}


def main() -> int:
    """Train the side and settings that are named, print one JSON line."""
    side, settings = sys.argv[1:]
    told = SIDES[side](json.loads(settings))
    print(json.dumps(asdict(told)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
