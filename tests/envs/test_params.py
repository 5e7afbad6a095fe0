"""Parameters of environments: conversion for files and from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dqn_fast.envs import Acrobot, make_env
from dqn_fast.envs.params import cast, freeze, plain


def test_plain_values_are_pythons_own():
    """Exactly the types that JSON and `torch.load(weights_only=True)` know, at any depth."""
    value = {
        "double": np.float64(0.5),
        "nested": [np.int64(3), (np.float32(0.25), torch.tensor(2)), np.str_("a")],
        "array": np.arange(3),
        "tensor": torch.ones(2, 1),
        1: np.bool_(True),
        "path": Path("a/b"),
        "same": (None, True, 1, 1.5, "text"),
        "other": {3},
    }
    expected = {
        "double": 0.5,
        "nested": [3, (0.25, 2), "a"],
        "array": [0, 1, 2],
        "tensor": [[1.0], [1.0]],
        "1": True,
        "path": "a/b",
        "same": (None, True, 1, 1.5, "text"),
        "other": "{3}",
    }
    assert plain(value) == expected
    assert type(plain(value)["double"]) is float
    assert type(plain(value)["nested"][2]) is str
    json.dumps(plain(value))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, 3),
        ("3.0", int, 3),
        (str(2**60 + 1), int, 2**60 + 1),
        (np.int64(3), int, 3),
        ("3", float, 3.0),
        ("False", bool, False),
        ("none", int | None, None),
        ("4", int | None, 4),
        (None, float | None, None),
        ("none", str | None, None),
        ("none", str, "none"),
        (3, str | int, 3),
        ("a", int | str, "a"),
        ("1", Literal[1, 2], 1),
        ("b", Literal["a", "b"], "b"),
        ("-1,0,1", tuple[float, float, float], (-1.0, 0.0, 1.0)),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ("1,-0.5,2", tuple[int, int, int], (1, -0.5, 2)),
        ("ab,cd", list[str], ("ab", "cd")),
        (["a", ["b"]], Any, ("a", ("b",))),
    ],
    ids=str,
)
def test_text_becomes_what_the_hint_says(value, hint, expected):
    """The value and its type, of parts too."""
    result = cast("x", value, hint)
    assert result == expected
    assert type(result) is type(expected)
    if isinstance(expected, tuple):
        assert list(map(type, result)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("value", "hint", "allowed"),
    [
        ("1.5", int, "of type int"),
        ("2", bool, "of type bool"),
        ("x", int | None, "of type int or none"),
        ("3", Literal[1, 2], "1 or 2"),
        ("1,b", tuple[float, float], "of type tuple"),
        (3, tuple[int, ...], "of type tuple"),
        (None, float, "of type float"),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(value, hint, allowed):
    """One line that names the parameter, the value and what is allowed."""
    with pytest.raises(ValueError, match=rf"^--env-params x {value}: must be {allowed}$"):
        cast("x", value, hint)


def test_frozen_values_can_be_hashed():
    """Sequences of plain values; anything else is refused."""
    assert hash(freeze([1, [2, "a"], None])) == hash((1, (2, "a"), None))
    with pytest.raises(TypeError):
        freeze([{}])


def test_torques_can_be_given_as_text():
    """A tuple of an environment's dataclass, which its own checks then see."""
    env = make_env("Acrobot-v1", {"avail_torque": "-2,0,1.5", "book_or_nips": "nips"})
    assert env == Acrobot(avail_torque=(-2.0, 0.0, 1.5), book_or_nips="nips")
    assert make_env("Acrobot-v1", json.loads(json.dumps(env.params))) == env
    with pytest.raises(ValueError, match=r"--env-params avail_torque .*: must be three finite"):
        make_env("Acrobot-v1", {"avail_torque": "1,2"})
