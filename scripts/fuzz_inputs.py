"""Random command lines and random settings: does bad input end in one line, with nothing left?

    python -m scripts.fuzz_inputs --seed 0 --command-lines 2000 --settings 500

A command line mixes tiny settings that train in less than a second with values that make no sense.
`check_command_line` and `check_settings_from_python` run one in this process and return what is
wrong, in words; None: nothing is. Memory is limited to 1.5 GB above what the process holds, so that
a size without bound is a MemoryError here and not the end of the machine. A run that is still going
after some seconds is asked to stop by SIGTERM, as a user would.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from dqn_fast import train as train_module
from dqn_fast.record.run import TrainingError
from dqn_fast.settings import UsageError
from dqn_fast.train import Args

PATIENCE, MOST_SECONDS = 2.0, 30.0
"""Seconds after which a run is asked to stop, and by which it must have ended."""
MOST_BYTES = 1.5e9
"""Address space that one command may take in addition."""

FILES = ("config.json", "summary.json", "checkpoint.pt", "metrics.jsonl")
"""What a finished run has at least."""

# ---------------------------------------------------------------------------------- the generator

HUGE = (2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, 10**12, 10**30)
INTEGERS = ("0", "-1", "1e3", "1e308", "1e400", "nan", "-inf", "", " ", "abc", "1_0", "٣", "²",
            "1.5", "0x10", "True", "None", "[1]", "{}", "+3", "--5", "9" * 400, "9" * 5_000,
            *map(str, HUGE), *(str(-n) for n in HUGE))  # fmt: skip
NUMBERS = ("0", "1", "-1", "0.5", "1e-320", "1e-30", "1e30", "1e308", "1e400", "-1e400", "nan",
           "inf", "-inf", "", "abc", "None", "1,5", "0x1p-3", "True", "9" * 400)  # fmt: skip
TEXTS = ("", " ", "a" * 255, "a" * 256, "b" * 5_000, "a/b", "..", ".", "a\nb", "a\tb", "naïve",
         "日本語", "😀", "\udc80", "-", "--", "-x", "None", "a:b", "{}", "<b>", "%s", "\\",
         "é" * 120, "a\u2028b", "\x1b[31m")  # fmt: skip
ENV_IDS = ("LineWorld-v0", "CartPole-v1", "FrozenLake-v1", "MountainCar-v0", "Acrobot-v1",
           "gym:CartPole-v1", "CliffWalking-v1", "Nope-v0", "gym:", ":", "gym:Nope-v0", "a.b:C-v0",
           ".a:B-v0", "json:X-v0", "LineWorld", "gym:LineWorld-v0", "Pendulum-v1")  # fmt: skip
DEVICES = ("cpu", "auto", "cuda", "cuda:99", "cpu:1", "cpu:99999999999999999999", "meta", "mps",
           "xla", "quantum", ":", "cuda:-1", "cpu:", "cuda:" + "9" * 100)  # fmt: skip

Draw = Callable[[random.Random], Sequence[str]]


def _one_of(*values: str) -> Draw:
    return lambda rng: [rng.choice(values)]


def _several(*values: str) -> Draw:
    return lambda rng: [rng.choice(values) for _ in range(rng.choice((0, 1, 2, 3, 3, 40)))]


def _words(*lines: str) -> Draw:
    return lambda rng: rng.choice(lines).split()


GOOD: dict[str, Draw] = {
    "num-envs": _one_of("1", "2", "4", "7"),
    "num-seeds": _one_of("1", "2", "3"),
    "total-timesteps": _one_of("1", "30", "64", "128", "1e2"),
    "seed": _one_of("0", "3", str(2**53)),
    "gamma": _one_of("0", "0.9", "1", "0.99999"),
    "learning-rate": _one_of("1e-3", "1e-30", "0.1"),
    "learning-rate-end": _one_of("0", "1e-4", "None"),
    "buffer-size": _one_of("16", "100", "1000"),
    "batch-size": _one_of("1", "4", "8"),
    "learning-starts": _one_of("0", "10", "1000", str(2**53)),
    "train-freq": _one_of("1", "4", "16", str(2**53)),
    "gradient-steps": _one_of("0", "1", "3"),
    "target-update-interval": _one_of("0", "1", "16", str(2**53)),
    "tau": _one_of("1", "0.02", "1e-320"),
    "eps-fraction": _one_of("0", "0.5", "1"),
    "eps-repeat": _one_of("0", "0.5"),
    "max-grad-norm": _one_of("inf", "10", "1e-30"),
    "hidden-sizes": lambda rng: [rng.choice(("1", "4", "16")) for _ in range(rng.randrange(4))],
    "chunk-steps": _one_of("1", "32", str(2**53)),
    "log-interval": _one_of("0", "1", "16", "None", str(2**53)),
    "eval-interval": _one_of("0", "16", "64", "None", str(2**53)),
    "checkpoint-interval": _one_of("0", "16", "None", str(2**53)),
    "eval-episodes": _one_of("1", "3"),
    "name": _one_of("dqn", "naïve", "日本語", "a b", "..", "<b>"),
    "env-params": _words("", "n_states 5", "max_steps 9", "n_states 1e1 slip_prob 0.1"),
    "sweep": _words("", "gamma 0.5 0.9", "tau 0.1 1 gamma 1"),
    "stop-at-return": _one_of("-5", "0.5", "None"),
    "loss": _one_of("huber", "squared"),
    "wandb-tags": _several("a", "b"),
}  # fmt: skip

LARGE = ("50", "1000", str(10**9), str(2**31 - 1), str(2**31), str(10**12), str(2**53))
"""Whole numbers that are allowed by themselves; those above 1,000 do not fit into memory."""
SMALLEST = ("5e-324", "1e-320", "1e-45", "1e-39", "1e-30")
LARGEST = ("1e30", "3.5e38", "1e39", "1.7e308")

EXTREME: dict[str, Draw] = {
    **dict.fromkeys(
        ("num-envs", "num-seeds", "buffer-size", "batch-size", "gradient-steps", "eval-episodes",
         "hidden-sizes", "sweep-random"),
        _one_of(*LARGE),
    ),
    **dict.fromkeys(
        ("total-timesteps", "seed", "learning-starts", "train-freq", "target-update-interval",
         "chunk-steps", "log-interval", "eval-interval", "checkpoint-interval"),
        _one_of("1", "2", "3", "63", "129", *LARGE),
    ),
    "num-threads": _one_of("0", "2"),
    "learning-rate": _one_of(*SMALLEST, *LARGEST),
    "learning-rate-end": _one_of(*SMALLEST, *LARGEST),
    "max-grad-norm": _one_of(*SMALLEST, *LARGEST),
    **dict.fromkeys(("tau", "eps-end", "eps-fraction", "gamma"), _one_of(*SMALLEST, "1")),
    "eps-repeat": _one_of(*SMALLEST, "0.9999999999999999"),
    "stop-at-return": _one_of(*LARGEST, "-1.7e308"),
    "name": _one_of("a" * 200, "é" * 100, "a" * 100, "-", "%s", "{}", "a\\b", "😀" * 60, "~"),
    "run-dir": _one_of("new", "new/er/run", "a" * 255, "é" * 120, "full/../up", "~", " "),
    "wandb-project": _one_of("a" * 255, "%", "é"),
    "env-id": _one_of("LineWorld-v0", "CartPole-v1", "FrozenLake-v1", "gym:CartPole-v1",
                      "CliffWalking-v1", "MountainCar-v0", "Acrobot-v1", "a" * 250),
    "env-params": lambda rng: (
        rng.choice(("n_states", "n_states", "max_steps", "max_steps", "max_episode_steps",
                    "goal_reward", "step_penalty", "slip_prob", "gravity")),
        rng.choice((*LARGE, *SMALLEST, *LARGEST, "2", "3e4", "-1e308")),
    ),
    "sweep": lambda rng: (
        rng.choice(("gamma", "tau", "learning_rate", "max_grad_norm", "eps_repeat")),
        *(f"{rng.random():.6f}" for _ in range(rng.choice((1, 2, 2, 2, 50, 20_000)))),
        *rng.choice(((), (), ("eps_end", "0", "1"), ("gamma", "1e-300"))),
    ),
    "double-q": _one_of("True", "False"),
}  # fmt: skip
"""Values that pass the checks of one flag alone, or nearly."""

BAD: dict[str, Draw] = {
    **dict.fromkeys(
        ("num-envs", "num-seeds", "total-timesteps", "seed", "buffer-size", "batch-size",
         "learning-starts", "train-freq", "gradient-steps", "target-update-interval",
         "chunk-steps", "log-interval", "eval-interval", "checkpoint-interval", "eval-episodes",
         "sweep-random"),
        _one_of(*INTEGERS),
    ),
    "num-threads": _one_of("2", "-1", "1025", str(2**31), str(2**63), "", "nan"),
    **dict.fromkeys(
        ("gamma", "learning-rate", "learning-rate-end", "tau", "eps-start", "eps-end",
         "eps-fraction", "eps-repeat", "max-grad-norm", "stop-at-return"),
        _one_of(*NUMBERS),
    ),
    **dict.fromkeys(
        ("name", "wandb-project", "wandb-entity", "wandb-group", "wandb-mode", "loss", "engine",
         "matmul-precision", "vectorization-mode", "no-such-flag"),
        _one_of(*TEXTS),
    ),
    "wandb-tags": _several(*TEXTS),
    "env-id": _one_of(*ENV_IDS, *TEXTS),
    "device": _one_of(*DEVICES, *TEXTS),
    "hidden-sizes": _several(*INTEGERS),
    "env-params": lambda rng: [
        word
        for _ in range(rng.choice((1, 1, 2)))
        for word in (
            rng.choice(("n_states", "max_steps", "slip_prob", "goal_reward", "nope", "map_name",
                        "is_slippery", "max_episode_steps", *TEXTS)),
            rng.choice((*INTEGERS, *NUMBERS, *TEXTS)),
        )
    ][: rng.choice((4, 4, 3))],
    "sweep": lambda rng: [
        rng.choice(("gamma", "tau", "learning_rate", "seed", "eps-end", "max_grad_norm", *NUMBERS))
        for _ in range(rng.choice((1, 2, 4, 8, 2_000)))
    ],
    "run-dir": _one_of("", ".", "..", "file", "file/below", "full", "new/er/run", "a" * 300,
                       "a/" * 3_000, "/proc/nowhere", "/dev/null", "link", "loop", "read-only/run",
                       "a\nb", "\udc80", "-", "~", "~nobody/x"),
    "double-q": _one_of("True", "maybe", "", "1"),
    "report": _one_of("False", "None"),
    "help": _one_of("x"),
}  # fmt: skip


def random_command_lines(seed: int, count: int) -> list[list[str]]:
    """Words after `python -m dqn_fast.train`; the same for equal seeds.

    Each is a run of at most 128 transitions in which up to three flags have odd values. Values of
    run-dir are names in the folder that `check_command_line` prepares.
    """
    rng = random.Random(seed)
    return [_command_line(rng) for _ in range(count)]


def _command_line(rng: random.Random) -> list[str]:
    flags: dict[str, Sequence[str]] = {
        "num-envs": ["4"], "buffer-size": ["128"], "batch-size": ["8"], "hidden-sizes": ["8"],
        "total-timesteps": ["128"], "eval-episodes": ["2"], "learning-starts": ["16"],
        "engine": ["eager"],
    }  # fmt: skip
    for name in rng.sample(sorted(GOOD), rng.randrange(5)):
        flags[name] = GOOD[name](rng)
    odd = EXTREME if rng.random() < 0.7 else BAD
    for name in rng.sample(sorted(odd), rng.choice((0, 1, 1, 2, 2, 3))):
        flags[name] = odd[name](rng)
    if rng.random() < 0.1:  # otherwise few large values come past these two
        flags["buffer-size"] = flags["total-timesteps"] = [str(10**12)]
    words = ["--quiet", "--no-report"]
    for name, values in flags.items():
        words += _written(rng, name, values)
    extra = rng.random()
    if extra < 0.03:
        words.insert(rng.randrange(len(words) + 1), rng.choice(("--", "-h", "--seed", *TEXTS)))
    elif extra < 0.06:  # a flag twice
        name = rng.choice(sorted(BAD))
        words += _written(rng, name, BAD[name](rng))
    return [word.replace("\0", "") for word in words]  # as the system does


def _written(rng: random.Random, name: str, values: Sequence[str]) -> list[str]:
    """A flag in one of the forms that are read."""
    word = f"--{name.replace('-', '_') if rng.random() < 0.2 else name}"
    form = rng.random()
    if form < 0.15 and len(values) == 1:
        return [f"{word}={values[0]}"]
    if form < 0.4 and name in ("hidden-sizes", "wandb-tags"):
        return [f"{word}=[{', '.join(values)}]"]
    return [word, *values] if form < 0.995 else [word]


def random_settings(seed: int, count: int) -> list[dict[str, Any]]:
    """Keyword arguments of `train.Args`, for Python; the same for equal seeds."""
    rng = random.Random(seed)
    return [_settings(rng) for _ in range(count)]


def _settings(rng: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_envs": 4, "buffer_size": 128, "batch_size": 8, "hidden_sizes": (8,),
        "total_timesteps": 128, "eval_episodes": 2, "learning_starts": 16, "engine": "eager",
        "quiet": True, "report": False,
    }  # fmt: skip
    names = sorted(vars(Args()).keys() - {"quiet", "report", "track", "tensorboard"})
    if rng.random() < 0.5:
        for name in rng.sample(names, rng.choice((1, 1, 2, 3))):
            settings[name] = _odd_value(rng)
        return settings
    for flag in rng.sample(sorted(EXTREME), rng.choice((1, 2, 3))):
        words, name = EXTREME[flag](rng), flag.replace("-", "_")
        values = [_python_value(word) for word in words]
        if name == "sweep":
            numbers = [value for value in values if not isinstance(value, str)]
            settings[name] = {str(values[0]): rng.choice((tuple, list))(numbers)}
        elif name == "env_params":
            settings[name] = dict([values])
        else:
            settings[name] = tuple(values) if name == "hidden_sizes" else values[0]
    return settings


def _python_value(word: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return {"True": True, "False": False, "None": None}.get(word, word)


def _odd_value(rng: random.Random) -> Any:
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = 0
    for _ in range(3_000):
        deep = [deep]
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(HUGE),
        lambda: -rng.choice(HUGE),
        lambda: rng.choice((10**5_000, -(10**5_000), 1e308, 1e-320, 5e-324)),
        lambda: rng.choice((math.nan, math.inf, -math.inf, 0, 1, -1, 0.5, 2, 1 + 1e-16)),
        lambda: rng.choice((np.int64(4), np.float32(0.5), np.nan, np.zeros(3), np.uint64(2**63))),
        lambda: rng.choice((torch.tensor(3), torch.tensor([1.0, 2.0]), torch.tensor(math.nan))),
        lambda: rng.choice(TEXTS) + rng.choice(("", "", "\0")),
        lambda: rng.choice(((), (1,), [3, 4], (2**63,), (math.nan,), ("a", "b"), [None], {1: 2})),
        lambda: rng.choice((None, True, False, b"x", 1j, object(), abs, Args, {3}, range(3))),
        lambda: rng.choice((endless, deep, {"a": endless}, {"a" * 10_000: 1}, {"": 1}, {"\0": 1})),
        lambda: rng.choice((Path("x" * 300), Path("a\0b"), Path("new"), Path())),
        lambda: {rng.choice(("n_states", "max_steps", "gamma", "tau", "x")): _odd_number(rng)},
        lambda: {"gamma": tuple(_odd_number(rng) for _ in range(rng.choice((1, 2, 300))))},
        lambda: tuple(rng.choice((1, 8, 2**40)) for _ in range(rng.choice((1, 3, 100)))),
    ]
    if rng.random() < 0.3:
        return _odd_number(rng)
    return rng.choice(kinds)()


def _odd_number(rng: random.Random) -> Any:
    return rng.choice(
        (*HUGE, 0, 1, -1, 3, 0.5, math.nan, math.inf, 1e308, 10**400, "5", None, True)
    )


# ------------------------------------------------------------------------------------- the checks


@dataclass
class Outcome:
    """How a call ended.

    Attributes:
        status: exit status; None: an exception that is not SystemExit.
        error: the exception's traceback.
        output: what was written to stdout.
        errors: what was written to stderr.
        seconds: how long it took.
        stopped: whether it was asked to stop.
    """

    status: int | None
    error: str
    output: str
    errors: str
    seconds: float
    stopped: bool


@contextlib.contextmanager
def prepared_folder() -> Iterator[Path]:
    """A working directory with a file, a full directory, links and a directory without rights."""
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        (folder / "file").write_text("mine")
        (folder / "full").mkdir()
        (folder / "full" / "mine").write_text("mine")
        (folder / "link").symlink_to("missing")
        (folder / "loop").symlink_to("loop")
        (folder / "read-only").mkdir(mode=0o555)
        os.chdir(folder)
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def limited_memory(most_bytes: float) -> Iterator[None]:
    """Limit the address space to so many bytes above what it has now."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + int(most_bytes), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _call(function: Callable[[], object]) -> Outcome:
    """Call it with captured output, limited memory, and SIGTERM after PATIENCE."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: None)  # until `main` sets its own
    timer = threading.Timer(PATIENCE, stop)
    timer.daemon = True
    timer.start()
    began, status, error = time.perf_counter(), 0, ""
    outcome: int | None = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            limited_memory(MOST_BYTES),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error", RuntimeWarning)
            status = function()  # type: ignore[assignment]
            outcome = status if isinstance(status, int) else 0
    except SystemExit as end:
        outcome = end.code if isinstance(end.code, int) else 1
    except BaseException:
        outcome, error = None, traceback.format_exc()
    finally:
        timer.cancel()
        timer.join()  # its signal, if it is on its way, arrives while there is a handler
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.unfreeze()  # `main` freezes at its end, which is not the end here
    seconds = time.perf_counter() - began
    return Outcome(outcome, error, out.getvalue(), err.getvalue(), seconds, stopped.is_set())


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _run_dirs(folder: Path) -> list[Path]:
    return [path.parent for path in folder.rglob("config.json")]


def check_command_line(words: Sequence[str]) -> str | None:
    """Run `python -m dqn_fast.train WORDS` in this process; returns what is wrong, or None.

    Right is: status 0 with a whole run directory; 1 with one line where the numbers of a run were
    no longer finite; 143 after SIGTERM; 2 with one line that names a flag, or with tyro's message,
    and nothing written.
    """
    argv = sys.argv
    with prepared_folder() as folder:
        before = _names(folder)
        try:
            sys.argv = ["dqn_fast.train", *words]
            outcome = _call(train_module.main)
        finally:
            sys.argv = argv
        return _judge(outcome, folder, before)


def _judge(outcome: Outcome, folder: Path, before: set[str]) -> str | None:
    if outcome.error:
        return outcome.error
    if "Traceback" in outcome.errors + outcome.output:
        return f"a traceback was printed: {outcome.errors}"
    if outcome.seconds > MOST_SECONDS:
        return f"took {outcome.seconds:.1f} s"
    lines, written = outcome.errors.splitlines(), _names(folder) - before
    if outcome.status == 2:
        if written:
            return f"refused, and left {sorted(written)}: {outcome.errors}"
        if len(lines) == 1 and re.match(r"error: --[a-z-]+", lines[0]):
            return None if len(lines[0]) <= 1_100 else f"a line of {len(lines[0])} characters"
        if "For full helptext" in outcome.errors:  # tyro's
            return None
        return f"not one line that names a flag: {outcome.errors!r}"
    if outcome.status == 0 and not written and not lines:
        return None if "--help" in outcome.output or "usage" in outcome.output else "nothing done"
    if outcome.status == 1 and not (len(lines) == 1 and "not finite" in lines[0]):
        return f"status 1: {outcome.errors!r}"
    if outcome.status not in (0, 1) and not (outcome.status == 143 and outcome.stopped):
        return f"status {outcome.status}: {outcome.errors!r}"
    if outcome.status == 0 and lines:
        return f"a run that ended well says {outcome.errors!r}"
    found = _run_dirs(folder)
    missing = [name for path in found for name in FILES if not (path / name).exists()]
    if len(found) != 1 or (missing and outcome.status == 0):
        return f"run directories {found}, missing {missing}; {outcome.errors}"
    return None


def check_settings_from_python(settings: dict[str, Any]) -> str | None:
    """Call `train(Args(**settings))`; returns what is wrong, or None.

    Right is UsageError with one line and nothing written, or a run.
    """
    with prepared_folder() as folder:
        before = _names(folder)
        deadline = time.monotonic() + PATIENCE

        def call() -> int:
            try:
                train_module.train(
                    Args(**settings), should_stop=lambda: time.monotonic() > deadline
                )
            except UsageError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except TrainingError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            return 0

        return _judge(_call(call), folder, before)


# ------------------------------------------------------------------------------------ in batches


def check_many(kind: str, seed: int, count: int, timeout_s: float = 600.0) -> list[str]:
    """Check inputs in a process of their own, with a watchdog.

    Args:
        kind: "command-lines" or "settings".
        seed: of the generator.
        count: how many.
        timeout_s: seconds after which the process is killed, which counts as a failure.

    Returns:
        A text for each failure, with the input.
    """
    command = [sys.executable, "-m", "scripts.fuzz_inputs", "--worker", kind, "--seed", str(seed)]
    command += ["--count", str(count)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except subprocess.TimeoutExpired as expired:
        last = (expired.stdout or b"").decode(errors="replace")[-2_000:]
        return [f"{kind}, seed {seed}: no end after {timeout_s:.0f} s, at {last}"]
    found = [part.strip() for part in done.stdout.split("\f") if part.startswith("FAILED")]
    if done.returncode not in (0, 1) or "\fEND" not in done.stdout:
        last = done.stdout[-1_000:] + done.stderr[-1_000:]
        found.append(f"{kind}, seed {seed}: ended with status {done.returncode}: {last}")
    return found


def _work(kind: str, seed: int, count: int) -> int:
    """Check inputs one by one; a form feed separates what is printed about each."""
    torch.set_num_threads(1)
    failed = 0
    if kind == "command-lines":
        inputs: list[Any] = list(random_command_lines(seed, count))
        check: Callable[[Any], str | None] = check_command_line
    else:
        inputs, check = list(random_settings(seed, count)), check_settings_from_python
    for i, given in enumerate(inputs):
        shown = ascii(given) if kind == "command-lines" else _shown(given)
        print(f"\f{i} {shown[:3_000]}", flush=True)
        if (wrong := check(given)) is not None:
            failed += 1
            print(f"\fFAILED {i} {shown[:3_000]}\n{wrong[-3_000:]!a}", flush=True)
        if i % 50 == 0:
            gc.collect()
    print("\fEND", flush=True)
    gc.freeze()  # as `main` of training does at its end
    return int(failed > 0)


def _shown(settings: dict[str, Any]) -> str:
    texts = []
    for name, value in settings.items():
        try:
            texts.append(f"{name}={repr(value)[:200]}")
        except Exception as error:  # no text: thousands of digits, or too deep
            texts.append(f"{name}=({type(value).__name__}: {type(error).__name__})")
    return ascii(", ".join(texts))


@dataclass
class FuzzArgs:
    """Feed random inputs to training, and print what does not end in one line."""

    seed: int = 0
    """Seed of the generators."""
    command_lines: int = 200
    """Random command lines."""
    settings: int = 100
    """Random settings from Python."""
    batch: int = 100
    """Inputs that one process checks."""


def main() -> int:
    """Print every failure and a count; returns 1 if there is one."""
    args = tyro.cli(FuzzArgs)
    failures: list[str] = []
    for kind, total in (("command-lines", args.command_lines), ("settings", args.settings)):
        for start in range(0, total, args.batch):
            count = min(args.batch, total - start)
            found = check_many(kind, args.seed + start, count)
            for failure in found:
                print(failure, flush=True)
            failures += found
    print(f"{args.command_lines} command lines, {args.settings} settings: {len(failures)} failures")
    return int(bool(failures))


def worker() -> int:
    """One batch of `check_many`: --worker KIND --seed S --count N."""
    _, kind, _, seed, _, count = sys.argv[1:]
    return _work(kind, int(seed), int(count))


if __name__ == "__main__":
    sys.exit(worker() if sys.argv[1:2] == ["--worker"] else main())
