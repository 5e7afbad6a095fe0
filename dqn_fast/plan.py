"""Everything that follows from the step count alone: schedules, intervals and the plan of a run.

All of it is host arithmetic on step counts, done once per window of chunks and uploaded to the
device as data. This module knows no environments, networks or replay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

ADAM_BETAS = (0.9, 0.999)


def linear_schedule(
    step: npt.ArrayLike, start: npt.ArrayLike, end: npt.ArrayLike, duration: npt.ArrayLike
) -> NDArray[np.float64]:
    """Value that goes linearly from `start` at step 0 to `end` at step `duration`, then stays.

    Args:
        step: step counts, any shape, in the unit of `duration`.
        start: value at step 0, a number or one per member, [M].
        end: value from step `duration` on; shape as `start`.
        duration: length of the ramp, >= 0; shape as `start`. 0: `end` at every step.

    Returns:
        float64, in the shape of `step`, or [*, M] for members.
    """
    values = (np.asarray(value, np.float64) for value in (start, end, duration))
    start, end, duration = np.broadcast_arrays(*values)
    step = np.asarray(step, np.float64)
    if start.ndim:
        step = step[..., None]
    fraction = np.ones(np.broadcast_shapes(step.shape, start.shape))
    np.divide(step, duration, out=fraction, where=duration > 0.0)
    return np.asarray(start + np.clip(fraction, 0.0, 1.0) * (end - start))


def crossed(before: int, after: int, interval: int) -> bool:
    """Whether a counter that goes from `before` to `after` passes a multiple of `interval`.

    The counter jumps by the number of envs, so `after % interval == 0` would fire at the wrong
    times: with 64 envs and interval 10, every 320 transitions. Interval 0 means off.
    """
    return interval > 0 and after // interval > before // interval


@dataclass(frozen=True)
class Chunk:
    """K consecutive vector steps and the gradient steps that follow each of them.

    Attributes:
        before: global_step at the start of the chunk, transitions of one member.
        num_envs: env copies of one member; each vector step adds this to global_step.
        update_counts: gradient steps after each vector step, length K.
        first_update: number of gradient steps taken before the chunk.
        update_steps: float64 [U_total], the global_step that each gradient step stands for.
        syncs: bool [U_total], whether the target network is synchronised after it.
    """

    before: int
    num_envs: int
    update_counts: tuple[int, ...]
    first_update: int
    update_steps: NDArray[np.float64]
    syncs: NDArray[np.bool_]

    @property
    def num_steps(self) -> int:
        return len(self.update_counts)

    @property
    def num_updates(self) -> int:
        return len(self.update_steps)

    @property
    def after(self) -> int:
        """global_step at the end of the chunk."""
        return self.before + self.num_steps * self.num_envs

    @property
    def steps(self) -> NDArray[np.int64]:
        """global_step before each vector step, int64 [K]."""
        return self.before + self.num_envs * np.arange(self.num_steps)

    def slices_in(self, window: Chunk) -> tuple[slice, slice]:
        """Slices of the window's vector steps and gradient steps that are this chunk's."""
        step = (self.before - window.before) // self.num_envs
        update = self.first_update - window.first_update
        return slice(step, step + self.num_steps), slice(update, update + self.num_updates)

    def cut(self, start: int, num_steps: int) -> Chunk:
        """Part of this chunk: `num_steps` vector steps, from its vector step `start` on."""
        before_part = sum(self.update_counts[:start])
        counts = self.update_counts[start : start + num_steps]
        updates = slice(before_part, before_part + sum(counts))
        return Chunk(
            before=self.before + start * self.num_envs,
            num_envs=self.num_envs,
            update_counts=counts,
            first_update=self.first_update + before_part,
            update_steps=self.update_steps[updates],
            syncs=self.syncs[updates],
        )

    def crosses(self, interval: int) -> bool:
        """Whether `interval` is crossed in the chunk's last vector step; see `Plan.chunks`."""
        return crossed(self.after - self.num_envs, self.after, interval)


@dataclass(frozen=True)
class Plan:
    """The whole run as arithmetic: which vector steps learn, how often, and when to sync.

    A vector step that takes global_step from `before` to `after` is followed by
    `gradient_steps * (after // train_freq - before // train_freq)` gradient steps, once `after` has
    reached `learning_starts`. So the replay ratio does not depend on `num_envs`.

    The U gradient steps of a vector step stand for the steps `before + (u + 1) * num_envs / U`. The
    target is synchronised after the first gradient step at or past each multiple of
    `target_update_interval`, at most once per gradient step.

    Attributes:
        num_envs: env copies of one member, >= 1.
        total_timesteps: transitions of one member; rounded up to a multiple of num_envs.
        learning_starts: no gradient step before this many transitions.
        train_freq: transitions per group of gradient steps, >= 1.
        gradient_steps: gradient steps per `train_freq` transitions, >= 0.
        target_update_interval: transitions between synchronisations of the target, 0 for none.
        max_chunk_steps: maximum number of vector steps of a chunk; never changes the result.
        max_window_steps: vector steps whose noise is drawn at once; never changes the result.
        few_shapes: whether chunks have few different `update_counts`, for an engine that captures
            each one; see `_few_shapes`. Never changes the result.
        intervals: of the side jobs (log, evaluate, save); a chunk ends where one is crossed.
        updates_before: gradient steps taken before `learning_starts`, in a run that was resumed.
    """

    num_envs: int
    total_timesteps: int
    learning_starts: int
    train_freq: int
    gradient_steps: int
    target_update_interval: int
    max_chunk_steps: int = 32
    max_window_steps: int = 256
    few_shapes: bool = False
    intervals: tuple[int, ...] = ()
    updates_before: int = 0

    @property
    def num_vector_steps(self) -> int:
        return -(-self.total_timesteps // self.num_envs)

    @property
    def updates_per_step(self) -> float:
        """Gradient steps for each vector step that learns, on average."""
        return self.gradient_steps * self.num_envs / self.train_freq

    @property
    def end(self) -> int:
        """global_step at the end of the run, a multiple of num_envs."""
        return self.num_vector_steps * self.num_envs

    @property
    def first_learning_step(self) -> int:
        """Index of the first vector step after which gradient steps may follow."""
        return max(-(-self.learning_starts // self.num_envs) - 1, 0)

    @property
    def learning_starts_at(self) -> int:
        """global_step at the end of that vector step."""
        return (self.first_learning_step + 1) * self.num_envs if self.learning_starts else 0

    @property
    def total_updates(self) -> int:
        before = self.first_learning_step * self.num_envs
        groups = self.end // self.train_freq - before // self.train_freq
        return self.updates_before + self.gradient_steps * max(groups, 0)

    @property
    def window_steps(self) -> int:
        """Maximum number of vector steps of a window."""
        return min(self.max_window_steps, self.num_vector_steps)

    @property
    def window_updates(self) -> int:
        """Maximum number of gradient steps of a window."""
        groups = self.window_steps * self.num_envs // self.train_freq + 1
        return min(groups * self.gradient_steps, self.total_updates)

    def due(self, global_step: int) -> tuple[bool, ...]:
        """Which of `intervals` are crossed in the vector step that ends at `global_step`."""
        return tuple(crossed(global_step - self.num_envs, global_step, i) for i in self.intervals)

    def replay_ratio(self, batch_size: int) -> float:
        """Sampled transitions per collected transition once learning has started."""
        return self.gradient_steps * batch_size / self.train_freq

    def step_of_update(self, number: int) -> int:
        """global_step of the vector step that gradient step `number`, from 1, follows."""
        before = self.first_learning_step * self.num_envs
        number = max(number - self.updates_before, 1)
        group = before // self.train_freq + -(-number // self.gradient_steps)
        return -(-group * self.train_freq // self.num_envs) * self.num_envs

    @property
    def period(self) -> int:
        """Vector steps after which the sequence of `update_counts` repeats."""
        return self.train_freq // math.gcd(self.train_freq, self.num_envs)

    def update_counts(self, first: int, num_steps: int) -> NDArray[np.int64]:
        """Gradient steps after each of the vector steps first .. first + num_steps - 1, int64."""
        index = np.arange(first, first + num_steps)
        before = index * self.num_envs
        groups = (before + self.num_envs) // self.train_freq - before // self.train_freq
        return np.where(index >= self.first_learning_step, self.gradient_steps * groups, 0)

    def learning_counts(self) -> set[int]:
        """The different numbers of gradient steps per vector step, once learning has begun."""
        first = self.first_learning_step
        num_steps = min(self.num_vector_steps - first, self.period)
        if num_steps > 2**20:  # too many to list: what a whole period has
            fewest = self.num_envs // self.train_freq
            return {self.gradient_steps * fewest, self.gradient_steps * (fewest + 1)}
        return {int(count) for count in np.unique(self.update_counts(first, max(num_steps, 0)))}

    def chunks(self, first: int = 0, num_updates: int = 0) -> Iterator[tuple[Chunk, Chunk]]:
        """The run from vector step `first` on, in chunks, each with the window that contains it.

        A chunk ends early where one of `intervals` is crossed and where learning starts, so side
        jobs are late by less than one vector step for any chunk length. Noise and schedules are
        made for a whole window of chunks, because their cost is per call.

        Args:
            first: vector steps already taken.
            num_updates: gradient steps already taken.

        Yields:
            The window and the chunk; consecutive chunks share one window object.
        """
        while first < self.num_vector_steps:
            num_steps = min(self.max_window_steps, self.num_vector_steps - first)
            window = self._chunk(first, num_steps, num_updates)
            start, end = first, first + num_steps
            while first < end:
                num_steps = min(self._steps_to_boundary(first), end - first)
                if self.few_shapes:
                    num_steps = self._few_shapes(first, num_steps)
                yield window, window.cut(first - start, num_steps)
                first += num_steps
            num_updates += window.num_updates

    def _steps_to_boundary(self, first: int) -> int:
        before = first * self.num_envs
        ends = [self.num_vector_steps, first + self.max_chunk_steps]
        ends += [-(-(before // i + 1) * i // self.num_envs) for i in self.intervals if i > 0]
        if first < self.first_learning_step:
            ends.append(self.first_learning_step)
        return min(ends) - first

    def _few_shapes(self, first: int, num_steps: int) -> int:
        """Length of a chunk from vector step `first` on, at most `num_steps`.

        At the start of a period: a power of two of whole periods. Elsewhere, and before learning
        starts: a power of two of steps with equal numbers of gradient steps. So a run has at most
        about log2(max_chunk_steps) kinds of chunks for each number of gradient steps, wherever
        intervals and windows end.
        """
        learns, period = first >= self.first_learning_step, self.period
        in_periods = learns and period <= self.max_chunk_steps
        if in_periods and first % period == 0 and num_steps >= period:
            return period * _power_of_two(num_steps // period)
        if in_periods:
            num_steps = min(num_steps, period - first % period)
        counts = self.update_counts(first, num_steps)
        return _power_of_two(int(np.argmin([*(counts == counts[0]), False])))

    def _chunk(self, first: int, num_steps: int, num_updates: int) -> Chunk:
        counts = self.update_counts(first, num_steps)
        step = np.repeat(first + np.arange(num_steps), counts)  # vector step of each gradient step
        count = np.repeat(counts, counts)
        u = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Integers, update_steps * count, so that a step on a multiple of the interval is exact.
        scaled = step * self.num_envs * count + (u + 1) * self.num_envs
        if self.target_update_interval:
            periods = scaled // (count * self.target_update_interval)
            previous = np.concatenate([[self._periods_before(first)], periods])[:-1]
            syncs = periods > previous
        else:
            syncs = np.zeros(len(step), np.bool_)
        return Chunk(
            before=first * self.num_envs,
            num_envs=self.num_envs,
            update_counts=tuple(int(c) for c in counts),
            first_update=num_updates,
            update_steps=scaled / np.maximum(count, 1),
            syncs=syncs,
        )

    def _periods_before(self, first: int) -> int:
        """Sync intervals completed at the last gradient step before vector step `first`.

        With less than one gradient step per vector step, an interval may be crossed where no
        gradient step follows; the next gradient step then synchronises. The last gradient step
        before `first` belongs to the vector step that last crossed `train_freq`, and stands for the
        end of that vector step.
        """
        last_group = first * self.num_envs // self.train_freq * self.train_freq
        last_update_step = -(-last_group // self.num_envs) * self.num_envs
        learning_start = self.first_learning_step * self.num_envs
        return max(last_update_step, learning_start) // self.target_update_interval


def _power_of_two(number: int) -> int:
    """The largest power of two that is at most `number`; number >= 1."""
    return 1 << (number.bit_length() - 1)


@dataclass(frozen=True)
class Schedules:
    """Learning rate, epsilon and tau of each member over the run; float64 [M] each.

    Attributes:
        learning_rate, learning_rate_end: of Adam, at the start and at the end of the run.
        eps_start, eps_end: probability of a random action, before and after its decay.
        eps_steps: transitions over which the probability decays.
        tau: weight of the online network in a synchronisation of the target.
        total_timesteps: length of the run in transitions.
        beta: strength of importance weights, at the start and at the end; None: no weights.
    """

    learning_rate: NDArray[np.float64]
    learning_rate_end: NDArray[np.float64]
    eps_start: NDArray[np.float64]
    eps_end: NDArray[np.float64]
    eps_steps: NDArray[np.float64]
    tau: NDArray[np.float64]
    total_timesteps: int
    beta: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def epsilon(self, step: npt.ArrayLike) -> NDArray[np.float64]:
        """Probability of a random action at global_step `step`, [*, M]."""
        return linear_schedule(step, self.eps_start, self.eps_end, self.eps_steps)

    def of(self, chunk: Chunk) -> tuple[NDArray[np.float64], ...]:
        """Epsilon [K, M] of a chunk, then the schedules of `algorithm.UpdateInputs`: step_size
        [U, M], inverse_correction [U], sync [U, M] and, unless it is None, beta [U, M]."""
        rate = linear_schedule(
            chunk.update_steps, self.learning_rate, self.learning_rate_end, self.total_timesteps
        )
        t = chunk.first_update + np.arange(1, chunk.num_updates + 1)
        with np.errstate(over="ignore"):  # a rate near the largest float becomes infinite
            step_size = rate / (1.0 - ADAM_BETAS[0] ** t)[:, None]
        inverse_correction = 1.0 / np.sqrt(1.0 - ADAM_BETAS[1] ** t)
        sync = np.where(chunk.syncs[:, None], self.tau, 0.0)
        scheduled = (self.epsilon(chunk.steps), step_size, inverse_correction, sync)
        if self.beta is None:
            return scheduled
        return *scheduled, linear_schedule(chunk.update_steps, *self.beta, self.total_timesteps)
