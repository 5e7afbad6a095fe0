"""The cache: nobody else's folder, nobody else's file, and nothing that is damaged."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dqn_fast.engines import cache
from dqn_fast.engines.cache import (
    UnusableFileError,
    WorkFolder,
    cache_state,
    read_whole,
    subfolder,
    sweep,
    usable_cache,
    write_whole,
)
from tests.engines.runs import started

SOMEBODY = 12_345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """XDG_CACHE_HOME, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    return tmp_path / "home" / "cache"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which temporary caches are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    cache._temporary_cache.cache_clear()
    yield folder
    cache._temporary_cache.cache_clear()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_folder_is_private_whatever_the_umask(home, umask):
    """Folders that are made, and files that are written, are this user's alone."""
    before = os.umask(umask)
    try:
        folder, problem = usable_cache()
        work = WorkFolder(folder)
        write_whole(b"content", folder / "file", work.path)
    finally:
        os.umask(before)
    assert (folder, problem) == (home / "dqn_fast", None)
    assert cache_state() == (folder, None)
    for path in (home.parent, home, folder, work.path, subfolder(folder, "inside")):
        assert mode(path) == 0o700
    assert mode(folder / "file") == mode(work.path / ".lock") == 0o600
    work.close()
    assert not work.path.exists()


def test_without_a_usable_variable_the_folder_is_in_the_users_home(home, monkeypatch):
    """The standard ignores a path that is not absolute."""
    monkeypatch.setenv("HOME", str(home))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert usable_cache() == (home / ".cache" / "dqn_fast", None)


def link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (link, "{} is a symbolic link"),
    "a dangling link": (
        lambda folder: (folder.rmdir(), folder.symlink_to("nowhere")), "{} is a symbolic link",
    ),
    "a file": (file, "{} is not a folder"),
    "writable by the group": (lambda f: f.chmod(0o770), "{} can be written by other users"),
    "writable by all": (lambda f: f.chmod(0o1777), "{} can be written by other users"),
    "open above": (
        lambda f: f.parent.parent.chmod(0o777), "{.parent.parent} can be written by other users",
    ),
}  # fmt: skip
GIVEN_AWAY: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another user": (lambda f: os.chown(f, SOMEBODY, 0), f"{{}} belongs to user {SOMEBODY}"),
    "of another user above": (
        lambda f: os.chown(f.parent, SOMEBODY, 0), f"{{.parent}} belongs to user {SOMEBODY}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "what", [*PLANTED, *(pytest.param(name, marks=as_root) for name in GIVEN_AWAY)]
)
def test_what_others_could_have_planted_is_not_used(what, home, temporary):
    """A private folder of this process takes its place, and the reason names what is wrong."""
    folder, _ = usable_cache()
    change, words = (PLANTED | GIVEN_AWAY)[what]
    change(folder)
    state = cache_state()
    assert state == (folder, words.format(folder))
    used, problem = usable_cache()
    assert used.parent == temporary
    assert mode(used) == 0o700
    assert problem == f"{state.problem}, so nothing compiled is kept"
    assert usable_cache().folder == used  # one for the process


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_not_used(home, temporary):
    """Neither one that exists, nor one that cannot be made."""
    folder, _ = usable_cache()
    folder.chmod(0o500)
    assert cache_state().problem == f"{folder} cannot be written"
    folder.chmod(0o700)
    folder.rmdir()
    home.chmod(0o500)
    assert "Permission denied" in str(cache_state().problem)
    home.chmod(0o700)


def test_a_folder_that_cannot_be_made_is_not_used(home, temporary):
    """A file stands in the way."""
    home.parent.write_text("")
    assert str(cache_state().problem) == f"{home}: Not a directory"
    assert usable_cache().folder.parent == temporary


@pytest.mark.parametrize("plant", [link, lambda folder: folder.chmod(0o777)])
def test_a_planted_folder_inside_the_cache_is_replaced(plant, home):
    """It is ours to remove; what a link points to stays."""
    folder, _ = usable_cache()
    inside = subfolder(folder, "inside")
    (inside / "planted").write_text("")
    plant(inside)
    assert list(subfolder(folder, "inside").iterdir()) == []
    assert mode(inside) == 0o700
    assert not inside.is_symlink()
    assert plant is not link or (folder / "elsewhere" / "planted").exists()


# -------------------------------------------------------------------------------- folders of work

ALONE = f"import sys; sys.path.insert(0, {str(Path(cache.__file__).parent)!r})"
"""The module needs nothing of the package, whose import takes seconds."""

HOLD = """
import sys, time
from pathlib import Path
from cache import {0}
print({1}, flush=True)
if sys.argv[1:]: time.sleep(600)
"""


def test_leftovers_are_swept_and_living_folders_are_not(tmp_path):
    """Those of a process that was killed go at the next start; nobody else's, and no link."""
    code = ALONE + HOLD.format("WorkFolder", f"(w := WorkFolder(Path({str(tmp_path)!r}))).path")
    with started([sys.executable, "-c", code, "wait"]) as other:
        left = Path(other.stdout.readline().strip())
        (left / "deep").mkdir()
        (left / "deep" / "file").write_text("")
        ours = WorkFolder(tmp_path)
        (tmp_path / "work-link").symlink_to(tmp_path / "kept")
        (tmp_path / "kept").mkdir()
        (tmp_path / "work-unfinished").mkdir()  # killed before it was locked
        sweep(tmp_path)
        assert left.name.startswith(f"work-{other.pid}-")
        assert left.exists()
        other.kill()
        other.wait()
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(
        [ours.path, tmp_path / "kept", tmp_path / "work-link"]
    )
    ours.close()
    ours.close()


def test_the_temporary_cache_is_removed(tmp_path, home):
    """At the end of the process, or, if that was killed, when the next one needs such a folder."""
    home.mkdir(parents=True)
    (home / "dqn_fast").symlink_to("nowhere")
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    code = ALONE + HOLD.format("usable_cache", "usable_cache().folder")
    command = [sys.executable, "-c", code]
    with started([*command, "wait"], env=environ) as other:
        left = Path(other.stdout.readline().strip())
        assert left.parent == tmp_path
    assert left.exists()
    used = subprocess.run(command, capture_output=True, text=True, env=environ, check=True).stdout
    assert not left.exists()
    assert not Path(used.strip()).exists()


def test_folders_made_and_swept_at_once_do_not_meet(tmp_path):
    """A new folder is never taken for a leftover."""

    def make(_: int) -> None:
        for _ in range(100):
            work = WorkFolder(tmp_path)
            sweep(tmp_path)
            (work.path / "file").write_text("")
            sweep(tmp_path)
            assert (work.path / "file").exists()
            work.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_leaves_the_folder_to_its_parent(tmp_path):
    """What a fork inherits is not its own."""
    work = WorkFolder(tmp_path)
    process, work._process = work._process, 1  # as a fork sees it
    work.close()
    assert work.path.exists()
    work._process = process
    work.close()
    assert not work.path.exists()


# ------------------------------------------------------------------------------------------ files


def test_a_damaged_file_is_never_read(tmp_path):
    """Any flipped byte, any cut, and another file's name."""
    path = tmp_path / "file"
    write_whole(b"the content", path, tmp_path)
    assert read_whole(path) == b"the content"
    whole = path.read_bytes()
    for i in range(len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(UnusableFileError, match="is damaged"):
                read_whole(path)
    (tmp_path / "other").write_bytes(whole)
    (tmp_path / "other").chmod(0o600)
    with pytest.raises(UnusableFileError, match="is damaged"):
        read_whole(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "nothing")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "other"}


UNTRUSTED = {
    "link": (lambda p: (p.rename(p.with_name("a")), p.symlink_to("a")), "is a symbolic link"),
    "writable": (lambda p: p.chmod(0o620), "can be written by other users"),
    "pipe": (lambda p: (p.unlink(), os.mkfifo(p, 0o600)), "is not a file"),
    "folder": (lambda p: (p.unlink(), p.mkdir(0o700)), "is not a file"),
    "given away": (lambda p: os.chown(p, SOMEBODY, -1), f"belongs to user {SOMEBODY}"),
}


@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=as_root if w == "given away" else ()) for w in UNTRUSTED]
)
def test_a_file_that_others_could_have_written_is_never_read(what, tmp_path):
    """Whatever its digest says."""
    path = tmp_path / "file"
    write_whole(b"the content", path, tmp_path)
    change, words = UNTRUSTED[what]
    change(path)
    with pytest.raises(UnusableFileError, match=words):
        read_whole(path)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    """While others write it again and again, and after the death of one in mid-write."""
    path, large = tmp_path / "file", 2_000_000
    code = f"""{ALONE}
from pathlib import Path
from cache import write_whole
folder = Path({str(tmp_path)!r})
while True: write_whole(b"x" * {large}, folder / "file", folder)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        read = 0
        while read < 30:
            try:
                assert len(read_whole(path)) == large
                read += 1
            except FileNotFoundError:
                assert read == 0
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    assert len(read_whole(path)) == large
