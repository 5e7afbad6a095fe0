"""Train a DQN whose environments, replay and learner live on one device.

    python -m dqn_fast.train --num-envs 64

Read it top to bottom: the settings; the loop, which runs chunks of vector steps, evaluates, logs
and saves; the command line. The vector step itself is in dqn.py. `setup`, in setup.py, makes
everything that a run trains with.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dqn_fast.ambient import global_numbers, standard_state
from dqn_fast.device import MatmulPrecision, run_conditions
from dqn_fast.dqn import QFunction
from dqn_fast.engines import EngineName, StopRequested
from dqn_fast.envs import CopiesError, EnvError, TensorEnv, VectorizationMode, need_tensor_env
from dqn_fast.evaluate import Evaluation, play_episodes, q_probe
from dqn_fast.experiments import experiment
from dqn_fast.heads import LossName
from dqn_fast.memory import copies_of
from dqn_fast.process import command, require, stop_requests
from dqn_fast.record.describe import describe
from dqn_fast.record.metrics import Metrics
from dqn_fast.record.run import (
    RunRecord,
    TrainingError,
    create_run_dir,
    refuse_used_dir,
)
from dqn_fast.record.tracker import warn
from dqn_fast.resume import Resumption, open_run
from dqn_fast.settings import (
    UsageError,
    above,
    absolute,
    at_least,
    between,
    check_settings,
    expand_flags,
    finite,
    parse,
)
from dqn_fast.setup import (
    Training,
    check,
    device_of,
    evaluations_on,
    intervals,
    member_values,
    setup,
)
from dqn_fast.sweep import members_of, num_points, read_sweep

# ------------------------------------------------------------------------------------ settings

# Types of several settings; --help shows their ranges.
Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
IntervalOrNone = Annotated[int | None, at_least(0, note="0: off")]
UnitInterval = Annotated[float, between(0, 1)]


@dataclass
class Args:
    """Train a DQN with many environments per step.

    Steps, intervals and frequencies count environment transitions of one member, for any
    --num-envs. They take effect at the next vector step, so fewer than --num-envs transitions late.
    An interval of 0 means off.
    """

    # Experiment
    env_id: str = "LineWorld-v0"
    """Environment: a tensor environment if this id has one, else Gymnasium's; gym:ID always takes
    Gymnasium's. The defaults of the other flags depend on it."""
    env_params: Annotated[
        dict[str, str | int | float | bool], tyro.conf.arg(metavar="[NAME VALUE ...]")
    ] = field(default_factory=dict)
    """Parameters of the environment, as pairs: --env-params n_states 31 slip_prob 0.1."""
    env: str | None = None
    """Callable that makes the environment, in place of env_id: my_module:make_env, or the class of
    an environment; env_params are its arguments."""
    wrappers: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[MODULE:WRAPPER[,NAME=VALUE] ...]")
    ] = ()
    """Wrappers around each copy, the first one innermost: minigrid.wrappers:ImgObsWrapper
    gymnasium.wrappers:FrameStackObservation,stack_size=4. The environment is Gymnasium's then."""
    vectorization_mode: VectorizationMode = "sync"
    """How the copies of a Gymnasium environment are stepped: sync, one after the other; async,
    each in its own process, while the learner learns; vector_entry_point, by the environment's
    own vector version."""
    num_envs: Count = 64
    """Copies of the environment that step together, for each member."""
    num_seeds: Count = 1
    """Members: independent agents with seeds seed, seed + 1, ... trained side by side."""
    total_timesteps: Count = 65_536
    """Length of the run in transitions, rounded up to a multiple of num_envs."""
    seed: CountOrZero = 0
    """Seed of the first member."""

    sweep: Annotated[
        dict[str, tuple[float, ...]],
        PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME VALUE ...]",
            instance_from_str=read_sweep,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda sweep: [
                word for name, values in sweep.items() for word in (name, *map(str, values))
            ],
        ),
    ] = field(default_factory=dict)
    """Settings that members differ in, each with its values: --sweep learning_rate 1e-4 1e-3 gamma
    0.97 0.99 trains all four combinations side by side, with num_seeds seeds each."""
    sweep_random: CountOrZero = 0
    """Number of settings to draw at random; each name of --sweep then has two values, the ends of
    its range. 0: all combinations."""

    # Algorithm
    gamma: UnitInterval = 0.99
    """Discount per environment step."""
    learning_rate: Annotated[float, above(0, finite=True)] = 1e-3
    """Adam's step size at the start."""
    learning_rate_end: Annotated[float | None, at_least(0, finite=True)] = 0.0
    """Step size at the end of the run, reached linearly. None: constant."""
    buffer_size: Count = 25_000
    """Transitions that the replay memory of a member holds, at least num_envs and batch_size."""
    batch_size: Count = 64
    """Transitions of a member sampled for one gradient step."""
    learning_starts: CountOrZero = 500
    """Transitions before the first gradient step."""
    train_freq: Count = 16
    """Transitions for which gradient_steps gradient steps are taken."""
    gradient_steps: CountOrZero = 1
    """Gradient steps per train_freq transitions. The replay ratio, sampled transitions per
    collected one, is gradient_steps * batch_size / train_freq."""
    target_update_interval: Annotated[int, at_least(0, note="0: off")] = 16
    """Transitions between synchronisations of the target network."""
    tau: Annotated[float, between(0, 1, "(]")] = 0.02
    """Weight of the online network in a synchronisation; 1 is a hard copy."""
    eps_start: UnitInterval = 1.0
    """Probability of a random action at the start."""
    eps_end: UnitInterval = 0.05
    """Probability of a random action once the decay is over."""
    eps_fraction: UnitInterval = 0.5
    """Fraction of total_timesteps over which that probability decays linearly; 0: eps_end from the
    start."""
    eps_repeat: Annotated[float, between(0, 1, "[)")] = 0.0
    """Probability that a random action is repeated for one more step. It then lasts
    1 / (1 - eps_repeat) steps on average, which explores where single steps lead nowhere."""
    max_grad_norm: Annotated[float, above(0, note="inf: no clipping")] = 10.0
    """Global norm to which the gradients of a member are clipped."""
    hidden_sizes: Annotated[tuple[int, ...], at_least(1, each=True)] = (128, 128)
    """Widths of the hidden layers."""
    double_q: bool = False
    """Double DQN: the online network selects the successor's action, the target network evaluates
    it. Reduces the overestimation of plain DQN, at the cost of one more forward pass."""
    loss: LossName = "huber"
    """Loss of the TD error: huber (smooth L1, beta 1) or squared."""

    # Execution
    device: str = "auto"
    """Device of environments, replay and learner: auto (cuda, then cpu), cpu, cuda, cuda:1, mps, or
    part of a card's name, such as h100."""
    engine: EngineName = "auto"
    """How a chunk of vector steps is run: eager; fused, by one C++ program that is generated for
    the shapes of this run (1 s, kept for the next run); compile, by torch's compiler (30 to 40 s,
    kept too); graph, captured in CUDA graphs. auto compares the gradient steps to come with the
    time to compile, and prints its choice. Results differ only by rounding."""
    keep_generated: Path | None = None
    """Folder to write the program of the engine fused to, as readable C++."""
    chunk_steps: Count = 256
    """Maximum number of vector steps per chunk; never changes the result."""
    num_threads: Annotated[int, between(0, 1_024, note="0: torch's own choice")] = 1
    """CPU threads. Small networks are fastest on one."""
    matmul_precision: MatmulPrecision = "highest"
    """Float32 matrix products on a GPU: highest, in float32; high, in TF32, with 10 bits of
    mantissa instead of 23, where the card has it. A CPU multiplies in float32 either way."""

    # Records
    name: str = "dqn"
    """Name of the experiment, part of the run directory's name."""
    resume: Path | None = None
    """Directory of a run to go on with, from its newest checkpoint. Only settings that do not
    change what is learned may be given with it, such as total_timesteps, intervals, logging,
    engine, device and threads; all others stay as they were."""
    run_dir: Path | None = None
    """Directory to write, new or empty. None: runs/<env>__<name>__s<seed>__<UTC time>."""
    log_interval: IntervalOrNone = None
    """Transitions between log points. None: a 50th of the run, at most 2,048 vector steps."""
    eval_interval: IntervalOrNone = None
    """Transitions between greedy evaluations. None: a 16th of the run, at most 8,192 vector
    steps; on the host at least the steps that an evaluation may take. The end of the run is always
    evaluated."""
    eval_episodes: Annotated[int | None, at_least(0, note="0: no evaluation")] = None
    """Episodes of each member per evaluation. None: 100; on the host, where an episode may take as
    long as a part of the training, total_timesteps / 16 divided by the time limit, in 10 .. 100.
    Without an evaluation there is no best agent."""
    eval_envs: Annotated[int | None, at_least(0, note="0: those of training")] = None
    """Copies of the environment that play an evaluation, for each member; they are used again until
    all episodes are over. None: one for each episode, but on the host at most num_envs. With 0, or
    if no further copy can be made, an environment on the host plays on the copies of training,
    which begin new episodes afterwards."""
    stop_at_return: Annotated[float | None, finite()] = None
    """End the run at the first evaluation in which every member's mean return is at least this."""
    stop_when_optimal: bool = False
    """End the run at the first evaluation in which every member's policy is optimal and its values
    are within 0.05 of the exact ones; for environments that can be solved exactly."""
    checkpoint_interval: IntervalOrNone = None
    """Transitions between checkpoints. None: a quarter of the run, at most 131,072 vector
    steps. The end of the run is always saved."""
    checkpoint_replay: bool = True
    """Save replay in checkpoints too. Without it, a resumed run fills replay again before its next
    gradient step."""
    keep_checkpoints: Count = 2
    """Checkpoints to keep: the newest, checkpoint.pt, and the ones before, checkpoint.1.pt, ..."""
    report: bool = True
    """Write report.html at the end of the run, and agent.gif where the agent can be filmed (needs
    the extra: pip install -e ".[video]")."""
    quiet: bool = False
    """Print nothing but warnings and errors."""
    track: bool = False
    """Log to wandb as well; offline if the server cannot be reached."""
    wandb_project: str = "dqn_fast"
    """Project in wandb."""
    wandb_entity: str | None = None
    """User or team in wandb. None: the account's default."""
    wandb_group: str | None = None
    """Group of runs in wandb. None: the run's name."""
    wandb_tags: tuple[str, ...] = ()
    """Tags in wandb."""
    wandb_mode: Literal["online", "offline"] | None = None
    """None: WANDB_MODE if set, else online if the server answers and a key is configured."""
    tensorboard: bool = False
    """Log to TensorBoard as well; needs the extra: pip install -e ".[tensorboard]"."""

    @property
    def num_points(self) -> int:
        """Number of different settings; each is trained with num_seeds seeds."""
        return num_points(self.sweep, self.sweep_random)

    @property
    def num_members(self) -> int:
        """Number of members, M."""
        return self.num_seeds * self.num_points

    @property
    def holds_actions(self) -> bool:
        """Whether random actions of any member last."""
        return max((self.eps_repeat, *self.sweep.get("eps_repeat", ()))) > 0.0

    @property
    def members(self) -> list[dict[str, Any]]:
        """Seed and swept settings of each member."""
        return members_of(self.sweep, self.sweep_random, self.seed, self.num_seeds)

    @classmethod
    def for_env(cls, env_id: str, **settings: Any) -> Args:
        """Settings that work for an environment: its `experiment`, overridden by `settings`."""
        table = {k: v for k, v in experiment(env_id).items() if k != "env_params"}
        return cls(**{**table, "env_id": env_id, **settings})


# ------------------------------------------------------------------------------------ the loop


@dataclass
class Result:
    """What `train` returns.

    Attributes:
        q_net: Q-values of all M members at the end of the run; `load_agent` gives the best.
        env: the environment.
        summary: content of `summary.json`.
        run_dir: directory of the run.
        missing: files in it that could not be written.
    """

    q_net: QFunction
    env: TensorEnv
    summary: dict[str, Any]
    run_dir: Path
    missing: list[str]


LogHook = Callable[[int, Training, dict[str, Any]], None]


def train(
    args: Args,
    env: TensorEnv | None = None,
    on_log: LogHook | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train and write the run directory.

    Args:
        args: settings; with `args.resume`, settings at their defaults stay as they were in the run.
        env: the caller's own environment, which stays open; `from_gymnasium` converts Gymnasium's.
            None makes `args.env_id` with `args.env_params`.
        on_log: called after every log point and evaluation with global_step, the training and the
            metrics.
        should_stop: called between chunks, in evaluations, and while the loop waits for a compiler;
            if it returns true, the run is saved and ends. So it does at a signal of STOP_SIGNALS,
            which then has its usual effect.

    Raises:
        UsageError: a setting is not allowed; nothing was written.
        TrainingError: a loss or gradient of every member is not finite; the run so far is saved,
            and the checkpoints are those before.
        EnvError: the environment broke its contract; the run so far is saved, and the checkpoints
            are those before.
        KeyboardInterrupt: SIGINT came; the run so far is saved.
    """
    with standard_state(), ExitStack() as stack:
        resumed = None
        args = check_settings(args)
        if env is not None:
            need_tensor_env(env)
        if args.resume is not None:
            resumed = open_run(args.resume)
            stack.callback(resumed.lock.release)
            if env is None:
                usual = type(args)()
                resumed.named(
                    None if args.env_id == usual.env_id else args.env_id,
                    args.env_params,
                    args.env,
                    args.wrappers or None,
                )
            args = resumed.complete(args, env)
        return train_or_resume(args, env, resumed, on_log, should_stop)


def train_or_resume(
    args: Args,
    env: TensorEnv | None,
    resumed: Resumption | None,
    on_log: LogHook | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """`train` with complete settings; `resumed` is the run that goes on, or None."""
    began = time.perf_counter()
    args, runs = check(args), absolute(Path("runs"))
    if resumed is None:
        refuse_used_dir(args.run_dir)
    with stop_requests() as stop, ExitStack() as stack:
        if resumed is not None:
            stack.callback(resumed.lock.release)
        conditions = args.num_threads, device_of(args), args.matmul_precision
        stack.enter_context(run_conditions(*conditions))
        first_step = 0 if resumed is None else resumed.global_step
        stack.enter_context(global_numbers(args.seed, 0, first_step))
        training = stack.enter_context(closing(setup(args, env, resumed)))
        env, args = training.env, training.args
        eval_episodes = args.eval_episodes or 0
        on_training_copies = env.on_host and args.eval_envs == 0
        q_net, noise, exact, plan = training.q_net, training.noise, training.exact, training.plan
        gammas = member_values(args, "gamma")
        differs = bool(args.sweep.keys() & {"eps_start", "eps_end", "eps_fraction"})
        stop.defer()

        def stops() -> bool:
            return should_stop() or stop()

        training.runner.should_stop = stops
        if resumed is None:
            names = training.env_id, args.name, args.seed
            run_dir, lock = create_run_dir(args.run_dir, *names, runs)
            stack.callback(lock.release)
        else:
            run_dir = resumed.run_dir
        config = describe_training(training)
        if resumed is not None:
            config["resumed"] = resumed.history()
        metrics = Metrics(training.dqn.num_members, most_episodes(args), noise.device)
        with RunRecord(run_dir, config, training, metrics, began, resumed) as run:
            training.runner.on_change = run.changed_engine

            def played() -> Evaluation:
                """Play an evaluation; on the training copies where there are no others."""
                nonlocal on_training_copies
                play = partial(play_episodes, q_net=q_net, num_episodes=eval_episodes, noise=noise)
                play = partial(play, epoch=run.num_evaluations, gamma=gammas, should_stop=stops)
                if not on_training_copies:
                    copies = copies_of(env.on_host, eval_episodes, args.num_envs, args.eval_envs)
                    try:
                        return play(env.for_evaluation(), num_copies=copies)
                    except CopiesError as error:
                        on_training_copies = True
                        warn(f"evaluations interrupt the episodes of training: {error}")
                try:
                    result = play(env, num_copies=args.num_envs)
                except StopRequested:
                    begin_episodes()
                    raise
                begin_episodes()
                return result

            def begin_episodes() -> None:
                step = run.global_step
                cut = training.dqn.begin_episodes_(training.state, noise, step // args.num_envs)
                if cut:
                    metrics.cut_(step, args.num_envs, cut)

            def side_jobs() -> bool:
                """Evaluate, log and save where it is due, always in this order; returns whether the
                run goes on. Only an evaluation waits for the device."""
                step = run.global_step
                log, evaluation, save = plan.due(step)
                done = step >= plan.end
                if log or evaluation or save or done:
                    run.keep_good()
                row: dict[str, Any] = {}
                if evaluation or done:
                    run.check_finite()
                if eval_episodes and (evaluation or done):
                    eval_began, run.owes_side_jobs = time.perf_counter(), True
                    result = played()
                    known = exact.compare(q_net) if exact else {}
                    row = run.evaluated(result, known)
                    run.eval_s += time.perf_counter() - eval_began
                    run.owes_side_jobs = False
                if reached_goal(args, row):
                    run.status = "solved"
                ends = done or run.status == "solved"
                if log or ends:
                    log_point(row)
                elif row:
                    run.log(row)
                if save or ends:
                    run.save()
                report_rows(wait=ends)
                return not ends

            def log_point(row: dict[str, Any]) -> None:
                epsilon = training.schedules.epsilon(run.global_step).tolist()
                row["charts/epsilon"] = epsilon if differs else epsilon[0]
                run.log_point(row, q_probe(q_net, training.probe))

            def report_rows(wait: bool) -> None:
                """Turn copies that have arrived into rows and files."""
                for global_step, metrics_now in run.settle(wait=wait or on_log is not None):
                    if on_log is not None:
                        on_log(global_step, training, metrics_now)

            try:
                goes_on = not run.solved and (not run.owes_side_jobs or side_jobs())
                for chunk, record in training.chunks() if goes_on else ():
                    metrics.add_(record, chunk.before, chunk.first_update)
                    run.advance(chunk)
                    if not side_jobs() or stops():
                        break
            except StopRequested:  # before a chunk, or in an evaluation, which is made again
                pass
            if run.owes_side_jobs or (run.status == "done" and run.global_step < plan.end):
                run.status = "stopped"
                run.keep_good()
                run.save()
                if not run.owes_side_jobs:
                    log_point({})  # of a part of a window; a resumed run takes it back
                report_rows(wait=True)
        return Result(q_net, env, run.summary, run_dir, run.missing)


def describe_training(training: Training) -> dict[str, Any]:
    """Content of `config.json`."""
    args, runner = training.args, training.runner
    usual = Args.for_env(
        training.env_id, num_envs=args.num_envs, total_timesteps=args.total_timesteps
    )
    return describe(
        vars(args),
        vars(Args.for_env(training.env_id))
        | intervals(usual)
        | evaluations_on(training.env, usual),
        training.env_id,
        training.env,
        training.recipe,
        training.plan,
        training.dqn,
        training.noise.device,
        training.exact,
        args.members,
        runner.engine,
        runner.reason,
    )


def reached_goal(args: Args, row: dict[str, Any]) -> bool:
    """Whether an evaluation's metrics meet --stop-when-optimal or --stop-at-return."""
    if args.stop_when_optimal and all(row.get("exact/policy_optimal", [False])):
        return True
    returns = row.get("eval/return_mean", [-math.inf])
    return args.stop_at_return is not None and min(returns) >= args.stop_at_return


def most_episodes(args: Args) -> int:
    """Maximum number of episodes listed between two log points: each ends in its own transition,
    and a log point is late by up to num_envs - 1 transitions of a member."""
    log_interval = intervals(args)["log_interval"] or args.total_timesteps
    interval = min(log_interval, args.total_timesteps)
    return min((interval + args.num_envs - 1) * args.num_members, 2**20)


# ------------------------------------------------------------------------------- command line


def asked_env_id(argv: list[str]) -> str:
    """The value of --env-id, on which the defaults of the other flags depend.

    Raises:
        UsageError: --env is given too.
    """
    env_id, env = asked(argv, "--env-id"), asked(argv, "--env")
    if env_id is not None and env is not None:
        raise UsageError(f"--env {env}: must not be given together with --env-id {env_id}")
    return env_id or Args.env_id


def asked(argv: list[str], name: str) -> str | None:
    """The value of a flag; None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*{name, "--" + name[2:].replace("-", "_")}, dest="value")
    try:
        value: str | None = parser.parse_known_args(argv)[0].value
        return value
    except argparse.ArgumentError:  # no value: tyro reports it
        return None


@command(needs_output=False)
def main() -> int:
    """Train from the command line; returns the exit status."""
    argv, resumed = sys.argv[1:], None
    try:
        if (run_dir := asked(argv, "--resume")) is not None:
            resumed = open_run(Path(run_dir))
            args = parse(Args, default=resumed.args_of(Args))
            words = expand_flags(Args, argv)
            resumed.named(
                asked(argv, "--env-id"),
                args.env_params if "--env-params" in words else {},
                asked(argv, "--env"),
                args.wrappers if "--wrappers" in words else None,
            )
            args = resumed.complete(args, exact=True)
        else:
            args = parse(Args, default=Args.for_env(asked_env_id(argv)))
        require(*("plotly", "jinja2") * args.report, *("wandb",) * args.track)
        result = train_or_resume(args, None, resumed)
    except (UsageError, TrainingError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        if resumed is not None:
            resumed.lock.release()
        gc.freeze()  # saves 0.8 s at exit, in which the interpreter would visit torch's objects
    return 1 if result.missing else 0


if __name__ == "__main__":
    sys.exit(main())
