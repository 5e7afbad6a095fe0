"""A chunk of vector steps, run plainly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from dqn_fast import tree
from dqn_fast.algorithm import (
    UPDATE_METRICS,
    Algorithm,
    ChunkRecord,
    StepInputs,
    StepRecord,
    UpdateInputs,
)


def chunk_(
    algorithm: Algorithm,
    state: Any,
    steps: StepInputs,
    updates: UpdateInputs,
    update_counts: tuple[int, ...],
    step_: Callable[..., StepRecord] | None = None,
) -> ChunkRecord:
    """K vector steps, each followed by its number of gradient steps; reads nothing on the host.

    Args:
        algorithm: describes a vector step.
        state: of the algorithm, written.
        steps: inputs of the K vector steps.
        updates: inputs of the U gradient steps of all of them.
        update_counts: gradient steps after each vector step, length K.
        step_: replaces the algorithm's `vector_step_`.
    """
    step_ = step_ or algorithm.vector_step_
    each_update = (UpdateInputs(*row) for row in zip(*tree.leaves(updates), strict=True))
    records = [
        step_(state, StepInputs(*step), list(itertools.islice(each_update, count)))
        for step, count in zip(zip(*steps, strict=True), update_counts, strict=True)
    ]
    metrics = [update for record in records for update in record.updates]
    copies = (algorithm.num_members, -1)
    shape = (0, len(UPDATE_METRICS), algorithm.num_members)
    return ChunkRecord(
        torch.stack([record.episode_return for record in records]).unflatten(1, copies),
        torch.stack([record.episode_length for record in records]).unflatten(1, copies),
        torch.stack(metrics) if metrics else updates.step_size.new_empty(shape),
    )
