"""Train a DQN whose environments, replay and learner live on one device.

    python -m dqn_fast.train --num-envs 64

Read it top to bottom: the settings; what is carried from step to step; one vector step in four
functions (act, step the environments, store, learn); a chunk of vector steps; the loop. What a
researcher edits to change the experiment stands here, everything else in the files it names.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.agent import (
    ADAM_BETAS,
    Adam,
    LossName,
    UpdateSchedule,
    epsilon_greedy,
    held_epsilon_greedy,
    update_,
)
from dqn_fast.describe import describe
from dqn_fast.device import MatmulPrecision, choose_device, run_conditions, upload
from dqn_fast.diagnostics import Diagnostics
from dqn_fast.engine import (
    RECORDED_STEPS,
    Captured,
    Choice,
    Compiler,
    CudaGraphs,
    EngineName,
    EngineUnavailableError,
    Run,
    Unit,
    choose_engine,
    first_line,
    leaves,
    without_compiler,
)
from dqn_fast.envs import (
    EnvCheckError,
    EnvError,
    Outcome,
    TensorEnv,
    VectorizationMode,
    VectorState,
    check_env,
    make_env,
)
from dqn_fast.envs.params import plain
from dqn_fast.evaluate import evaluate, q_probe, solve
from dqn_fast.experiments import experiment
from dqn_fast.memory import check_memory, fits
from dqn_fast.metrics import UPDATE_METRICS, ChunkRecord, Metrics
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise, Stream
from dqn_fast.replay import Replay, Transition
from dqn_fast.run import (
    Interruption,
    RunRecord,
    TrainingError,
    UsageError,
    create_run_dir,
)
from dqn_fast.schedule import Chunk, Plan, linear_schedule

# ------------------------------------------------------------------------------------ settings


@dataclass
class Args:
    """Train a DQN with many environments per step.

    Steps, intervals and frequencies count environment transitions of one member, whatever
    --num-envs is; they take effect at the next vector step, so at most --num-envs late. For every
    interval 0 means off.
    """

    # Experiment
    env_id: str = "LineWorld-v0"
    """Environment: one of tensors where there is one, else any that Gymnasium knows; gym:ID takes
    Gymnasium's own in any case. What the other flags default to depends on it."""
    env_params: Annotated[
        dict[str, str | int | float | bool], tyro.conf.arg(metavar="[NAME VALUE ...]")
    ] = field(default_factory=dict)
    """Parameters of the environment, as pairs: --env-params n_states 31 slip_prob 0.1."""
    vectorization_mode: VectorizationMode = "sync"
    """How the copies of an environment that is not made of tensors are stepped: sync, one after
    the other; async, in a process each, beside the learner; vector_entry_point, by its own
    vector version."""
    num_envs: int = 64
    """Copies of the environment that step together, for each member; >= 1."""
    num_seeds: int = 1
    """Members: independent agents with seeds seed, seed + 1, ... trained side by side; >= 1."""
    total_timesteps: int = 65_536
    """Length of the run in transitions, >= 1; rounded up to a multiple of num_envs."""
    seed: int = 0
    """Seed of the first member; >= 0."""

    # Algorithm
    gamma: float = 0.99
    """Discount per environment step; in [0, 1]."""
    learning_rate: float = 1e-3
    """Adam's step size at the start; > 0."""
    learning_rate_end: float | None = 0.0
    """Step size at the end of the run, reached linearly; >= 0. None: constant."""
    buffer_size: int = 25_000
    """Transitions that the replay memory of a member holds; >= num_envs and >= batch_size."""
    batch_size: int = 64
    """Transitions of a member sampled for one gradient step; >= 1."""
    learning_starts: int = 500
    """Transitions before the first gradient step; >= 0."""
    train_freq: int = 16
    """Transitions for which gradient_steps gradient steps are taken; >= 1."""
    gradient_steps: int = 1
    """Gradient steps per train_freq transitions; >= 0. The replay ratio, sampled transitions per
    collected one, is gradient_steps * batch_size / train_freq."""
    target_update_interval: int = 16
    """Transitions between synchronisations of the target network; >= 0."""
    tau: float = 0.02
    """Weight of the online network in a synchronisation; in (0, 1], 1 is a hard copy."""
    eps_start: float = 1.0
    """Probability of a random action at the start; in [0, 1]."""
    eps_end: float = 0.05
    """Probability of a random action once the decay is over; in [0, 1]."""
    eps_fraction: float = 0.5
    """Fraction of total_timesteps over which it decays linearly; in [0, 1], 0 is eps_end from the
    start."""
    eps_repeat: float = 0.0
    """Probability that a random action is carried out for one step more; in [0, 1). It then lasts
    1 / (1 - eps_repeat) steps on average, which explores where single steps lead nowhere."""
    max_grad_norm: float = 10.0
    """Global norm to which the gradients of a member are clipped; > 0, inf for no clipping."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers; each >= 1."""
    double_q: bool = False
    """Double DQN: the online network chooses the successor's action, the target network judges
    it. Lowers the overestimation that plain DQN suffers from, for one more forward pass."""
    loss: LossName = "huber"
    """Loss of the TD error: huber (smooth L1, beta 1) or squared."""

    # Execution
    device: str = "auto"
    """Where everything lives: auto (cuda, then cpu), cpu, cuda, cuda:1, mps, or a part of a card's
    name, such as h100."""
    engine: EngineName = "auto"
    """How a chunk of vector steps is run: eager; compile, once for the shapes of this run (30 to
    40 s, kept for the next run); graph, captured in CUDA graphs. auto weighs the gradient steps to
    come against the time to compile and says what it chose. Results agree but for rounding."""
    chunk_steps: int = 256
    """Vector steps per chunk at most, >= 1; never changes the result."""
    num_threads: int = 1
    """CPU threads; >= 0, 0 leaves torch's own choice. Small networks are fastest on one."""
    matmul_precision: MatmulPrecision = "highest"
    """Float32 matrix products on a GPU: highest, in float32; high, in TF32, with 10 bits of
    mantissa instead of 23, where the card has it. A CPU multiplies in float32 either way."""

    # Records
    name: str = "dqn"
    """Name of the experiment, part of the run directory's name."""
    run_dir: Path | None = None
    """Directory to write, new or empty. None: runs/<env>__<name>__s<seed>__<UTC time>."""
    log_interval: int | None = None
    """Transitions between log points; >= 0. None: a 50th of the run, at most 2,048 vector steps."""
    eval_interval: int | None = None
    """Transitions between greedy evaluations; >= 0. None: a 16th of the run, at most 8,192 vector
    steps. The end of the run is always evaluated."""
    eval_episodes: int = 100
    """Episodes of each member per evaluation; >= 1."""
    stop_at_return: float | None = None
    """End the run at the first evaluation in which every member's mean return is at least this."""
    stop_when_optimal: bool = False
    """End the run at the first evaluation in which every member's policy is optimal and its values
    are within 0.05 of the exact ones; for environments that can be solved exactly."""
    checkpoint_interval: int | None = None
    """Transitions between checkpoints; >= 0. None: a quarter of the run, at most 131,072 vector
    steps. The end of the run is always saved."""
    report: bool = True
    """Write report.html at the end of the run, and agent.gif where the agent can be filmed (needs
    the extra: pip install -e ".[video]")."""
    quiet: bool = False
    """Print nothing but warnings and errors."""
    track: bool = False
    """Log to wandb as well; offline where it cannot be reached."""
    wandb_project: str = "dqn_fast"
    """Project in wandb."""
    wandb_entity: str | None = None
    """User or team in wandb. None: the account's default."""
    wandb_group: str | None = None
    """Group of runs in wandb. None: the run's name."""
    wandb_tags: tuple[str, ...] = ()
    """Tags in wandb."""
    wandb_mode: Literal["online", "offline"] | None = None
    """None: WANDB_MODE if set, else online where the server answers and a key is configured."""
    tensorboard: bool = False
    """Log to TensorBoard as well; needs the extra: pip install -e ".[tensorboard]"."""

    @classmethod
    def for_env(cls, env_id: str, **settings: Any) -> Args:
        """Settings that work for an environment: its `experiment`, with `settings` over it."""
        table = {k: v for k, v in experiment(env_id).items() if k != "env_params"}
        return cls(**{**table, "env_id": env_id, **settings})


INTERVALS = {
    "log_interval": (50, 2_048),
    "eval_interval": (16, 8_192),
    "checkpoint_interval": (4, 131_072),
}
"""How many of each a run has where its interval is not set, and the most vector steps between two.
In proportion to the run, because a log point costs 1 to 2 ms and a checkpoint 10: so they stay
below 5 % of the loop, or 0.1 s where the run is short."""


def intervals(args: Args) -> dict[str, int]:
    """Transitions between log points, evaluations and checkpoints; they follow from the settings
    alone, so two runs have the same."""
    chosen: dict[str, int] = {}
    for name, (number, most_steps) in INTERVALS.items():
        steps = min(args.total_timesteps // (number * args.num_envs), most_steps)
        asked = getattr(args, name)
        chosen[name] = max(steps, 1) * args.num_envs if asked is None else asked
    return chosen


def check(args: Args) -> None:
    """Raise UsageError for the first setting that makes no sense."""

    def need(ok: bool, name: str, allowed: str) -> None:
        if not ok:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}: must be {allowed}")

    for name in ("num_envs", "num_seeds", "total_timesteps", "buffer_size", "batch_size"):
        need(getattr(args, name) >= 1, name, "at least 1")
    for name in ("train_freq", "eval_episodes", "chunk_steps"):
        need(getattr(args, name) >= 1, name, "at least 1")
    for name in ("seed", "learning_starts", "gradient_steps", "num_threads"):
        need(getattr(args, name) >= 0, name, "at least 0")
    for name in ("target_update_interval", *INTERVALS):
        need((getattr(args, name) or 0) >= 0, name, "at least 0 (0: off)")
    for name in ("gamma", "eps_start", "eps_end", "eps_fraction"):
        need(0.0 <= getattr(args, name) <= 1.0, name, "in [0, 1]")
    need(0.0 <= args.eps_repeat < 1.0, "eps_repeat", "in [0, 1)")
    need(0.0 < args.tau <= 1.0, "tau", "in (0, 1]")
    need(0.0 < args.learning_rate < math.inf, "learning_rate", "above 0 and finite")
    end = args.learning_rate_end
    need(end is None or 0.0 <= end < math.inf, "learning_rate_end", "at least 0 and finite")
    need(args.max_grad_norm > 0.0, "max_grad_norm", "above 0")
    need(all(size >= 1 for size in args.hidden_sizes), "hidden_sizes", "at least 1 each")
    need(
        args.buffer_size >= args.num_envs,
        "buffer_size",
        f"at least --num-envs {args.num_envs}, one vector step",
    )
    most = min(args.buffer_size, -(-args.total_timesteps // args.num_envs) * args.num_envs)
    need(args.batch_size <= most, "batch_size", f"at most {most}, what replay can ever hold")
    need(
        args.stop_at_return is None or math.isfinite(args.stop_at_return),
        "stop_at_return",
        "a finite number",
    )
    need(
        args.eval_interval != 0 or (args.stop_at_return is None and not args.stop_when_optimal),
        "eval_interval",
        "above 0 with --stop-at-return or --stop-when-optimal, which act at evaluations",
    )
    need(args.name != "" and "/" not in args.name, "name", "a name without /")


# ------------------------------------------------- what is carried, and what comes in as data


@dataclass
class Learner:
    """All that is carried from vector step to vector step; M members, E = M * N env copies.

    Every tensor in it keeps its address and is written in place, in `vector_step_` and the
    functions that it calls.

    Attributes:
        copies: (M, N).
        gamma: [M, 1] float32.
        max_grad_norm: [M, 1] float32.
        held: random action that each copy is carrying out, int64 [M, N], -1 where there is none;
            None: they last one step.
        eps_repeat: [] float32.
    """

    env: TensorEnv
    copies: tuple[int, int]
    q_net: QNetwork
    target_net: QNetwork
    adam: Adam
    vector: VectorState
    replay: Replay
    gamma: Tensor
    max_grad_norm: Tensor
    held: Tensor | None
    eps_repeat: Tensor
    loss: LossName
    double_q: bool

    def by_member(self, tensor: Tensor) -> Tensor:
        """[E, ...] as [M, N, ...]."""
        return tensor.view(*self.copies, *tensor.shape[1:])

    def tensors(self) -> list[Tensor]:
        """Every tensor that a vector step reads or writes beside its inputs."""
        return leaves(
            [
                self.q_net.params,
                self.target_net.params,
                self.adam,
                self.vector,
                self.replay.tensors(),
                self.gamma,
                self.max_grad_norm,
                self.held,
                self.eps_repeat,
            ]
        )

    def with_tensors(self, tensors: Sequence[Tensor]) -> Learner:
        """The same learner over other tensors, in the order of `tensors`."""
        replaced = {id(old): new for old, new in zip(self.tensors(), tensors, strict=True)}
        return copy.deepcopy(self, {id(self.env): self.env, **replaced})

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as tensors in dicts and lists."""
        return {
            "q_net": self.q_net.state_dict(),
            "target_net": self.target_net.state_dict(),
            "adam": {"mean": self.adam.mean, "square": self.adam.square},
            "vector": self.vector.leaves(),
            "replay": self.replay.state_dict(),
            "held": self.held,
        }


class StepInputs(NamedTuple):
    """Noise and schedule of the vector steps of a chunk, K in front.

    Attributes:
        explore: uniform, float32 [K, M, N, 2]: coin and random action.
        env_step: uniform, float32 [K, E, step_noise_dim].
        env_reset: uniform, float32 [K, E, reset_noise_dim].
        epsilon: float32 [K].
    """

    explore: Tensor
    env_step: Tensor
    env_reset: Tensor
    epsilon: Tensor


class UpdateInputs(NamedTuple):
    """Noise and schedules of the gradient steps of a chunk, U in front.

    Attributes:
        rows: which replay rows, int64 [U, M, B] in [0, 2**63).
        step_size, root_scale, sync: float32 [U]; see `UpdateSchedule`.
    """

    rows: Tensor
    step_size: Tensor
    root_scale: Tensor
    sync: Tensor


def make_learner(args: Args, env: TensorEnv, noise: Noise) -> Learner:
    """Fresh networks, env copies and an empty replay on the device of `noise`."""
    device, copies = noise.device, (args.num_seeds, args.num_envs)
    reset_noise = noise.uniform(Stream.ENV_RESET, 0, 1, (args.num_envs, env.reset_noise_dim))[0]
    # Memory of its own for each tensor: all are written in place, and a reset may give one twice.
    vector = env.vector_reset(reset_noise.flatten(0, 1)).clone()
    num_features = env.features(vector.obs[:1]).shape[-1]
    sizes = (num_features, *args.hidden_sizes, env.num_actions)
    q_net = QNetwork(sizes, args.num_seeds, device).init_(noise)
    target_net = QNetwork(sizes, args.num_seeds, device)
    target_net.load_state_dict(q_net.state_dict())
    target_net.requires_grad_(False)
    obs = vector.obs.unflatten(0, copies)
    scalar = torch.zeros(copies, device=device)
    example = Transition(obs, scalar.long(), scalar, obs, scalar.bool())
    try:
        replay = Replay(args.buffer_size, example, env.num_actions)
    except (RuntimeError, TypeError) as error:  # what allocators raise; TypeError: beyond int64
        raise UsageError(
            f"--buffer-size {args.buffer_size}: must be smaller, the memory of {device} does not "
            "hold so many transitions"
        ) from error
    return Learner(
        env=env,
        copies=copies,
        q_net=q_net,
        target_net=target_net,
        adam=Adam.zeros(q_net.params),
        vector=vector,
        replay=replay,
        gamma=torch.full((args.num_seeds, 1), args.gamma, device=device),
        max_grad_norm=torch.full((args.num_seeds, 1), args.max_grad_norm, device=device),
        held=torch.full(copies, -1, device=device) if args.eps_repeat else None,
        eps_repeat=torch.tensor(args.eps_repeat, device=device),
        loss=args.loss,
        double_q=args.double_q,
    )


def epsilon(args: Args, step: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Probability of a random action at global_step `step`."""
    duration = int(args.eps_fraction * args.total_timesteps)
    return linear_schedule(step, args.eps_start, args.eps_end, duration)


def draw_noise(
    args: Args,
    env: TensorEnv,
    noise: Noise,
    num_steps: int,
    num_updates: int,
    first_step: int | Tensor,
    first_update: int | Tensor,
) -> tuple[Tensor, ...]:
    """Everything random in vector steps first_step .. and gradient steps first_update ..:
    explore, env_step and env_reset of `StepInputs`, rows of `UpdateInputs`."""
    n = args.num_envs
    uniform = partial(noise.uniform, count=num_steps)
    return (
        uniform(Stream.EXPLORATION, first_step, shape=(n, 2)),
        uniform(Stream.ENV_STEP, first_step, shape=(n, env.step_noise_dim)).flatten(1, 2),
        uniform(Stream.ENV_RESET, first_step + 1, shape=(n, env.reset_noise_dim)).flatten(1, 2),
        noise.integers(Stream.REPLAY, first_update, num_updates, (args.batch_size,)),
    )


DrawNoise = Callable[..., tuple[Tensor, ...]]
"""`draw_noise` or what stands for it."""


def planned(
    args: Args, env: TensorEnv, noise: Noise, plan: Plan, draw_noise: DrawNoise = draw_noise
) -> Iterator[tuple[Chunk, StepInputs, UpdateInputs]]:
    """The run's chunks, each with everything random and everything scheduled in it."""
    drawn = None
    for window, chunk in plan.chunks():
        if window is not drawn:
            drawn, (steps, updates) = window, draw_inputs(args, env, noise, window, draw_noise)
        k, u = chunk.within(window)
        yield chunk, StepInputs(*(t[k] for t in steps)), UpdateInputs(*(t[u] for t in updates))


def draw_inputs(
    args: Args, env: TensorEnv, noise: Noise, chunk: Chunk, draw_noise: DrawNoise = draw_noise
) -> tuple[StepInputs, UpdateInputs]:
    """Noise and schedules of `chunk`, as tensors on the device."""
    count, first = chunk.num_steps, (chunk.before // args.num_envs, chunk.first_update)
    explore, env_step, env_reset, rows = draw_noise(
        args, env, noise, count, chunk.num_updates, *first
    )

    end = args.learning_rate if args.learning_rate_end is None else args.learning_rate_end
    rate = linear_schedule(chunk.stamps, args.learning_rate, end, args.total_timesteps)
    t = chunk.first_update + np.arange(1, chunk.num_updates + 1)
    step_size = rate / (1.0 - ADAM_BETAS[0] ** t)
    root_scale = 1.0 / np.sqrt(1.0 - ADAM_BETAS[1] ** t)
    sync = np.where(chunk.syncs, args.tau, 0.0)

    packed = np.concatenate([epsilon(args, chunk.steps), step_size, root_scale, sync]).astype(
        np.float32
    )
    u = chunk.num_updates
    schedules = upload(torch.from_numpy(packed), noise.device).split([count, u, u, u])
    steps = StepInputs(explore, env_step, env_reset, schedules[0])
    return steps, UpdateInputs(rows, *schedules[1:])


# ------------------------------------------------------------- one vector step, four functions


ACT_BLOCK, MOST_BLOCKS = 1_024, 16
"""Copies whose values a CPU computes at a time, so that what lies between two layers stays in its
cache: 11 ms instead of 33 for 16,384 copies. More blocks would make what is compiled too long."""


def q_of_copies(learner: Learner) -> Tensor:
    """Q-values of what the env copies show, float32 [M, N, A]."""
    obs = learner.by_member(learner.vector.obs)
    size = learner.copies[1]
    if obs.device.type == "cpu":
        size = max(min(size, ACT_BLOCK), -(-size // MOST_BLOCKS))
    values = [learner.q_net(learner.env.features(block)) for block in obs.split(size, 1)]
    return values[0] if len(values) == 1 else torch.cat(values, 1)


@torch.no_grad()
def act_(learner: Learner, noise: Tensor, epsilon: Tensor) -> Tensor:
    """Epsilon-greedy actions of all copies, int64 [E]; noise [M, N, 2], epsilon []."""
    q_values = q_of_copies(learner)
    if learner.held is None:
        return epsilon_greedy(q_values, noise, epsilon).flatten()
    # An episode that has just begun goes on with nothing.
    held = torch.where(learner.by_member(learner.vector.elapsed) > 0, learner.held, -1)
    action, held = held_epsilon_greedy(q_values, noise, epsilon, held, learner.eps_repeat)
    learner.held.copy_(held)
    return action.flatten()


@torch.no_grad()
def step_envs(
    learner: Learner, action: Tensor, step_noise: Tensor, reset_noise: Tensor
) -> tuple[VectorState, Outcome]:
    """One step of all copies; see `TensorEnv.vector_step`."""
    try:
        return learner.env.vector_step(learner.vector, action, step_noise, reset_noise)
    except EnvError:
        raise
    except Exception as error:
        raise EnvError(f"{type(learner.env).__name__}: {type(error).__name__}: {error}") from error


def store_(learner: Learner, action: Tensor, outcome: Outcome) -> None:
    """Write the transitions that start at `learner.vector` into replay."""
    batch = Transition(
        learner.vector.obs, action, outcome.reward, outcome.next_obs, outcome.terminated
    )
    valid = None if outcome.valid is None else learner.by_member(outcome.valid)
    learner.replay.add_(Transition(*map(learner.by_member, batch)), valid)


def learn_(learner: Learner, inputs: list[UpdateInputs]) -> list[Tensor]:
    """Take gradient steps; UPDATE_METRICS of each, float32 [4, M]."""
    env, metrics = learner.env, []
    for rows, *schedule in inputs:
        batch = learner.replay.sample(rows)
        batch = batch._replace(obs=env.features(batch.obs), next_obs=env.features(batch.next_obs))
        metrics.append(
            update_(
                learner.q_net,
                learner.target_net,
                learner.adam,
                batch,
                learner.gamma,
                learner.max_grad_norm,
                learner.loss,
                learner.double_q,
                UpdateSchedule(*schedule),
            )
        )
    return metrics


class StepRecord(NamedTuple):
    """What one vector step leaves behind for the log.

    Attributes:
        episode_return: return of each copy's episode up to and with this step, float32 [E].
        episode_length: its length where it is over, 0 elsewhere, int32 [E].
        updates: UPDATE_METRICS of each gradient step, float32 [4, M].
    """

    episode_return: Tensor
    episode_length: Tensor
    updates: list[Tensor]


def vector_step_(
    learner: Learner,
    noise: StepInputs,
    updates: list[UpdateInputs],
    act_: Callable[..., Tensor] = act_,
    learn_: Callable[..., list[Tensor]] = learn_,
) -> StepRecord:
    """Act, step the environments, store, learn, and carry the state over."""
    metrics = []
    action = act_(learner, noise.explore, noise.epsilon)
    if learner.env.background:  # learn while they step, from what was stored before
        learner.env.send(action)
        metrics = learn_(learner, updates)
    vector, outcome = step_envs(learner, action, noise.env_step, noise.env_reset)
    store_(learner, action, outcome)
    if not learner.env.background:
        metrics = learn_(learner, updates)
    learner.vector.copy_(vector)
    length = torch.where(outcome.done, outcome.episode_length, 0)
    return StepRecord(outcome.episode_return, length, metrics)


def chunk_(
    learner: Learner,
    steps: StepInputs,
    updates: UpdateInputs,
    update_counts: tuple[int, ...],
    step_: Callable[[Learner, StepInputs, list[UpdateInputs]], StepRecord] = vector_step_,
) -> ChunkRecord:
    """K vector steps, each followed by its number of gradient steps; reads nothing on the host."""
    each_update = (UpdateInputs(*inputs) for inputs in zip(*updates, strict=True))
    records = [
        step_(learner, StepInputs(*step), list(itertools.islice(each_update, count)))
        for step, count in zip(zip(*steps, strict=True), update_counts, strict=True)
    ]
    metrics = [update for record in records for update in record.updates]
    no_updates = updates.rows.new_empty((0, 4, learner.copies[0]), dtype=torch.float32)
    return ChunkRecord(
        torch.stack([record.episode_return for record in records]).unflatten(1, learner.copies),
        torch.stack([record.episode_length for record in records]).unflatten(1, learner.copies),
        torch.stack(metrics) if metrics else no_updates,
    )


# ------------------------------------------------------------------ the same functions, compiled


class Rows:
    """Tensors [K, ...] and their rows, for as large a K as was asked for so far.

    On a CPU they stay in memory, because to make a view costs as much as a small operation, 1 us.
    Elsewhere every call makes new ones: recorded chunks must share none, and are not slowed down.
    """

    def __init__(self, example: Sequence[Tensor]) -> None:
        """`example`: a row of each tensor."""
        self._example, self._kept = example, example[0].device.type == "cpu"
        self._tensors: list[Tensor] = []
        self._rows: list[tuple[Tensor, ...]] = []

    def room(self, count: int) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Tensors of `count` rows that hold anything, and the rows."""
        if not self._kept or not self._tensors or count > len(self._rows):
            self._tensors = [t.new_empty((count, *t.shape)) for t in self._example]
            self._rows = list(zip(*self._tensors, strict=True))
        return [tensor[:count] for tensor in self._tensors], self._rows

    def filled(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The rows of a copy of `tensors`."""
        room, rows = self.room(len(tensors[0]))
        for kept, tensor in zip(room, tensors, strict=True):
            kept.copy_(tensor)
        return rows


class CompiledChunk:
    """Stands for `chunk_` of one learner, its vector steps compiled, one call each, and for
    `draw_noise`.

    A vector step and the gradient step after it are one function; where more gradient steps follow,
    one function is the vector step and one a gradient step; where the environment lives on the
    host, one is `act_` and one a gradient step. Several gradient steps in one function would each
    write new tensors instead of the old ones: 8 took 215 us each, 1 takes 190.
    """

    def __init__(self, args: Args, learner: Learner, plan: Plan, noise: Noise) -> None:
        """Begin to compile, in a process beside this one.

        Raises:
            EngineUnavailableError: the functions cannot be traced.
        """
        self._compiler = Compiler(learner.tensors(), learner.with_tensors)
        step, update = example_step_inputs(learner), example_update_inputs(learner, args.batch_size)
        copies = torch.zeros(learner.vector.elapsed.shape, device=update.rows.device)
        metrics = copies.new_zeros(len(UPDATE_METRICS), learner.copies[0])
        counts = plan.learning_counts()
        units = []
        if learner.env.on_host:
            units += [Unit("act", act_, (step.explore, step.epsilon), copies.long())]
        else:
            for n in sorted({int(count == 1) for count in counts}):
                record = StepRecord(copies, copies.int(), [metrics] * n)
                units += [Unit(_STEP[n], vector_step_, (step, [update] * n), record)]
        if learner.env.on_host or max(counts, default=0) > 1:
            units += [Unit("update", learn_, ([update],), [metrics])]
        units += [self._noise_unit(args, learner.env, plan, noise)]
        self._names = [unit.name for unit in units]
        self._compiler.start(units)
        self._state = self._compiler.state
        self._functions: dict[str, Run] = {}
        self._steps, self._updates = Rows(step), Rows(update)
        self._record, self._metrics = Rows([copies, copies.int()]), Rows([metrics])

    def _noise_unit(self, args: Args, env: TensorEnv, plan: Plan, noise: Noise) -> Unit:
        """`draw_noise` for the longest window; shorter ones are parts of it, because a number
        depends on where it is drawn and on nothing else."""
        num_steps = min(plan.max_window_steps, plan.num_vector_steps)
        groups = num_steps * args.num_envs // args.train_freq + 1
        num_updates = min(groups * args.gradient_steps, plan.total_updates)

        def draw(_: Learner, keys: Tensor, counters: Tensor, *first: Tensor) -> tuple[Tensor, ...]:
            own = noise.with_tensors(keys, counters)
            return draw_noise(args, env, own, num_steps, num_updates, *first)

        first = torch.zeros(2, dtype=torch.int64, device=noise.device).unbind()
        self._drawn = draw_noise(args, env, noise, num_steps, num_updates, 0, 0)
        self._keys, self._counters = noise.keys, noise.counters  # as many as this needs
        return Unit("noise", draw, (self._keys, self._counters, *first), self._drawn, exact=True)

    def finish(self) -> None:
        """Wait for the compiler.

        Raises:
            EngineUnavailableError: it failed.
        """
        self._functions = dict(zip(self._names, self._compiler.finish(), strict=True))

    def close(self) -> None:
        """Stop the compiler if it still runs."""
        self._compiler.close()

    def __call__(
        self,
        learner: Learner,
        steps: StepInputs,
        updates: UpdateInputs,
        update_counts: tuple[int, ...],
    ) -> ChunkRecord:
        """As `chunk_`, of the learner that this was made for; the next call may overwrite what it
        returns."""
        if learner.env.on_host:
            step_ = partial(vector_step_, act_=self._act_, learn_=self._learn_)
            return chunk_(learner, steps, updates, update_counts, step_)
        if not {_STEP[count == 1] for count in update_counts} <= self._functions.keys():
            return chunk_(learner, steps, updates, update_counts)  # before learning starts
        noise, schedules = self._steps.filled(steps), self._updates.filled(updates)
        (episode_return, episode_length), records = self._record.room(len(update_counts))
        (metrics,), rows = self._metrics.room(len(updates.rows))
        first = 0
        for k, count in enumerate(update_counts):
            last = first + count
            if count == 1:
                inputs = (*noise[k], *schedules[first], *records[k], *rows[first])
                self._functions["step-update"]([*self._state, *inputs])
            else:
                self._functions["step"]([*self._state, *noise[k], *records[k]])
                for u in range(first, last):
                    self._functions["update"]([*self._state, *schedules[u], *rows[u]])
            first = last
        return ChunkRecord(
            episode_return.unflatten(1, learner.copies),
            episode_length.unflatten(1, learner.copies),
            metrics,
        )

    def draw_noise(
        self,
        _args: Args,
        _env: TensorEnv,
        noise: Noise,
        num_steps: int,
        num_updates: int,
        *first: int,
    ) -> tuple[Tensor, ...]:
        """As `draw_noise`, for what this was made for; the next call overwrites what it returns."""
        start = upload(torch.tensor(first), noise.device).unbind()
        inputs = (self._keys, self._counters, *start, *self._drawn)
        self._functions["noise"]([*self._state, *inputs])
        *steps, rows = self._drawn
        return *(drawn[:num_steps] for drawn in steps), rows[:num_updates]

    def _act_(self, learner: Learner, noise: Tensor, epsilon: Tensor) -> Tensor:
        action = torch.empty_like(learner.vector.elapsed, dtype=torch.int64)
        self._functions["act"]([*self._state, noise, epsilon, action])
        return action

    def _learn_(self, _learner: Learner, updates: list[UpdateInputs]) -> list[Tensor]:
        _, rows = self._metrics.room(len(updates))
        for update, row in zip(updates, rows, strict=False):
            self._functions["update"]([*self._state, *update, *row])
        return [row for (row,) in rows[: len(updates)]]


NO_GRAPHS = "no CUDA graphs"
_STEP = ("step", "step-update")
"""Name of a compiled vector step, with or without the gradient step after it."""


class Runner:
    """Runs the chunks of one learner with the engine that was asked for, or the next best.

    Whatever fails while an engine is made costs a reason in words: without compiled functions a
    graph holds plain kernels, without graphs compiled functions are called, without either the
    plain ones are. Nothing has run by then, so the run is the one that the next best engine makes.

    Attributes:
        engine: what runs now: eager, compile or graph.
        reason: why, in a few words.
        compile_s: seconds that the loop waited for the compiler.
        on_change: told engine, reason, compile_s and whether this is instead of an engine that
            never ran, once compiled functions run, or something cannot be had.
    """

    def __init__(
        self,
        args: Args,
        learner: Learner,
        plan: Plan,
        noise: Noise,
        choice: Choice | None = None,
    ) -> None:
        """Begin to compile where that is called for.

        Args:
            args: settings.
            learner: whose chunks are run.
            plan: of the run.
            noise: of the learner's members.
            choice: which engine; None: what `choose_engine` says.
        """
        device, on_host = learner.gamma.device, learner.env.on_host
        choice = choice or choose_engine(args.engine, device, plan.total_updates, on_host)
        self.engine: str = "eager" if choice.switch else choice.engine
        self.reason, self.compile_s = choice.reason, 0.0
        self.on_change: Callable[[str, str, float, bool], None] = lambda *_: None
        self._learner, self._num_updates, self._switch = learner, 0, choice.switch or 0
        self._chunk_: Callable[..., ChunkRecord] = chunk_
        self._draw_noise: DrawNoise = draw_noise
        self._compiled: CompiledChunk | None = None
        self.captured: Captured | None = None
        if choice.engine == "graph":
            try:
                self.captured = Captured(self._chunk, CudaGraphs(device))
            except RuntimeError as error:
                self.engine = "compile" if choice.compiled else "eager"
                self.reason = f"{NO_GRAPHS}: {first_line(error)}"
        if choice.compiled:
            try:
                self._compiled = CompiledChunk(args, learner, plan, noise)
            except EngineUnavailableError as error:
                self._without_compiler(error)

    def __call__(
        self, steps: StepInputs, updates: UpdateInputs, update_counts: tuple[int, ...]
    ) -> ChunkRecord:
        """`chunk_`; what it returns is to be used before the next call."""
        num_updates = sum(update_counts)
        if self._compiled is not None and num_updates and self._num_updates >= self._switch:
            self._change_over(self._compiled)
        self._num_updates += num_updates
        if self.captured is not None:
            try:
                return self.captured(update_counts, steps, updates)
            except EngineUnavailableError as error:
                self._without_graphs(self.captured, error)
        return self._chunk(update_counts, steps, updates)

    def draw_noise(self, *arguments: Any) -> tuple[Tensor, ...]:
        """`draw_noise`; what it returns is to be used before the next call."""
        return self._draw_noise(*arguments)

    def _chunk(
        self, update_counts: tuple[int, ...], steps: StepInputs, updates: UpdateInputs
    ) -> ChunkRecord:
        return self._chunk_(self._learner, steps, updates, update_counts)

    def _change_over(self, compiled: CompiledChunk) -> None:
        """Wait for the compiler and go on with what it made."""
        began = time.perf_counter()
        announced = self.engine
        try:
            compiled.finish()
            self._chunk_, self._draw_noise = compiled, compiled.draw_noise
            if self.engine == "eager":
                self.engine = "compile"
        except EngineUnavailableError as error:
            self._without_compiler(error)
        finally:  # a compiler that an interrupt leaves behind would go on
            compiled.close()
            self._compiled = None
        self.compile_s = time.perf_counter() - began
        never_ran = announced == "compile" and self.engine == "eager"
        self.on_change(self.engine, self.reason, self.compile_s, never_ran)

    def _without_compiler(self, error: EngineUnavailableError) -> None:
        if self.engine == "graph":
            self.reason = f"plain kernels, {error}"
        else:
            before = f"{self.reason}; " if self.reason.startswith(NO_GRAPHS) else ""
            self.engine, self.reason = "eager", f"{before}{error}"

    def _without_graphs(self, captured: Captured, error: EngineUnavailableError) -> None:
        self.captured = None
        self.engine = "eager" if self._chunk_ is chunk_ else "compile"
        self.reason = str(error)
        self.on_change(self.engine, self.reason, self.compile_s, captured.num_recordings == 0)

    def close(self) -> None:
        """Stop the compiler if it still runs."""
        if self._compiled is not None:
            self._compiled.close()


def example_step_inputs(learner: Learner) -> StepInputs:
    """Inputs of one vector step, all 0, in their shapes and dtypes."""
    (m, n), env, device = learner.copies, learner.env, learner.gamma.device
    return StepInputs(
        explore=torch.zeros(m, n, 2, device=device),
        env_step=torch.zeros(m * n, env.step_noise_dim, device=device),
        env_reset=torch.zeros(m * n, env.reset_noise_dim, device=device),
        epsilon=torch.zeros((), device=device),
    )


def example_update_inputs(learner: Learner, batch_size: int) -> UpdateInputs:
    """Inputs of one gradient step, all 0, in their shapes and dtypes."""
    device = learner.gamma.device
    rows = torch.zeros(learner.copies[0], batch_size, dtype=torch.int64, device=device)
    return UpdateInputs(rows, *torch.zeros(3, device=device).unbind())


# ------------------------------------------------------------------------------------ the loop


@dataclass
class Result:
    """What `train` returns.

    Attributes:
        q_net: online network of all M members as the run left it; `load_agent` gives the best.
        env: the environment.
        summary: content of `summary.json`.
        run_dir: directory of the run.
    """

    q_net: QNetwork
    env: TensorEnv
    summary: dict[str, Any]
    run_dir: Path


LogHook = Callable[[int, Learner, dict[str, Any]], None]


def train(
    args: Args,
    env: TensorEnv | None = None,
    on_log: LogHook | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train and write the run directory.

    Args:
        args: settings.
        env: environment of one's own, see `from_gymnasium` for Gymnasium's; it stays open. None
            makes `args.env_id` with `args.env_params`.
        on_log: called after every log point and evaluation with global_step, the learner and the
            metrics.
        should_stop: asked between chunks; once true, the run is saved and ends.

    Raises:
        UsageError: a setting makes no sense; nothing was written.
        TrainingError: a loss or gradient is not finite; the run up to there is saved, the agent
            as it was at the last checkpoint.
        EnvError: the environment broke its contract; the run up to there is saved, the agent too.
    """
    began = time.perf_counter()
    # The numbers of a sweep may be NumPy's, which no file of the run could hold.
    args = dataclasses.replace(args, **{**plain(vars(args)), "run_dir": args.run_dir})
    check(args)
    settled: dict[str, Any] = {**intervals(args)}
    args = dataclasses.replace(args, **settled)
    if env is not None and args.env_params:
        pairs = " ".join(f"{name} {value}" for name, value in args.env_params.items())
        raise UsageError(f"--env-params {pairs}: must be empty with an environment of one's own")
    try:
        device = choose_device(args.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with ExitStack() as stack:
        stack.enter_context(run_conditions(args.num_threads, device, args.matmul_precision))
        try:
            if env is None:
                env_id = args.env_id
                env = make_env(env_id, args.env_params, args.vectorization_mode)
                stack.callback(env.close)
            else:
                env_id = getattr(env, "name", type(env).__name__)
                if not env.on_host:
                    check_env(env, num_envs=2, num_steps=2)
            exact = solve(env, args.gamma, device)
            if args.stop_when_optimal and exact is None:
                raise UsageError(
                    f"--stop-when-optimal: {env_id} has no exact solution here; "
                    "use --stop-at-return"
                )
            check_memory(args, env, device)
            plan = make_plan(args, env)
            choice = choose_engine(args.engine, device, plan.total_updates, env.on_host)
            # On a CPU the compiler is handed a copy, too, and loads it.
            state_copies = 3 if device.type == "cpu" else 1
            if choice.compiled and not fits(args, env, device, state_copies):
                why = "no memory to try compiled functions on a copy of the replay"
                choice = without_compiler(choice, why)
            noise = Noise(args.seed, args.num_seeds, device)
            learner = make_learner(args, env, noise)
        except (ValueError, EnvCheckError) as error:
            raise UsageError(str(error)) from error
        run_dir = create_run_dir(args.run_dir, env_id, args.name, args.seed)
        runner = Runner(args, learner, plan, noise, choice)
        stack.callback(runner.close)
        usual = Args.for_env(env_id, num_envs=args.num_envs, total_timesteps=args.total_timesteps)
        config = describe(
            vars(args),
            vars(Args.for_env(env_id)) | intervals(usual),
            env_id,
            env,
            plan,
            learner.q_net,
            learner.replay,
            exact,
            runner.engine,
            runner.reason,
        )
        probe = env.features(learner.by_member(learner.vector.obs)[:, :1]).clone()
        metrics = Metrics(args.num_seeds, most_episodes(args), device)
        diagnostics = Diagnostics(env, exact, args.double_q)
        with RunRecord(run_dir, config, plan, metrics, diagnostics, learner.q_net, began) as run:
            runner.on_change = run.changed_engine
            for chunk, steps, updates in planned(args, env, noise, plan, runner.draw_noise):
                with located(chunk):
                    record = runner(steps, updates, chunk.update_counts)
                metrics.add_(record, chunk.before, chunk.first_update)
                run.advance(chunk)

                # Side jobs, in one order: evaluate, log, save. Only an evaluation waits for the
                # device; `settle` makes rows and files of what has come from it.
                log, evaluation, save = (chunk.crosses(interval) for interval in plan.intervals)
                stopped = should_stop()
                done = chunk.after == plan.end and not stopped
                row: dict[str, Any] = {}
                if evaluation or done:
                    run.check_finite(learner.replay)
                    eval_began = time.perf_counter()
                    result = evaluate(
                        env.for_evaluation(),
                        learner.q_net,
                        args.eval_episodes,
                        noise,
                        epoch=run.num_evaluations,
                        gamma=args.gamma,
                    )
                    known = exact.compare(learner.q_net) if exact else {}
                    row = run.evaluated(result, known)
                    run.eval_s += time.perf_counter() - eval_began
                solved = reached_goal(args, row)
                ends = stopped or done or solved
                if log or ends:
                    row["charts/epsilon"] = float(epsilon(args, chunk.after))
                    run.log_point(
                        row,
                        q_probe(learner.q_net, probe),
                        learner.q_net,
                        learner.target_net,
                        learner.replay,
                        learner.gamma,
                    )
                elif row:
                    run.log(row)
                if save or ends:
                    run.save(learner.state_dict(), learner.replay)
                for global_step, metrics_now in run.settle(wait=ends or on_log is not None):
                    if on_log is not None:
                        on_log(global_step, learner, metrics_now)
                if stopped or solved:
                    run.status = "stopped" if stopped else "solved"
                    break
        return Result(learner.q_net, env, run.summary, run_dir)


def make_plan(args: Args, env: TensorEnv) -> Plan:
    """Which vector steps learn, when the target is synchronised, and where chunks end."""
    # Beside a step in the background one learns without that step's transitions.
    lag = args.num_envs if env.background else 0
    plan = Plan(
        num_envs=args.num_envs,
        total_timesteps=args.total_timesteps,
        learning_starts=max(args.learning_starts, args.batch_size) + lag,
        train_freq=args.train_freq,
        gradient_steps=args.gradient_steps,
        target_update_interval=args.target_update_interval,
        max_chunk_steps=1 if env.on_host else args.chunk_steps,
        # One longer than the run fires once, at its end.
        intervals=tuple(min(i, args.total_timesteps) for i in intervals(args).values()),
    )
    # Enough numbers at once to hide the cost of a call, few enough to stay in the cache.
    updates = args.gradient_steps * -(-args.num_envs // args.train_freq)
    per_copy = 2 + env.step_noise_dim + env.reset_noise_dim
    numbers = args.num_seeds * (args.num_envs * per_copy + 2 * updates * args.batch_size)
    window, chunk = max(1, 2**19 // numbers), plan.max_chunk_steps
    choice = choose_engine(args.engine, choose_device(args.device), plan.total_updates, env.on_host)
    if graph := choice.engine == "graph":
        chunk = min(chunk, RECORDED_STEPS)
        window -= window % chunk if window > chunk else 0
    return dataclasses.replace(
        plan, max_window_steps=window, max_chunk_steps=chunk, few_shapes=graph
    )


@contextmanager
def located(chunk: Chunk) -> Iterator[None]:
    """Say when it was that an environment broke its contract."""
    try:
        yield
    except EnvError as error:
        when = f"between global_step {chunk.before:,} and {chunk.after:,}"
        raise EnvError(f"{error} ({when})") from error


def reached_goal(args: Args, row: dict[str, Any]) -> bool:
    """Whether an evaluation's metrics meet --stop-when-optimal or --stop-at-return."""
    if args.stop_when_optimal and all(row.get("exact/policy_optimal", [False])):
        return True
    returns = row.get("eval/return_mean", [-math.inf])
    return args.stop_at_return is not None and min(returns) >= args.stop_at_return


def most_episodes(args: Args) -> int:
    """Episodes that may be listed between two log points: each ends in a transition of its own, and
    a log point is late by up to num_envs - 1 of a member's."""
    log_interval = intervals(args)["log_interval"] or args.total_timesteps
    interval = min(log_interval, args.total_timesteps)
    return min((interval + args.num_envs - 1) * args.num_seeds, 2**20)


# ------------------------------------------------------------------------------- command line


def asked_env_id(argv: list[str]) -> str:
    """The value of --env-id: which defaults the other flags have follows from it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--env-id", "--env_id", default=Args.env_id)
    try:
        return str(parser.parse_known_args(argv)[0].env_id)
    except argparse.ArgumentError:  # no value: tyro says so
        return Args.env_id


def main() -> int:
    """Train from the command line; returns the exit status."""
    args = tyro.cli(Args, default=Args.for_env(asked_env_id(sys.argv[1:])))
    interruption = Interruption()
    try:
        train(args, should_stop=interruption)
    except (UsageError, TrainingError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        gc.freeze()  # or the interpreter walks all of torch's objects before it exits: 0.8 s
    return 128 + interruption.signal if interruption.signal is not None else 0


if __name__ == "__main__":
    sys.exit(main())
