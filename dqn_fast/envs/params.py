"""Parameters of environments: conversion for files and from the text of a command line."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """Convert `value` to types that JSON and a checkpoint can hold.

    Numbers and arrays of NumPy and torch become Python's, also when nested. A value that is no
    number, text, sequence or mapping becomes its text.
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):  # before float, which np.float64 is
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value] if isinstance(value, list) else tuple(map(plain, value))
    return str(value) if isinstance(value, PurePath) else repr(value)


def parse_text(text: str) -> Any:
    """Text of the command line as the number, truth value, None or list that it reads as."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf", text, re.IGNORECASE):
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    if text[:1] in "[{":
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def freeze(value: Any) -> Any:
    """Convert lists in `value` to tuples, so that it can be hashed.

    Raises:
        TypeError: it is no number, text, None or sequence of them.
    """
    if isinstance(value, list | tuple):
        return tuple(map(freeze, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(value)


def cast(name: str, value: Any, *hints: Any) -> Any:
    """Convert `value`, which may be text, to the first of some type hints that accepts it.

    An int must be a whole number, a bool true or false; none is None if a hint allows that. "1,2,3"
    is a sequence and becomes a tuple; a sequence of int may hold other numbers. `Any` accepts the
    values that `freeze` accepts.

    Raises:
        ValueError: no hint accepts it; the message names the parameter.
    """
    options = [
        option
        for hint in hints
        for option in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
    ]
    if type(value) is not str and type(value) in options:
        return value
    for option in sorted(options, key=lambda option: option is not NoneType):  # before str
        try:
            return _as(value, option)
        except (LookupError, OverflowError, TypeError, ValueError):
            continue
    raise ValueError(f"--env-params {name} {value}: must be {' or '.join(map(_allowed, options))}")


def _as(value: Any, hint: Any) -> Any:
    """Convert `value` to one type; raises if that type does not accept it."""
    kind = get_origin(hint) or hint
    if kind is Any:
        return freeze(value)
    if kind is NoneType:
        return {"none": None}[str(value).lower()]
    if kind is Literal:
        exact = [choice for choice in get_args(hint) if choice == value]
        return (exact or [choice for choice in get_args(hint) if str(choice) == value])[0]
    if kind in (list, tuple):
        item = next(iter(get_args(hint)), Any)
        converters: dict[Any, Callable[[Any], Any]] = {int: _number, float: float}
        convert = converters.get(item, freeze)
        return tuple(
            convert(part) for part in (value.split(",") if isinstance(value, str) else value)
        )
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    return _whole(value) if kind is int else kind(value)


def _whole(value: Any) -> int:
    if isinstance(value, str) and value.lstrip("+-").isdigit():
        return int(value)
    if float(value) != int(float(value)):
        raise ValueError(value)
    return int(float(value))


def _number(value: Any) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _allowed(hint: Any) -> str:
    """A hint in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if hint is NoneType:
        return "none"
    return f"of type {getattr(get_origin(hint) or hint, '__name__', hint)}"
