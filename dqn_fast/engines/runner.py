"""Runs chunks of vector steps of any algorithm.

Every engine runs the same functions of the algorithm. It calls them plainly, compiles them, or
records them in CUDA graphs, with plain or compiled kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.algorithm import (
    UPDATE_METRICS,
    Algorithm,
    ChunkRecord,
    StepInputs,
    UpdateInputs,
)
from dqn_fast.device import first_line, upload
from dqn_fast.engines.choice import EngineChoice, EngineUnavailableError
from dqn_fast.engines.chunk import chunk_
from dqn_fast.engines.compiler import CompiledFn, Compiler, Traced
from dqn_fast.engines.fused import FusedChunk
from dqn_fast.engines.graph import Captured, CudaGraphs
from dqn_fast.noise import Noise
from dqn_fast.plan import Plan


class RowBuffers:
    """Preallocated [K, ...] tensors with cached views of their rows; K grows on demand.

    On a CPU they are kept, because making a view costs as much as a small operation, 1 us. On other
    devices every call makes new ones: recordings must not share memory, and a replay makes none.
    """

    def __init__(self, example: Sequence[Tensor]) -> None:
        """Allocate nothing yet; `example` has one row of each tensor."""
        self._example, self._kept = example, example[0].device.type == "cpu"
        self._tensors: list[Tensor] = []
        self._rows: list[tuple[Tensor, ...]] = []

    def reserve(self, count: int) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Uninitialised tensors of `count` rows, and views of their rows."""
        if not self._kept or not self._tensors or count > len(self._rows):
            self._tensors = [t.new_empty((count, *t.shape)) for t in self._example]
            self._rows = list(zip(*self._tensors, strict=True))
        return [tensor[:count] for tensor in self._tensors], self._rows

    def load(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Copy `tensors` into the buffers; returns views of the rows."""
        buffers, rows = self.reserve(len(tensors[0]))
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        return rows


class CompiledChunk:
    """Compiled replacement for `chunk_` of one state, and for the algorithm's `draw`.

    It compiles "step-update", a vector step with one gradient step, if the plan has such steps;
    "step" and "update", each alone, if another number of gradient steps follows a vector step;
    "draw" in any case. If the environments live on the host, it compiles "act" and "update" instead
    of vector steps. Eight gradient steps in one function take 215 us each and one takes 190 us,
    because each of the eight writes new tensors instead of the old ones.
    """

    def __init__(self, algorithm: Algorithm, state: Any, plan: Plan, noise: Noise) -> None:
        """Start compiling.

        Raises:
            EngineUnavailableError: the functions cannot be traced.
        """
        self._algorithm, self._functions = algorithm, dict[str, CompiledFn]()
        step, update = algorithm.example_inputs(noise.device)
        counts = plan.learning_counts()
        functions = []
        if algorithm.on_host:
            functions += [Traced("act", algorithm.act_, (step.explore, step.epsilon))]
        else:
            for n in sorted({int(count == 1) for count in counts}):
                functions += [Traced(_STEP[n], algorithm.vector_step_, (step, [update] * n))]
        if algorithm.on_host or max(counts, default=0) > 1:
            functions += [Traced("update", algorithm.learn_, ([update],))]
        functions += [self._trace_draw(plan, noise)]
        self._names = [function.name for function in functions]
        self._compiler = Compiler(state)
        self._compiler.start(functions)
        self._state, results = self._compiler.state, self._compiler.results
        self._drawn: tuple[Tensor, ...] = results["draw"]
        self._steps, self._updates = RowBuffers(step), RowBuffers(tree.leaves(update))
        shape = (len(UPDATE_METRICS), algorithm.num_members)
        self._update_metrics = torch.empty(shape, device=noise.device)
        self._metrics = RowBuffers([self._update_metrics])
        if algorithm.on_host:
            self._action: Tensor = results["act"]
        for name in results.keys() & set(_STEP):  # none in a run without gradient steps
            *record, _ = results[name]
            self._record = RowBuffers(record)

    def _trace_draw(self, plan: Plan, noise: Noise) -> Traced:
        """`draw` for the longest window. The numbers of a shorter window are the first of these,
        because a number depends only on its place."""
        size, algorithm = (plan.window_steps, plan.window_updates), self._algorithm

        def draw(_: Any, keys: Tensor, counters: Tensor, *first: Tensor) -> tuple[Tensor, ...]:
            return algorithm.draw(noise.with_tensors(keys, counters), *size, *first)

        algorithm.draw(noise, *size, 0, 0)  # makes as many counters as it needs
        self._keys, self._counters = noise.keys, noise.counters
        first = torch.zeros(2, dtype=torch.int64, device=noise.device).unbind()
        return Traced("draw", draw, (self._keys, self._counters, *first), exact=True)

    @property
    def notes(self) -> list[str]:
        """What is wrong with the cache of compiled functions."""
        return self._compiler.notes

    def finish(self, should_stop: Callable[[], bool]) -> None:
        """Wait for the compiler.

        Raises:
            EngineUnavailableError: it failed.
            StopRequested: `should_stop`, asked every 0.1 s, returned true.
        """
        self._functions = dict(zip(self._names, self._compiler.finish(should_stop), strict=True))

    def close(self) -> None:
        """Stop the compiler if it still runs."""
        self._compiler.close()

    def __call__(
        self,
        algorithm: Algorithm,
        state: Any,
        steps: StepInputs,
        updates: UpdateInputs,
        update_counts: tuple[int, ...],
    ) -> ChunkRecord:
        """`chunk_` of the state that the functions were compiled for; the next call overwrites the
        record."""
        if algorithm.on_host:
            step_ = partial(algorithm.vector_step_, act_=self._act_, learn_=self._learn_)
            return chunk_(algorithm, state, steps, updates, update_counts, step_)
        if not {_STEP[count == 1] for count in update_counts} <= self._functions.keys():
            return chunk_(algorithm, state, steps, updates, update_counts)  # before learning starts
        noise, schedules = self._steps.load(steps), self._updates.load(tree.leaves(updates))
        (episode_return, episode_length), records = self._record.reserve(len(update_counts))
        (metrics,), rows = self._metrics.reserve(len(updates.rows))
        first = 0
        for k, count in enumerate(update_counts):
            last = first + count
            if count == 1:
                inputs = (*noise[k], *schedules[first], *records[k], *rows[first])
                self._functions["step-update"]([*self._state, *inputs])
            else:
                self._functions["step"]([*self._state, *noise[k], *records[k]])
                for u in range(first, last):
                    self._functions["update"]([*self._state, *schedules[u], *rows[u]])
            first = last
        copies = (algorithm.num_members, -1)
        return ChunkRecord(
            episode_return.unflatten(1, copies), episode_length.unflatten(1, copies), metrics
        )

    def draw(
        self, noise: Noise, num_steps: int, num_updates: int, *first: int
    ) -> tuple[Tensor, ...]:
        """The algorithm's `draw`; the next call overwrites the numbers."""
        start = upload(torch.tensor(first), noise.device).unbind()
        inputs = (self._keys, self._counters, *start, *self._drawn)
        self._functions["draw"]([*self._state, *inputs])
        *steps, rows = self._drawn
        return *(drawn[:num_steps] for drawn in steps), rows[:num_updates]

    def _act_(self, _state: Any, explore: Tensor, epsilon: Tensor) -> Tensor:
        action = torch.empty_like(self._action)
        self._functions["act"]([*self._state, explore, epsilon, action])
        return action

    def _learn_(self, _state: Any, updates: list[UpdateInputs]) -> list[Tensor]:
        metrics = [torch.empty_like(self._update_metrics) for _ in updates]
        for update, row in zip(updates, metrics, strict=True):
            self._functions["update"]([*self._state, *tree.leaves(update), row])
        return metrics


NO_GRAPHS, NOT_FUSED = "no CUDA graphs", "cannot be fused"
NOT_KEPT = "no program is generated that could be kept"
_STEP = ("step", "step-update")
"""Names of the compiled vector step, without and with a gradient step after it."""


class Runner:
    """Runs the chunks of one state with the chosen engine, or with the next best one.

    If the step cannot be fused, a graph takes its place on a GPU, and elsewhere it is compiled
    where that pays. If the compiler fails, a graph holds plain kernels. If graphs fail, compiled
    functions are called. If all fail, the plain functions are called. `reason` then says why. An
    engine fails before it has written the state, so the results are those of the engine that
    replaces it.

    Attributes:
        engine: the engine that runs now: eager, fused, compile or graph.
        reason: why, in a few words.
        compile_s: seconds that the loop waited for the compiler.
        on_change: called when compiled functions start to run and when an engine fails, with
            engine, reason, compile_s and whether the engine before it never ran.
        should_stop: asked every 0.1 s while the loop waits for the compiler; if it returns true,
            the call raises `StopRequested` and the chunk has not run.
        captured: the recordings; None without graphs.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        state: Any,
        plan: Plan,
        noise: Noise,
        choice: EngineChoice,
        keep_generated: Path | None = None,
    ) -> None:
        """Start compiling if the choice asks for it.

        Args:
            algorithm: describes a vector step.
            state: of the algorithm; written by every chunk.
            plan: of the run.
            noise: of the members.
            choice: which engine.
            keep_generated: folder to write the generated source to; `reason` says where it is.
        """
        self.engine: str = choice.engine
        self.reason, self.compile_s = choice.reason, 0.0
        self.on_change: Callable[[str, str, float, bool], None] = lambda *_: None
        self.should_stop: Callable[[], bool] = lambda: False
        self._algorithm, self._state, self._noise = algorithm, state, noise
        self._chunk_: Callable[..., ChunkRecord] = chunk_
        self._draw: Callable[..., tuple[Tensor, ...]] = algorithm.draw
        self._compiled: CompiledChunk | FusedChunk | None = None
        self.captured: Captured | None = None
        if choice.engine == "fused":
            self._start(FusedChunk, algorithm, state, plan, noise)
        elif choice.engine == "graph":
            self._capture(choice.compiled)
        if choice.compiled and self._compiled is None:
            if choice.engine == "fused" and self.captured is None:
                self.engine = "compile"
            self._start(CompiledChunk, algorithm, state, plan, noise)
        if keep_generated is not None:
            self.reason = f"{self.reason}; {self._keep(keep_generated)}"

    def _start(self, kind: type[CompiledChunk] | type[FusedChunk], *parts: Any) -> None:
        """Start what makes compiled functions, or drop it."""
        try:
            self._compiled = kind(*parts)
            self.reason = "; ".join([self.reason, *self._compiled.notes])
        except EngineUnavailableError as error:
            self._drop_compiler(error)

    def _capture(self, compiled: bool) -> None:
        """Record graphs from now on, where that is possible."""
        try:
            self.captured = Captured(self._run, CudaGraphs(self._noise.device))
        except RuntimeError as error:
            self.engine = "compile" if compiled else "eager"
            self.reason = f"{NO_GRAPHS}: {first_line(error)}"

    def _keep(self, folder: Path) -> str:
        """Write the generated source; says where it is, or why it is not."""
        return self._compiled.keep(folder) if isinstance(self._compiled, FusedChunk) else NOT_KEPT

    def __call__(
        self, steps: StepInputs, updates: UpdateInputs, update_counts: tuple[int, ...]
    ) -> ChunkRecord:
        """`chunk_`; the next call may overwrite the record.

        Raises:
            StopRequested: `should_stop` returned true while this call waited for the compiler.
        """
        num_updates = sum(update_counts)
        if self._compiled is not None and num_updates:
            self._change_over(self._compiled)
        if self.captured is not None:
            try:
                return self.captured(update_counts, steps, updates)
            except EngineUnavailableError as error:
                self._drop_graphs(self.captured, error)
        return self._run(update_counts, steps, updates)

    def draw(
        self, num_steps: int, num_updates: int, first_step: int, first_update: int
    ) -> tuple[Tensor, ...]:
        """The algorithm's `draw`; the next call may overwrite the numbers."""
        return self._draw(self._noise, num_steps, num_updates, first_step, first_update)

    def _run(
        self, update_counts: tuple[int, ...], steps: StepInputs, updates: UpdateInputs
    ) -> ChunkRecord:
        return self._chunk_(self._algorithm, self._state, steps, updates, update_counts)

    def _change_over(self, compiled: CompiledChunk | FusedChunk) -> None:
        """Wait for the compiler and call compiled functions from now on."""
        began = time.perf_counter()
        announced = self.engine
        try:
            compiled.finish(self.should_stop)
            self._chunk_, self._draw = compiled, compiled.draw
        except EngineUnavailableError as error:
            self._drop_compiler(error)
        finally:  # also after an interrupt, or the compiler would go on
            compiled.close()
            self._compiled = None
        self.compile_s = time.perf_counter() - began
        never_ran = announced in ("fused", "compile") and self.engine == "eager"
        self.on_change(self.engine, self.reason, self.compile_s, never_ran)

    def _drop_compiler(self, error: EngineUnavailableError) -> None:
        on_cuda = self._noise.device.type == "cuda"
        if self.engine == "fused" and on_cuda and not self._algorithm.on_host:
            self.engine, self.reason = "graph", f"{error}; a graph in its place"
            self._capture(False)
        elif self.engine == "graph":
            before = f"{self.reason}; " if self.reason.endswith("in its place") else ""
            self.reason = f"{before}plain kernels, {error}"
        else:
            before = f"{self.reason}; " if self.reason.startswith((NO_GRAPHS, NOT_FUSED)) else ""
            self.engine, self.reason = "eager", f"{before}{error}"

    def _drop_graphs(self, captured: Captured, error: EngineUnavailableError) -> None:
        self.captured = None
        self.engine = "eager" if self._chunk_ is chunk_ else "compile"
        self.reason = str(error)
        self.on_change(self.engine, self.reason, self.compile_s, captured.num_recordings == 0)

    def close(self) -> None:
        """Stop the compiler if it still runs."""
        if self._compiled is not None:
            self._compiled.close()
