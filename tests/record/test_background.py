"""Work beside the loop: copies of their moment, files of the newest content."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from dqn_fast.record.background import FileWriter, HostCopy, Moment

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_of_its_moment(device):
    """What is written later does not reach it; its structure and other values stay."""
    x = torch.arange(6, device=device).view(2, 3)
    param = torch.ones(2, device=device, requires_grad=True)
    copy = HostCopy({"x": [x, "text", 3], "none": None, "pair": (param, x.T), "again": x}, x.device)
    x.zero_()
    arrived = copy.get()
    assert copy.ready
    assert arrived["x"][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrived["x"][1:] == ["text", 3]
    assert arrived["none"] is None
    assert arrived["pair"][0].tolist() == [1.0, 1.0]
    assert not arrived["pair"][0].requires_grad
    assert arrived["again"] is arrived["x"][0]  # one memory is copied once
    assert arrived["pair"][1].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert all(t.device.type == "cpu" for t in (arrived["x"][0], *arrived["pair"]))


def test_what_is_lent_is_not_copied():
    """The tensors themselves, at once."""
    x = torch.zeros(3)
    copy = HostCopy([x], x.device, lent=True)
    assert copy.ready
    assert copy.get()[0] is x


@pytest.mark.parametrize("device", DEVICES)
def test_time_between_two_moments(device):
    """Seconds, of the device's own work."""
    x = torch.ones(1_024, 1_024, device=device)
    began, before = time.perf_counter(), Moment(x.device)
    for _ in range(5):
        x = x @ x / 1_024
    after = Moment(x.device)
    assert HostCopy([x], x.device).get()[0].mean() == pytest.approx(1.0)
    assert 0.0 < after.since(before) < time.perf_counter() - began + 0.1


@pytest.mark.gpu
def test_a_copy_waits_for_nothing(no_synchronisation):
    """To begin one and to ask for it, while the GPU is at work."""
    x = torch.ones(2_048, 2_048, device="cuda")
    torch.empty(4, pin_memory=True)
    HostCopy([x], x.device).get()  # pinned memory is there from now on
    with no_synchronisation():
        for _ in range(50):
            x = x @ x / 2_048
        copy = HostCopy([x], x.device)
        assert not copy.ready
    assert copy.get()[0].mean() == pytest.approx(1.0)


def test_the_newest_content_of_a_file_is_written():
    """One that waits is replaced, one that is being written is finished; other files wait their
    turn."""
    written: list[str] = []
    started, go_on = threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        go_on.wait(10)
        written.append("a1")

    files = FileWriter(lambda name, error: pytest.fail(f"{name}: {error}"))
    files.submit("a", first)
    assert started.wait(10)
    files.submit("a", lambda: written.append("a2"))
    files.submit("b", lambda: written.append("b1"))
    files.submit("a", lambda: written.append("a3"))
    files.settle()  # waits for nothing
    assert written == []
    go_on.set()
    files.wait()
    files.close()
    assert written == ["a1", "b1", "a3"]


def test_what_cannot_be_written_is_reported(tmp_path):
    """Whatever it was, with the name; what comes behind is written all the same."""
    failed: list[tuple[str, str]] = []
    files = FileWriter(lambda name, error: failed.append((name, type(error).__name__)))
    missing = tmp_path / "missing" / "file"
    files.submit("one", lambda: missing.write_text("text"))
    files.submit("two", lambda: 1 / 0)
    files.submit("three", lambda: Path(tmp_path / "three").write_text("text"))
    files.wait()
    files.settle()
    files.close()
    assert failed == [("one", "FileNotFoundError"), ("two", "ZeroDivisionError")]
    assert (tmp_path / "three").read_text() == "text"
