"""Calls recorded as CUDA graphs and replayed without their Python."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.engines.choice import EngineUnavailableError, first_line

RECORDED_STEPS = 32
"""Vector steps that a recording holds at most. To replay one costs the host about 0.1 ms, which the
GPU does not wait for where it holds 16 steps or more; to record one costs what its steps cost."""


class Recorder(Protocol):
    """Records calls, to run them again without their Python."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run a call as it is, where calls like it will be recorded."""

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Record a call, which computes nothing; returns what runs it and gives its outputs."""


_capturing = threading.Lock()


class CudaGraphs:
    """Records calls as CUDA graphs on one stream, in one memory pool, because they run in turn.

    Stream and pool belong to this object: other recorders of the process, earlier ones, later ones
    and those of other threads, share neither.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run a call on the stream of the recordings: kernels are loaded, workspaces are made."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a call, which computes nothing; every replay writes the same outputs."""
        graph = torch.cuda.CUDAGraph()
        # One at a time, because torch waits for the whole device first, which breaks a capture in
        # another thread; thread_local, because whatever else other threads ask for does not.
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
    """Replays calls of a function whose tensors stay where they are, each kind recorded once.

    Inputs are copied to where the recording reads them; outputs are overwritten by the next replay
    of the same recording, so they are to be used before.

    A call whose key has a part that no call had before runs as it is: it is the warm-up that
    capture asks for, and does what it is called for. All other calls are recorded, which computes
    nothing, and replayed.

    Attributes:
        num_plain: calls that ran as they are.
        num_recordings: calls that were recorded.
    """

    MOST_RECORDINGS = 64

    def __init__(self, function: Callable[..., Any], recorder: Recorder) -> None:
        """Record nothing yet.

        Args:
            function: takes a key, a tuple that says what kind of call it is, and nested tuples of
                tensors.
            recorder: `CudaGraphs`, or for tests something that needs no GPU.
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
