"""Settings shared by all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import settings

settings.register_profile("dqn_fast", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("dqn_fast")

# A shell that starts the tests in the background lets them ignore SIGINT, and nohup SIGHUP. Their
# processes would inherit that, and the tests send them these signals; a handler is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, as the program's default: small products are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A context in which whatever waits for the GPU raises; the mode is given back as it was."""
    before = torch.cuda.get_sync_debug_mode()

    @contextmanager
    def forbidden() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    yield forbidden
    torch.cuda.set_sync_debug_mode(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
