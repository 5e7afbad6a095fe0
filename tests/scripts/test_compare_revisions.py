"""The comparison of two revisions sees what differs and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from scripts.compare_revisions import (
    KINDS,
    different_rows,
    different_tensors,
    read_tensors,
    without_evaluations,
)

A = {"q_net/0": torch.tensor([1.0, 2.0]), "size": torch.tensor([[3]])}


def test_equal_checkpoints_have_no_differences():
    """A tensor under another name or in another shape is the same tensor."""
    moved = {"params/0": torch.tensor([[1.0], [2.0]]), "size": torch.tensor([[3]])}
    assert different_tensors(A, dict(A)) == different_tensors(A, moved) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"q_net/0": torch.tensor([1.0, 2.0000002])}, ["base q_net/0", "head q_net/0"]),
        ({"size": torch.tensor([[3]], dtype=torch.int32)}, ["base size", "head size"]),
        ({"q_net/0": torch.tensor([[3]])}, ["base q_net/0", "head q_net/0"]),
    ],
)
def test_a_bit_or_a_type_is_a_difference(change, found):
    """The last bit counts, and so does how often a content is there."""
    assert different_tensors(A, A | change) == found


def test_a_missing_tensor_is_a_difference_and_a_new_one_is_not():
    """Losing one is seen from the other side; a state may grow."""
    assert different_tensors(A, A | {"more": torch.zeros(1)}) == []
    assert different_tensors(A, {"size": A["size"]}) == ["base q_net/0"]


def test_rows_are_compared_exactly_or_within_a_tolerance():
    """Metrics that only one side has are differences; None is equal to None only."""
    row = {"global_step": 64, "losses/td_loss": [0.5], "charts/epsilon": None}
    near = row | {"losses/td_loss": [0.5001]}
    assert different_rows([row], [dict(row)]) == []
    assert different_rows([row], [near]) == ["global_step 64 losses/td_loss: [0.5] and [0.5001]"]
    assert different_rows([row], [near], tolerance=1e-3) == []
    assert len(different_rows([row], [row | {"charts/epsilon": 0.0}], tolerance=1e-3)) == 1
    assert len(different_rows([row], [row | {"eval/return_mean": [1.0]}])) == 1
    assert different_rows([row], []) == ["1 and 0 rows"]
    nested, close = ({"global_step": 1, "members": {"q": [x, 1.0]}} for x in (0.5, 0.5001))
    assert different_rows([nested], [close], tolerance=1e-3) == []
    assert len(different_rows([nested], [close], tolerance=1e-5)) == 1


def test_greedy_play_is_left_out():
    """Of all members together and of each."""
    row = {"eval/return_mean": 1.0, "q/probe_0": 0.5, "members": {"exact/q": [1.0], "q/p": [2.0]}}
    kept = without_evaluations([row])
    assert kept == [{"q/probe_0": 0.5, "members": {"q/p": [2.0]}}]


def test_tensors_of_a_checkpoint_are_found_by_path(tmp_path):
    """Lists and dicts are walked into."""
    torch.save(
        {"q_net": {"w": torch.ones(1)}, "x": [torch.zeros(2), 3]}, tmp_path / "checkpoint.pt"
    )
    assert read_tensors(tmp_path).keys() == {"/q_net/w", "/x/0"}


def test_an_unknown_kind_is_refused():
    """One line, exit status 2."""
    command = [sys.executable, "-m", "scripts.compare_revisions", "HEAD", "--kinds", "atari"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --kinds atari: must be among line-world")


@pytest.mark.slow
def test_a_revision_equals_itself():
    """Runs of every kind repeat bit for bit."""
    command = [sys.executable, "-m", "scripts.compare_revisions", "HEAD", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": equal") == len(KINDS)
