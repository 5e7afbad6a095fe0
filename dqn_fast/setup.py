"""Set-up: everything that a run trains with, made from its settings.

    training = setup(Args(num_envs=64))
    for chunk, record in training.chunks():
        ...

`setup` checks the settings and makes environment, algorithm, state, plan and engine; it writes no
file but that of --keep-generated. `train` runs the chunks; tests, benchmarks and notebooks may do
so too.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.algorithm import ChunkRecord, StepInputs, UpdateInputs
from dqn_fast.ambient import standard_state
from dqn_fast.device import choose_device, first_line, upload
from dqn_fast.dqn import DQN, Hyper, QFunction, State
from dqn_fast.engines import (
    RECORDED_STEPS,
    EngineChoice,
    Runner,
    choose_engine,
    without_compiler,
)
from dqn_fast.envs import (
    EnvCheckError,
    EnvError,
    Recipe,
    TensorEnv,
    check_env,
    differences,
    need_tensor_env,
)
from dqn_fast.envs.from_gymnasium import ENDLESS
from dqn_fast.exact import ExactValues, solve
from dqn_fast.heads import ScalarHead
from dqn_fast.memory import EVAL_EPISODES, check_memory, fits
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.plan import Chunk, Plan, Schedules
from dqn_fast.replay import Replay
from dqn_fast.resume import Resumption
from dqn_fast.settings import UsageError, absolute, check_settings, check_value, flag
from dqn_fast.sweep import form_error, sweep_error

if TYPE_CHECKING:
    from dqn_fast.train import Args


@dataclass
class Training:
    """Everything that one run trains with; made by `setup`, run by `chunks`.

    Attributes:
        args: settings, checked and complete.
        env_id: name of the environment.
        env: the environment.
        recipe: how it is made.
        plan: which vector steps learn, and where chunks end.
        schedules: values that follow from the step count.
        noise: random numbers of the members.
        dqn: one vector step.
        state: everything that outlives a vector step.
        exact: exact solution of the environment, or None.
        runner: the engine.
        probe: network's input for the first observation of each member's first copy, [M, 1, F].
        first_step, first_update: vector steps and gradient steps that a resumed run has taken.
        cut_episodes: episodes that a resumed run does not go on with: copy, episode_length and
            episode_return of each.
        on_close: callbacks of `close`.
    """

    args: Args
    env_id: str
    env: TensorEnv
    recipe: Recipe
    plan: Plan
    schedules: Schedules
    noise: Noise
    dqn: DQN
    state: State
    exact: ExactValues | None
    runner: Runner
    probe: Tensor
    first_step: int = 0
    first_update: int = 0
    cut_episodes: Sequence[Mapping[str, Any]] = ()
    on_close: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def q_net(self) -> QFunction:
        """Q-values of all members."""
        return self.dqn.q_function(self.state)

    def inputs(self) -> Iterator[tuple[Chunk, StepInputs, UpdateInputs]]:
        """The run's chunks, each with its random numbers and schedules."""
        drawn = None
        for window, chunk in self.plan.chunks(self.first_step, self.first_update):
            if window is not drawn:
                drawn, (steps, updates) = window, self.inputs_of(window)
            k, u = chunk.slices_in(window)
            yield chunk, rows_of(steps, k), rows_of(updates, u)

    def inputs_of(self, chunk: Chunk) -> tuple[StepInputs, UpdateInputs]:
        """Random numbers and schedules of `chunk`, as tensors on the device."""
        first = chunk.before // self.args.num_envs, chunk.first_update
        drawn = self.runner.draw(chunk.num_steps, chunk.num_updates, *first)
        explore, env_step, env_reset, rows = drawn
        epsilon, *scheduled = upload_arrays(self.schedules.of(chunk), self.noise.device)
        return StepInputs(explore, env_step, env_reset, epsilon), UpdateInputs(rows, *scheduled)

    def chunks(self) -> Iterator[tuple[Chunk, ChunkRecord]]:
        """Run the chunks one by one; the next chunk overwrites the record of the last.

        Raises:
            EnvError: the environment broke its contract; the message says when.
            StopRequested: `runner.should_stop` said so while the loop waited for the compiler; the
                chunk did not run.
        """
        for chunk, steps, updates in self.inputs():
            try:
                record = self.runner(steps, updates, chunk.update_counts)
            except EnvError as error:
                when = f"between global_step {chunk.before:,} and {chunk.after:,}"
                raise EnvError(f"{error} ({when})") from error
            yield chunk, record

    def close(self) -> None:
        """Stop the compiler if it still runs, and close the environment if `setup` made it."""
        self.on_close.close()


def rows_of(inputs: Any, rows: slice) -> Any:
    """A slice of `StepInputs` or `UpdateInputs` along their first axis."""
    return type(inputs)(*(None if tensor is None else tensor[rows] for tensor in inputs))


def upload_arrays(arrays: Sequence[NDArray[np.float64]], device: torch.device) -> list[Tensor]:
    """The arrays as float32 tensors on the device, uploaded in one copy."""
    with np.errstate(over="ignore"):  # values above float32's range become infinite
        flat = np.concatenate([array.ravel() for array in arrays]).astype(np.float32)
    parts = upload(torch.from_numpy(flat), device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


@standard_state()
def setup(args: Args, env: TensorEnv | None = None, resumed: Resumption | None = None) -> Training:
    """Make everything that a run trains with; no file is written.

    Args:
        args: settings.
        env: the caller's own environment, which stays open; None makes `args.env_id`.
        resumed: the run that goes on; None: a new run.

    Raises:
        UsageError: a setting is not allowed, or the run does not fit into memory.
    """
    asked, args = check(args), settle(args)
    device = device_of(args)
    if args.keep_generated is not None:
        make_folder("keep_generated", args.keep_generated)
    with ExitStack() as stack:
        try:
            if env is None:
                recipe = recipe_of(args)
                env = recipe.make()
                stack.callback(env.close)
            else:
                need_tensor_env(env)
                pairs = " ".join(f"{name} {value}" for name, value in args.env_params.items())
                names = {"env-params": pairs, "env": args.env, "wrappers": " ".join(args.wrappers)}
                for name, text in names.items():
                    if text:
                        raise UsageError(
                            f"--{name} {text}: must be empty with an environment of your own"
                        )
                recipe = Recipe.of(env)
            env_id = recipe.name(env)
            if resumed is not None:
                resumed.notes += differences(resumed.config.get("environment") or {}, env)
            if not env.on_host and (recipe.is_owned or recipe.env is not None):
                check_env(env, num_envs=2, num_steps=2)
            chosen: dict[str, Any] = {**evaluations_on(env, asked)}
            args = dataclasses.replace(args, **chosen)
            check_memory(args, env, device)
            gammas = member_values(args, "gamma")
            exact = solve(env, gammas.tolist(), device)
            if args.stop_when_optimal and exact is None:
                raise UsageError(
                    f"--stop-when-optimal: {env_id} has no exact solution here, with gamma up to "
                    f"{gammas.max():g}; use --stop-at-return"
                )
            plan = make_plan(args, env, resumed)
            choice = engine_of(args, env, plan)
            if choice.compiled and not fits(args, env, device, state_copies=1):
                why = "too little memory to try compiled functions on a copy of the replay"
                choice = without_compiler(choice, why)
            noise = Noise(args.seed, args.num_members, device, args.num_seeds)
            try:
                dqn = make_dqn(args, env)
                state = dqn.init(noise, hyper_of(args))
            except MemoryError as error:
                raise UsageError(
                    f"--buffer-size {args.buffer_size}: must be smaller; the memory of {device} "
                    "cannot hold so many transitions"
                ) from error
        except (ValueError, EnvCheckError) as error:
            raise UsageError(str(error)) from error
        # Tables that features or dynamics keep for each device are made now, with real numbers:
        # the first call in a trace would make them of stand-ins.
        probe = env.features(dqn.by_member(state.env.obs)[:, :1]).clone()
        cut = resumed.restore_(state, dqn, noise) if resumed else []
        position = (
            (resumed.global_step // args.num_envs, resumed.num_updates) if resumed else (0, 0)
        )
        runner = Runner(dqn, state, plan, noise, choice, args.keep_generated)
        stack.callback(runner.close)
        parts = (env_id, env, recipe, plan, schedules_of(args), noise, dqn, state, exact, runner)
        return Training(args, *parts, probe, *position, cut, on_close=stack.pop_all())
    raise AssertionError  # for mypy: the stack suppresses no exception


def recipe_of(args: Args) -> Recipe:
    """How the settings make the environment."""
    mode = args.vectorization_mode
    return Recipe(args.env_id, args.env, args.env_params, args.wrappers, mode)


def make_folder(name: str, path: Path) -> None:
    """Make the folder that a setting names.

    Raises:
        UsageError: files cannot be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        why = error.strerror or first_line(error)
        raise UsageError(
            f"{flag(name)} {path}: must be a folder that can be written: {why}"
        ) from error


def device_of(args: Args) -> torch.device:
    """The device that --device stands for."""
    try:
        return choose_device(args.device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_dqn(args: Args, env: TensorEnv) -> DQN:
    """The algorithm that the settings describe."""
    obs = env.example_obs()
    sizes = (env.features(obs).shape[-1], *args.hidden_sizes, env.num_actions)
    head = ScalarHead(args.loss)
    replay_shape = args.buffer_size, args.num_members, args.num_envs
    device = choose_device(args.device)
    return DQN(
        env=env,
        network=QNetwork(sizes, head.num_outputs),
        head=head,
        replay=Replay(*replay_shape, obs, env.num_actions, device),
        num_members=args.num_members,
        num_envs=args.num_envs,
        batch_size=args.batch_size,
        double_q=args.double_q,
        holds_actions=args.holds_actions,
    )


def member_values(args: Args, name: str) -> NDArray[np.float64]:
    """A setting of each member, [M]."""
    usual = getattr(args, name)
    return np.array([member.get(name, usual) for member in args.members], np.float64)


def hyper_of(args: Args) -> Hyper:
    """Settings that a vector step reads, on the device."""
    arrays = [member_values(args, name)[:, None] for name in Hyper._fields]
    return Hyper(*upload_arrays(arrays, choose_device(args.device)))


def schedules_of(args: Args) -> Schedules:
    """Values that follow from the step count."""
    constant = args.learning_rate_end is None and "learning_rate_end" not in args.sweep
    end = "learning_rate" if constant else "learning_rate_end"
    return Schedules(
        learning_rate=member_values(args, "learning_rate"),
        learning_rate_end=member_values(args, end),
        eps_start=member_values(args, "eps_start"),
        eps_end=member_values(args, "eps_end"),
        eps_steps=np.floor(member_values(args, "eps_fraction") * args.total_timesteps),
        tau=member_values(args, "tau"),
        total_timesteps=args.total_timesteps,
    )


def engine_of(args: Args, env: TensorEnv, plan: Plan) -> EngineChoice:
    """The engine that --engine stands for."""
    device = choose_device(args.device)
    return choose_engine(args.engine, device, plan.total_updates, env.on_host)


def make_plan(args: Args, env: TensorEnv, resumed: Resumption | None = None) -> Plan:
    """Which vector steps learn, when the target is synchronised, and where chunks end."""
    # While the environments step in the background, learning lacks that step's transitions.
    lag = args.num_envs if env.background else 0
    plan = Plan(
        num_envs=args.num_envs,
        total_timesteps=args.total_timesteps,
        learning_starts=max(args.learning_starts, args.batch_size) + lag,
        train_freq=args.train_freq,
        gradient_steps=args.gradient_steps,
        target_update_interval=min(
            args.target_update_interval, args.total_timesteps + args.num_envs
        ),
        max_chunk_steps=1 if env.on_host else args.chunk_steps,
        # An interval longer than the run fires once, at the end of the run.
        intervals=tuple(min(i, args.total_timesteps) for i in intervals(args).values()),
    )
    if resumed is not None:
        plan = dataclasses.replace(
            plan,
            learning_starts=resumed.learning_starts(plan.learning_starts),
            updates_before=resumed.updates_before,
        )
    # 2**19 numbers at a time: enough to hide the cost of a call, few enough to stay in the cache.
    updates = args.gradient_steps * -(-args.num_envs // args.train_freq)
    per_copy = 2 + env.step_noise_dim + env.reset_noise_dim
    numbers = args.num_members * (args.num_envs * per_copy + 2 * updates * args.batch_size)
    window, chunk = max(1, 2**19 // numbers), plan.max_chunk_steps
    choice = engine_of(args, env, plan)
    if graph := choice.engine == "graph":
        chunk = min(chunk, RECORDED_STEPS)
        window -= window % chunk if window > chunk else 0
    return dataclasses.replace(
        plan,
        max_window_steps=window,
        max_chunk_steps=chunk,
        few_shapes=graph,
    )


# ------------------------------------------------------------------------ checks of settings


def settle(args: Args) -> Args:
    """The settings, checked, as plain numbers, with all intervals chosen, and with paths that stay
    the same when an environment changes the working directory.

    Raises:
        UsageError: a setting is not allowed.
    """
    args = check(args)
    settled: dict[str, Any] = {**intervals(args)}
    for name in ("run_dir", "keep_generated"):
        path: Path | None = getattr(args, name)
        settled[name] = None if path is None else absolute(path)
    return dataclasses.replace(args, **settled)


INTERVALS = {
    "log_interval": (50, 2_048),
    "eval_interval": (16, 8_192),
    "checkpoint_interval": (4, 131_072),
}
"""For each interval that is not set: how many such events a run has, and the maximum number of
vector steps between two. The number is fixed because a log point costs 1 to 2 ms and a checkpoint
10 ms: together they stay below 5 % of the loop, or 0.1 s of a short run."""


def intervals(args: Args) -> dict[str, int]:
    """Transitions between log points, evaluations and checkpoints, from the settings alone: runs of
    the same settings have the same intervals."""
    chosen: dict[str, int] = {}
    for name, (number, most_steps) in INTERVALS.items():
        steps = min(args.total_timesteps // (number * args.num_envs), most_steps)
        asked = getattr(args, name)
        chosen[name] = max(steps, 1) * args.num_envs if asked is None else asked
    return chosen


LEAST_EPISODES, UNKNOWN_LENGTH = 10, 100
"""Episodes of an evaluation on the host at least, unless they are set; steps that an episode is
assumed to take if it has no time limit."""


def episodes_on(env: TensorEnv, args: Args) -> int:
    """Episodes of an evaluation: as set, or as many as an environment on the host plays, at its
    time limit, in a 16th of the training."""
    if args.eval_episodes is not None:
        return args.eval_episodes
    if not env.on_host:
        return EVAL_EPISODES
    most = args.total_timesteps // (INTERVALS["eval_interval"][0] * _length(env))
    return min(max(most, LEAST_EPISODES), EVAL_EPISODES)


def evaluations_on(env: TensorEnv, args: Args) -> dict[str, int]:
    """Episodes of an evaluation, and transitions between two: as set; else on the host at least as
    many as an evaluation may take, for it costs as much per step as training."""
    episodes, interval = episodes_on(env, args), intervals(args)["eval_interval"]
    if args.eval_interval is None and env.on_host:
        least = min(episodes * _length(env), args.total_timesteps)
        interval = max(interval, -(-least // args.num_envs) * args.num_envs)
    return {"eval_episodes": episodes, "eval_interval": interval}


def _length(env: TensorEnv) -> int:
    return env.max_steps if env.max_steps < ENDLESS else UNKNOWN_LENGTH


def check(args: Args) -> Args:
    """The settings, each in its field's own type.

    Raises:
        UsageError: a setting is not allowed, by itself or together with the others; the message
            names the first.
    """
    args = check_settings(args)

    def need(ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise UsageError(f"{flag(name)} {getattr(args, name)}: must be {allowed}")

    need(
        args.buffer_size >= args.num_envs,
        "buffer_size",
        f"at least --num-envs {args.num_envs}, the transitions of one vector step",
    )
    most = min(args.buffer_size, -(-args.total_timesteps // args.num_envs) * args.num_envs)
    need(args.batch_size <= most, "batch_size", f"at most {most}, the most that replay can hold")
    need(
        args.eval_interval != 0 or (args.stop_at_return is None and not args.stop_when_optimal),
        "eval_interval",
        "above 0 with --stop-at-return or --stop-when-optimal, which act at evaluations",
    )
    need(
        args.eval_episodes != 0 or (args.stop_at_return is None and not args.stop_when_optimal),
        "eval_episodes",
        "above 0 with --stop-at-return or --stop-when-optimal, which act at evaluations",
    )
    if wrong := form_error(args.sweep):
        raise UsageError(f"--sweep {wrong}")
    sweep: dict[str, tuple[float, ...]] = {}
    for name, values in args.sweep.items():
        try:
            sweep[name] = tuple(float(check_value(type(args), name, value)) for value in values)
        except UsageError as error:
            raise UsageError(str(error).replace(flag(name), f"--sweep {name}", 1)) from error
    if wrong := sweep_error(sweep, args.sweep_random):
        raise UsageError(f"--sweep {wrong}")
    args = dataclasses.replace(args, sweep=sweep)
    need(args.name != "" and "/" not in args.name, "name", "a name without /")
    # The run directory's name has environment, name, seed and time, in at most 255 bytes.
    if args.run_dir is None:
        need(len(args.name.encode()) <= 100, "name", "at most 100 bytes, or name a --run-dir")
        need(len(args.env_id.encode()) <= 100, "env_id", "at most 100 bytes, or name a --run-dir")
    return args
