"""Records calls as CUDA graphs and replays them without running their Python code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.device import first_line
from dqn_fast.engines.choice import EngineUnavailableError

RECORDED_STEPS = 32
"""Vector steps of a recording at most. A replay costs the host about 0.1 ms; with 16 steps or more
the GPU is busy for longer and never waits. Recording costs as much as running the steps."""


class Recorder(Protocol):
    """Records calls and replays them."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run a call plainly, before calls like it are recorded."""

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Record a call without computing anything; the returned function runs it."""


_capturing = threading.Lock()


class CudaGraphs:
    """Records calls as CUDA graphs on one stream and in one memory pool: replays run one by one.

    Stream and pool belong to this object; no other recorder of the process shares them, in this
    thread or in another one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run a call on the stream of the recordings, which loads kernels and makes workspaces."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a call without computing anything; every replay overwrites the same outputs."""
        graph = torch.cuda.CUDAGraph()
        # One capture at a time: torch waits for the whole device first, which breaks a capture in
        # another thread. thread_local: other CUDA calls of other threads are allowed.
        with (
            _capturing,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            outputs = call()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


class _Recording(NamedTuple):
    replay: Callable[[], Any]
    inputs: list[Tensor]


class Captured:
    """Records a function once for each kind of call, and replays the recordings.

    The function's tensors keep their addresses. A replay copies the inputs to the addresses that
    the recording reads, and overwrites the outputs of the recording's last replay.

    A call whose key contains a part that no earlier key contained runs plainly: it is the warm-up
    that a capture needs, and its results count. All other calls are recorded and replayed.

    Attributes:
        num_plain: calls that ran plainly.
        num_recordings: calls that were recorded.
    """

    MOST_RECORDINGS = 64

    def __init__(self, function: Callable[..., Any], recorder: Recorder) -> None:
        """Record nothing yet.

        Args:
            function: takes a key, a tuple that names the kind of call, and trees of tensors.
            recorder: `CudaGraphs`, or in tests one that needs no GPU.
        """
        self._function, self._recorder = function, recorder
        self._warm: set[Any] = set()
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self.num_plain = 0

    @property
    def num_recordings(self) -> int:
        return len(self._recordings)

    def __call__(self, key: tuple[Any, ...], *inputs: Any) -> Any:
        """Call the function.

        Raises:
            EngineUnavailableError: the call cannot be recorded; it did not run.
        """
        recording = self._recordings.get(key)
        if recording is None:
            if not self._warm.issuperset(key) or self.num_recordings == self.MOST_RECORDINGS:
                self._warm.update(key)
                self.num_plain += 1
                return self._recorder.warm_up(lambda: self._function(key, *inputs))
            recording = self._recordings[key] = self._record(key, inputs)
        torch._foreach_copy_(recording.inputs, tree.leaves(inputs))
        return recording.replay()

    def _record(self, key: tuple[Any, ...], inputs: Any) -> _Recording:
        try:
            static = [tensor.clone() for tensor in tree.leaves(inputs)]
            arguments = tree.replace(inputs, static)
            replay = self._recorder.record(lambda: self._function(key, *arguments))
        except Exception as error:
            raise EngineUnavailableError(f"capture failed: {first_line(error)}") from error
        return _Recording(replay, static)
