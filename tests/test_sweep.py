"""Members with settings of their own: which they are, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dqn_fast.sweep import SCALES, SWEPT, label_of, members_of, points_of, read_sweep, sweep_error


def test_a_command_line_is_names_with_their_values():
    """Names may have hyphens; numbers may be infinite."""
    words = "learning-rate 1e-4 3e-4 max_grad_norm inf".split()
    assert read_sweep(words) == {"learning_rate": (1e-4, 3e-4), "max_grad_norm": (math.inf,)}
    assert read_sweep([]) == {}
    with pytest.raises(ValueError, match=r"0\.9: must come after the name of a setting"):
        read_sweep(["0.9", "gamma"])


def test_a_grid_holds_all_combinations_in_order():
    """The last name varies fastest; no sweep is one setting, the run's own."""
    grid = points_of({"tau": (0.1, 0.2), "gamma": (0.9, 0.99)}, 0, seed=0)
    assert grid == [
        {"tau": 0.1, "gamma": 0.9},
        {"tau": 0.1, "gamma": 0.99},
        {"tau": 0.2, "gamma": 0.9},
        {"tau": 0.2, "gamma": 0.99},
    ]
    assert points_of({}, 0, seed=0) == [{}]


def test_random_settings_lie_in_their_range_and_repeat():
    """Scales are drawn in proportion, others uniformly; the seed decides."""
    sweep = {"learning_rate": (1e-2, 1e-4), "gamma": (0.9, 1.0)}
    points = points_of(sweep, 4_000, seed=3)
    assert points == points_of(sweep, 4_000, seed=3) != points_of(sweep, 4_000, seed=4)
    rate, gamma = (np.array([point[name] for point in points]) for name in sweep)
    assert 1e-4 <= rate.min() < rate.max() <= 1e-2
    assert (rate < 1e-3).mean() == pytest.approx(0.5, abs=0.03)
    assert 0.9 <= gamma.min() < gamma.max() <= 1.0
    assert gamma.mean() == pytest.approx(0.95, abs=0.002)


def test_every_setting_meets_every_seed():
    """Member i has setting i // num_seeds and seed `seed + i % num_seeds`."""
    members = members_of({"tau": (0.1, 0.2)}, 0, seed=5, num_seeds=3)
    assert [(m["tau"], m["seed"]) for m in members] == [
        (0.1, 5), (0.1, 6), (0.1, 7), (0.2, 5), (0.2, 6), (0.2, 7)
    ]  # fmt: skip
    assert members_of({}, 0, seed=1, num_seeds=2) == [{"seed": 1}, {"seed": 2}]


@pytest.mark.parametrize(
    ("sweep", "num_random", "message"),
    [
        ({"batch_size": (32, 64)}, 0, "batch_size: must be one of learning_rate, "),
        ({"gamma": ()}, 0, "gamma : must have different values"),
        ({"gamma": (0.9, 0.9)}, 0, "gamma 0.9 0.9: must have different values"),
        ({"gamma": (0.9,)}, 4, "gamma: must have two values with --sweep-random"),
        ({"max_grad_norm": (1.0, math.inf)}, 4, "max_grad_norm: must have finite values"),
        ({"tau": (0.0, 1.0)}, 4, "tau: must have values above 0 with --sweep-random"),
        ({}, 4, "must name settings with --sweep-random"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep, num_random, message):
    """The message names the setting and the values that are allowed."""
    assert str(sweep_error(sweep, num_random)).startswith(message)


def test_right_sweeps_pass():
    """Every setting alone, and none at all."""
    assert sweep_error({}, 0) is None
    for name in SWEPT:
        assert sweep_error({name: (0.25, 0.5)}, 0) is None
        assert sweep_error({name: (0.25, 0.5)}, 2) is None
    assert set(SCALES) < set(SWEPT)


def test_a_label_names_a_members_own_settings():
    """Not its seed, which the run has."""
    assert (
        label_of({"seed": 3, "learning_rate": 3e-4, "gamma": 0.99})
        == "learning_rate 0.0003, gamma 0.99"
    )
    assert label_of({"seed": 3}) == ""
