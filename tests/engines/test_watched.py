"""A command ends with the process that started it, with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dqn_fast.engines import watched
from tests.engines.runs import descendants, started, wait_until

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
FAMILY = ["sh", "-c", "sleep 600 & sh -c 'sleep 600; true' & touch {}/begun; wait"]


def watch(
    folder: Path, command: list[str], starter: int | None = None
) -> AbstractContextManager[subprocess.Popen[str]]:
    words = [watched.__file__, str(starter or os.getpid()), str(folder), *command]
    command = [sys.executable, "-I", "-S", *words]
    return started(command, stdin=subprocess.PIPE, start_new_session=True)


def family(folder: Path) -> list[str]:
    return [word.format(folder) for word in FAMILY]


@pytest.mark.parametrize(
    ("command", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 128 + 9)]
)
def test_the_status_is_the_commands(command, status, tmp_path):
    """And the folder stays, for the starter to read."""
    with watch(tmp_path, ["sh", "-c", command]) as process:
        assert process.wait() == status
    assert tmp_path.exists()


@on_linux
def test_it_ends_when_the_pipe_is_closed(tmp_path):
    """With its children and its folder, at once."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with watch(folder, family(folder)) as process:
        wait_until((folder / "begun").exists)
        children = descendants(process.pid)
        assert len(children) >= 3
        process.stdin.close()
        process.wait(20)
        wait_until(lambda: not any(map(lives, children)), 20)
    assert not folder.exists()


def test_it_ends_when_the_starter_is_another(tmp_path):
    """The pipe is open in a copy of the starter, which has died."""
    with watch(tmp_path / "folder", ["sleep", "600"], starter=1) as process:
        assert process.wait(20) == 1


STARTER = """
import os, subprocess, sys, time
words = [{path!r}, str(os.getpid()), *sys.argv[1:]]
subprocess.Popen([sys.executable, "-I", "-S", *words], stdin=subprocess.PIPE,
                 start_new_session=True)
time.sleep(600)
"""


@on_linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_with_its_starter(how, tmp_path):
    """However that dies: soon all its descendants are gone, and the folder with them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    code = STARTER.format(path=watched.__file__)
    command = [sys.executable, "-c", code, str(folder), *family(folder)]
    with started(command, stderr=subprocess.DEVNULL) as starter:
        wait_until((folder / "begun").exists)
        everybody = descendants(starter.pid)
        assert len(everybody) >= 4
        starter.send_signal(how)
        starter.wait()
        wait_until(lambda: not any(map(lives, everybody)), 20)
    wait_until(lambda: not folder.exists(), 20)


@on_linux
def test_the_command_ends_with_the_program_that_watches(tmp_path):
    """Which somebody kills."""
    with watch(tmp_path, ["sleep", "600"]) as process:
        wait_until(lambda: "sleep" in map(program_of, descendants(process.pid)))  # after exec
        (child,) = descendants(process.pid)
        process.kill()
        wait_until(lambda: not lives(child), 20)


def program_of(pid: int) -> str:
    """Name of the program that a process runs; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def lives(pid: int) -> bool:
    """Whether a process runs; a dead one may wait to be collected by a container's first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
