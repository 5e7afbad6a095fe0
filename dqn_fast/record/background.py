"""Work while the loop runs: copies of tensors to the host, and writing of files."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class HostCopy:
    """Copies of tensors on the host, with the values of the moment at which this was made.

    On a CUDA device the constructor does not wait: the copies go to pinned memory, after the work
    that the device has queued. On other devices they are made at once.
    """

    def __init__(self, tree: Any, device: torch.device, lent: bool = False) -> None:
        """Begin to copy.

        Args:
            tree: tensors in nested dicts, lists and tuples; other values are kept, and tensors that
                share memory become one copy.
            device: the copies follow its queued work.
            lent: whether to copy nothing; `get` then returns the tensors themselves.
        """
        copies: dict[Any, Tensor] = {}
        self._tree = tree if lent else tree_map(partial(_copied, copies), tree)
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    @property
    def ready(self) -> bool:
        """Whether `get` returns without waiting."""
        return self._event is None or self._event.query()

    def get(self) -> Any:
        """The same tree with its tensors on the host. Waits for the device until they are."""
        if self._event is not None:
            self._event.synchronize()
        return self._tree


class Moment:
    """The moment at which a device has finished the work queued so far."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def since(self, earlier: Moment) -> float:
        """Seconds between two moments; waits for this one."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def _copied(copies: dict[Any, Tensor], value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
    if place not in copies:
        if value.device.type == "cuda":
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            copies[place] = host.copy_(value, non_blocking=True)
        else:
            copies[place] = value.to("cpu", copy=True)
    return copies[place]


class FileWriter:
    """Writes files in a thread, one after the other, with the newest content of each.

    If a newer content for the same file arrives, the waiting one is dropped. So a disk that is
    slower than the loop does not delay it.
    """

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        """Start no thread yet.

        Args:
            failed: called by `settle` or `wait` with name and error if a file was not written.
        """
        self._failed = failed
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="file-writer")
        self._jobs: list[tuple[str, Future[object]]] = []

    def submit(self, name: str, write: Callable[[], object]) -> None:
        """Write a file soon.

        Args:
            name: of the file.
            write: writes it, whole or not at all, from data that no other code changes.
        """
        # A job that is running cannot be cancelled and finishes first.
        self._jobs = [(n, job) for n, job in self._jobs if n != name or not job.cancel()]
        self._jobs.append((name, self._threads.submit(write)))

    def settle(self) -> None:
        """Report the files that could not be written so far."""
        while self._jobs and self._jobs[0][1].done():
            self._wait_for_oldest()

    def wait(self) -> None:
        """Wait until all files are written, and report those that could not be."""
        while self._jobs:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        name, job = self._jobs.pop(0)
        if isinstance(error := job.exception(), Exception):
            self._failed(name, error)

    def close(self) -> None:
        """Wait until all files are written; report nothing."""
        self._threads.shutdown()
