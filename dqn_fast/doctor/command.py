"""Settings of the doctor, and the order of its checks."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dqn_fast.device import choose_device, run_conditions
from dqn_fast.doctor.environment import Subject, check_environment, find
from dqn_fast.doctor.findings import Finding, ok
from dqn_fast.doctor.machine import check_machine
from dqn_fast.doctor.plays import BrokenError
from dqn_fast.envs import make_env
from dqn_fast.settings import UsageError, at_least, check_settings, parse
from dqn_fast.train import Args


@dataclass
class DoctorArgs:
    """Say what this machine can do for a run, and whether an environment can be trained on.

    Each line is ok, a note (a run survives it) or a fault (no run can be right), and says what to
    do. Exit status: 0 without a fault, 1 with one, 2 for bad input.
    """

    env_id: str | None = None
    """Environment to check, as --env-id of dqn_fast.train; made as training makes it."""
    env: str | None = None
    """Environment to check, as module:Name; the module is imported. Name is the class of an
    environment, a callable that makes one, an id, or a VectorEnv or TensorEnv itself."""
    env_params: Annotated[
        dict[str, str | int | float | bool], tyro.conf.arg(metavar="[NAME VALUE ...]")
    ] = field(default_factory=dict)
    """Parameters of the environment, as pairs: --env-params n_states 31 slip_prob 0.1."""
    device: str = "auto"
    """Device of the runs to come, as --device of dqn_fast.train."""
    num_threads: Annotated[int, at_least(0, note="0: torch's own choice")] = 1
    """CPU threads of the runs to come."""
    json: bool = False
    """Print all findings once more, as one line of JSON, the last."""


def read_arguments() -> DoctorArgs:
    """Settings from the command line.

    Raises:
        UsageError: a value is not allowed.
    """
    args = check_settings(parse(DoctorArgs))
    if args.env_id is not None and args.env is not None:
        raise UsageError(f"--env {args.env}: must not be given together with --env-id")
    if args.env_params and args.env_id is None and args.env is None:
        name = next(iter(args.env_params))
        raise UsageError(f"--env-params {name}: needs --env-id or --env")
    try:
        choose_device(args.device)
    except ValueError as error:
        if args.device != "auto":
            raise UsageError(str(error)) from error
        return dataclasses.replace(args, device="cpu")  # the check of the cards says why
    return args


def checks(args: DoctorArgs) -> Iterator[Finding]:
    """All findings, the machine's first.

    Raises:
        UsageError: no such environment.
    """
    subject: Subject | None = None
    broken: Finding | None = None
    if args.env_id is not None or args.env is not None:
        try:
            subject = find(args.env_id, args.env, args.env_params)
        except BrokenError as error:
            broken = error.finding
    run = subject.settings() if subject else Args.for_env(Args.env_id)
    run = dataclasses.replace(run, device=args.device, num_threads=args.num_threads)
    env = subject.env if subject else make_env(run.env_id)
    try:
        with run_conditions(args.num_threads, choose_device(args.device)):
            yield from check_machine(run, env, subject.name if subject else run.env_id)
            if subject is not None:
                yield ok("environment", f"{subject.name}, made")
                yield from check_environment(subject, run)
            elif broken is not None:
                yield broken
    finally:
        env.close()
        gc.collect()
