"""Work beside the loop: tensors on their way to the host, and files on their way to the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class HostCopy:
    """Tensors as they are now, on the host as soon as the device gets there.

    To make one waits for nothing on a CUDA device: the copies go to pinned memory behind what was
    asked of the device before. Elsewhere they are made at once.
    """

    def __init__(self, tree: Any, lent: bool = False) -> None:
        """Begin to copy.

        Args:
            tree: tensors in nested dicts, lists and tuples; other values stay as they are.
            lent: whether to copy nothing: `get` gives the tensors themselves.
        """
        self._tree = tree if lent else tree_map(_copied, tree)
        self._event: torch.cuda.Event | None = None
        if not lent:
            cuda = (t.device for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_cuda)
            if (device := next(cuda, None)) is not None:
                self._event = torch.cuda.Event()
                self._event.record(torch.cuda.current_stream(device))

    @property
    def ready(self) -> bool:
        """Whether `get` need not wait."""
        return self._event is None or self._event.query()

    def get(self) -> Any:
        """The same tree, its tensors on the host. Waits for the device where it must."""
        if self._event is not None:
            self._event.synchronize()
        return self._tree


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cuda":
        return value.detach().to("cpu", copy=True)
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value.detach(), non_blocking=True)


class FileWriter:
    """Writes files in a thread, one after the other, the newest content of each.

    A content that waits while a newer one for the same file comes is not written: a disk that is
    slower than the loop holds up nothing.
    """

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        """Start no thread yet.

        Args:
            failed: told name and error where a file could not be written, in `settle` or `wait`.
        """
        self._failed = failed
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="file-writer")
        self._jobs: list[tuple[str, Future[object]]] = []

    def submit(self, name: str, write: Callable[[], object]) -> None:
        """Write a file soon.

        Args:
            name: of the file.
            write: writes it, whole or not at all, from data that nobody else changes.
        """
        # One that is being written cannot be cancelled and is finished first.
        self._jobs = [(n, job) for n, job in self._jobs if n != name or not job.cancel()]
        self._jobs.append((name, self._threads.submit(write)))

    def settle(self) -> None:
        """Report what could not be written so far."""
        while self._jobs and self._jobs[0][1].done():
            self._wait_for_oldest()

    def wait(self) -> None:
        """Wait until everything is written, and report."""
        while self._jobs:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        name, job = self._jobs.pop(0)
        if isinstance(error := job.exception(), Exception):
            self._failed(name, error)

    def close(self) -> None:
        """Wait until everything is written; report nothing."""
        self._threads.shutdown()
