"""Signals, standard streams and missing packages of a command, most of them in real processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dqn_fast import process
from dqn_fast.process import STOP_SIGNALS, command, require, stop_requests
from dqn_fast.train import Args, train
from tests.engines.runs import wait_until

CHECKOUT = Path(__file__).parent.parent
ENDLESS = {"total_timesteps": 10**8, "report": False, "quiet": True, "engine": "eager"}
FLAGS = [
    "--total-timesteps",
    "100000000",
    "--log-interval",
    "4096",
    "--no-report",
    "--quiet",
    "--engine",
    "eager",
]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Default handlers, which are there again after the test."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in STOP_SIGNALS[1:]}
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for number, handler in before.items():
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, handler)


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Expects KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt:
        return
    pytest.fail("no KeyboardInterrupt")


@contextlib.contextmanager
def started(*words: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process of this Python in a group of its own, which is killed at the end."""
    child = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)} | (env or {}),
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def wait_for(path: Path, child: subprocess.Popen[str]) -> None:
    wait_until(lambda: path.exists() or child.poll() is not None)
    assert child.poll() is None, child.communicate()


def status_of(run_dir: Path) -> str:
    status: str = json.loads((run_dir / "summary.json").read_text())["status"]
    return status


# -------------------------------------------------------------------------------- stop_requests


def test_sigint_is_noted_and_raised_at_the_end(capsys):
    """After `defer` the first one prints a line; KeyboardInterrupt comes at the end."""
    asked = []
    with interrupted(), stop_requests() as stop:
        stop.defer()
        asked.append(stop())
        signal.raise_signal(signal.SIGINT)
        asked.append(stop())
    assert asked == [False, True]
    assert capsys.readouterr().err == "SIGINT: saving, then ending; a second SIGINT ends at once\n"


def test_a_second_sigint_raises_in_the_middle():
    """A program that is not a command gets KeyboardInterrupt, as it is used to."""
    with interrupted(), stop_requests() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not interrupted")


def test_before_defer_a_signal_raises_at_once():
    """There is nothing to save; clean-up runs."""
    cleaned = []
    with interrupted(), stop_requests():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            cleaned.append(True)
    assert cleaned


def test_defer_raises_for_an_exception_that_was_swallowed():
    """As in a destructor, which raises nothing."""
    with interrupted(), stop_requests() as stop:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.defer()


def test_ignored_signals_and_handlers_of_the_caller_stay():
    """nohup ignores SIGHUP; who has a handler for a signal keeps it."""
    seen = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    with stop_requests() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGUSR1)
        assert not stop()
    assert seen == [signal.SIGUSR1]
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def test_a_run_from_python_is_saved_before_keyboard_interrupt(tmp_path):
    """The record is complete when KeyboardInterrupt arrives, as in a notebook."""
    args = Args(**ENDLESS, run_dir=tmp_path / "run", log_interval=64)  # type: ignore[arg-type]
    signals = [signal.SIGINT]
    with interrupted():
        train(args, on_log=lambda *_: signals and signal.raise_signal(signals.pop()))
    assert status_of(tmp_path / "run") == "stopped"
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_sigint_during_setup_leaves_nothing(tmp_path, monkeypatch):
    """No directory is there."""
    from dqn_fast import train as module

    def interrupt(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "setup", interrupt)
    with interrupted():
        train(Args(run_dir=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_thread_stops_with_the_main_thread(tmp_path):
    """There no handler can be installed: it runs, and hears of a signal from the main thread."""
    began, ended = threading.Event(), []
    args = Args(**ENDLESS, run_dir=tmp_path / "run", log_interval=64)  # type: ignore[arg-type]

    def run() -> None:
        ended.append(train(args, on_log=lambda *_: began.set()))

    thread = threading.Thread(target=run)
    with interrupted(), stop_requests() as stop:
        stop.defer()
        thread.start()
        assert began.wait(30)
        signal.raise_signal(signal.SIGINT)
        thread.join(30)
    assert ended[0].summary["status"] == "stopped"


SCRIPT = """
import os, signal, sys
from pathlib import Path
from dqn_fast.train import Args, train
names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
def look(*_):
    if (child := os.fork()) == 0:  # its signals are those before train
        known = [signal.getsignal(getattr(signal, name)) for name in names]
        usual = known == [signal.default_int_handler, *[signal.SIG_DFL] * 3]
        os._exit(0 if usual and signal.set_wakeup_fd(-1) == -1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    for _ in range(3):  # a scheduler sends it again
        os.kill(os.getpid(), signal.SIGTERM)
args = Args(total_timesteps=10**8, quiet=True, report=False, engine="eager", log_interval=64)
args.run_dir = Path(sys.argv[1])
train(args, on_log=look)
print("not reached")
"""


def test_a_script_dies_of_sigterm_with_its_run_saved(tmp_path):
    """Of the signal itself, with the handler that it had, and only when all is saved."""
    with started("-W", "ignore", "-c", SCRIPT, str(tmp_path / "run")) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGTERM, err
    assert out == ""
    assert err == "SIGTERM: saving, then ending; a second SIGINT ends at once\n"
    assert status_of(tmp_path / "run") == "stopped"


# -------------------------------------------------------------------------------------- command


def test_a_command_returns_128_and_the_signal(capsys):
    """SIGINT raises in it; signals noted by `stop_requests` are its status too."""

    @command()
    def waits() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    @command()
    def saves() -> int:
        with stop_requests() as stop:
            stop.defer()
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            return 0 if stop() else 1

    @command()
    def fails() -> int:
        return 3

    assert (waits(), saves(), fails()) == (130, 143, 3)
    assert capsys.readouterr().err == (
        "SIGINT: ending; a second SIGINT ends at once\n"
        "SIGTERM: saving, then ending; a second SIGINT ends at once\n"
    )


BUSY = """
import hashlib, sys
from dqn_fast.process import command
@command()
def main():
    print("began", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes
    return 0
sys.exit(main())
"""


def status_line(child: subprocess.Popen[str], name: str) -> str:
    """A value of the child's status in /proc."""
    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(name))


def ticks(child: subprocess.Popen[str]) -> int:
    """The processor's time that the child has used for itself, in hundredths of a second."""
    return int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_second_sigint_ends_a_long_call():
    """Python runs no handler while the main thread is in C code; the process ends nevertheless."""
    with started("-c", BUSY) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "began\n"
        before = ticks(child)
        wait_until(lambda: ticks(child) >= before + 10)  # in the call for sure
        for _ in range(2):
            # Two that wait at the same time would be one.
            wait_until(lambda: int(status_line(child, "ShdPnd"), 16) == 0)
            child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "SIGINT again: ended at once\n"


def write_package(folder: Path, name: str, text: str) -> dict[str, str]:
    """Environment of a process that imports `text` for a package."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(CHECKOUT)])}


def test_sigint_during_imports_is_silent(tmp_path):
    """The process dies of it, without a traceback."""
    env = write_package(
        tmp_path, "torch", "import time\nprint('began', flush=True)\ntime.sleep(60)"
    )
    with started("-m", "dqn_fast.train", env=env) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "began\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=30) == ("", "")
    assert child.returncode == -signal.SIGINT


def test_importing_the_package_changes_no_signal():
    """Only `python -m dqn_fast.train` and the like do."""
    code = "import signal, sys; sys.argv[0] = '-m'; before = sys.stdout; import dqn_fast\n"
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    code += "assert sys.stdout is before and sys.excepthook is sys.__excepthook__"
    with started("-c", code) as child:
        assert child.communicate() == ("", "")
    assert child.returncode == 0


# ------------------------------------------------------------------------------ missing packages


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("tyro", "raise ModuleNotFoundError(name='tyro')", "error: tyro is not installed; "),
        pytest.param(
            "torch",
            "import ctypes; ctypes.CDLL('libnowhere.so')",
            "error: torch cannot be imported (OSError: libnowhere.so",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "torch",
            "Tensor = Generator = device = dtype = None",
            "error: torch cannot be imported (AttributeError: module 'torch' has no attribute",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sitecustomize",
            "import sys; sys.modules['plotly'] = None",
            "error: plotly is not installed; ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_missing_package_costs_one_line(name, text, line, tmp_path):
    """Exit status 2 before anything is written, also for packages that only the report needs."""
    env = write_package(tmp_path / "packages", name, text)
    with started("-m", "dqn_fast.train", "--run-dir", str(tmp_path / "run"), env=env) as child:
        out, err = child.communicate(timeout=60)
    assert (out, child.returncode) == ("", 2)
    assert err.startswith(line)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_require_names_what_is_missing():
    """It finds what is there, and raises for what is not."""
    require("json", "dqn_fast")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("json", "no_such_package")


# ------------------------------------------------------------------------------ standard streams


def test_output_that_cannot_be_written_is_dropped():
    """A stream whose reader is gone takes all data and knows why."""
    read, write = os.pipe()
    output = process._Output(write)
    assert output.write(b"seen") == 4
    os.close(read)
    assert output.error is None
    assert output.write(b"dropped") == 7
    assert output.error is not None
    assert output.error.errno == errno.EPIPE
    os.close(write)


@pytest.mark.parametrize(
    ("redirected", "status", "message"),
    [
        ("> /dev/full", 1, "error: stdout: cannot be written (No space left on device)\n"),
        pytest.param(">&-", 0, "", marks=pytest.mark.slow),
        pytest.param("> /dev/full 2>&-", 1, "", marks=pytest.mark.slow),
        pytest.param("| true", 0, "", marks=pytest.mark.slow),
    ],
)
def test_help_without_a_reader(redirected, status, message):
    """A lost output is said in one line, unless nobody wants it."""
    line = f"set -o pipefail; {sys.executable} -m dqn_fast.evaluate --help {redirected}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.returncode, done.stderr) == (status, message)


@pytest.mark.parametrize(
    "redirected",
    [
        "2>&1 | head -1",
        pytest.param("> /dev/full 2>&-", marks=pytest.mark.slow),
        pytest.param("<&- >&- 2>&-", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_when_nobody_reads(redirected, tmp_path):
    """It is saved, and the exit status is 0."""
    run = f"{sys.executable} -m dqn_fast.train --total-timesteps 2000 --no-report"
    line = f"set -o pipefail; {run} --run-dir {tmp_path}/run {redirected}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert status_of(tmp_path / "run") == "done"
    assert len(done.stdout.splitlines()) == ("head" in redirected)


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_each_stop_signal_sent_again_and_again_saves_the_run(name, tmp_path):
    """Exit status 128 plus the signal, whatever else arrives while the run is saved."""
    number = getattr(signal, name)
    run_dir = tmp_path / "run"
    with started("-m", "dqn_fast.train", *FLAGS, "--run-dir", str(run_dir)) as child:
        wait_for(run_dir / "metrics.jsonl", child)
        child.send_signal(number)
        while child.poll() is None:
            time.sleep(0.01)
            child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert err == f"{name}: saving, then ending; a second SIGINT ends at once\n"
    assert status_of(run_dir) == "stopped"


@pytest.mark.slow
def test_sigint_at_any_moment_shows_no_traceback(tmp_path):
    """Status 130 or death by SIGINT, at most one line; a directory is there only with its files."""
    for i in range(20):
        run_dir = tmp_path / str(i)
        with started("-m", "dqn_fast.train", *FLAGS, "--run-dir", str(run_dir)) as child:
            time.sleep(0.15 + 0.2 * i)
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=60)
        assert child.returncode in (130, -signal.SIGINT)
        assert len(err.splitlines()) <= 1, err
        assert not run_dir.exists() or status_of(run_dir) == "stopped"


@pytest.mark.slow
def test_a_second_sigint_ends_the_workers_of_a_run_too(tmp_path):
    """Processes that step environments are gone with it, and print nothing."""
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--env-id", "gym:CartPole-v1", "--num-envs", "2", "--log-interval", "64"]
    flags += ["--vectorization-mode", "async", "--run-dir", str(run_dir)]
    with started("-m", "dqn_fast.train", *flags) as child:
        wait_for(run_dir / "metrics.jsonl", child)
        for _ in range(2):
            child.send_signal(signal.SIGINT)
            time.sleep(0.005)
        _, err = child.communicate(timeout=60)  # ends when no worker holds the pipe
    assert child.returncode in (130, -signal.SIGINT)
    assert len(err.splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "number"),
    [("agent", signal.SIGTERM), ("worker", signal.SIGTERM), ("group", signal.SIGINT)],
)
def test_a_run_under_torchrun_is_saved(target, number, tmp_path):
    """Whoever gets the signal; Ctrl-C reaches the worker twice, from terminal and from torchrun."""
    run_dir = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "dqn_fast.train"]
    with started(*launcher, *FLAGS, "--run-dir", str(run_dir)) as child:
        wait_for(run_dir / "metrics.jsonl", child)
        if target == "group":
            os.killpg(child.pid, number)
        elif target == "agent":
            child.send_signal(number)
        else:
            words = ["pgrep", "-P", str(child.pid), "-f", "dqn_fast.train"]
            found = subprocess.run(words, capture_output=True, text=True, check=True)
            os.kill(int(found.stdout.split()[0]), number)
        _, err = child.communicate(timeout=60)
    assert child.returncode != 0
    assert err.count(": saving, then ending") == 1
    assert status_of(run_dir) == "stopped"


@pytest.mark.slow
def test_nohup_is_respected(tmp_path):
    """SIGHUP was ignored when the run began: it goes on."""
    run_dir = tmp_path / "run"
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "os.execv(sys.executable, [sys.executable, '-m', 'dqn_fast.train', *sys.argv[1:]])"
    with started("-c", code, *FLAGS, "--run-dir", str(run_dir)) as child:
        wait_for(run_dir / "metrics.jsonl", child)
        child.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 143
