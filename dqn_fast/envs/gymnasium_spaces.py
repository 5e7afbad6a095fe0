"""Observations of Gymnasium's spaces: how they are checked, stored and read by a network."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor


class Broken(Exception):
    """The contract is broken; the cause is the exception of the environment, if there is one."""

    def __init__(self, text: str, copy: int | None = None) -> None:
        super().__init__(text)
        self.text, self.copy = text, copy


class _Leaf(NamedTuple):
    """A part of an observation that is no Tuple or Dict.

    Attributes:
        path: indices that lead to it.
        space: its space.
        columns: where it is stored, when there is more than one.
    """

    path: tuple[Any, ...]
    space: spaces.Space[Any]
    columns: slice


class Observations:
    """How observations of a space are stored, and what the network reads.

    Stored: an array [E, *shape]. A space without parts keeps its shape: a Box in its dtype where
    that has at most two bytes, else in float32; Discrete and MultiDiscrete as their numbers in the
    smallest dtype that holds them. Parts of a Tuple or Dict become columns of one row in the
    smallest dtype that holds all. Other spaces are stored as `gymnasium.spaces.flatten` has them.

    Attributes:
        shape, dtype: of one stored observation.
        num_features: F.
        simple: made of arrays only, so that processes can share it as memory.

    Raises:
        ValueError: the space has no fixed size, or none at all.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        found = list(_leaves(space))
        if sum(_width(leaf) for _, leaf in found) == 0:
            raise ValueError("is empty")
        stops = np.cumsum([_width(leaf) for _, leaf in found], dtype=int).tolist()
        self._leaves = [
            _Leaf(path, leaf, slice(start, stop))
            for (path, leaf), start, stop in zip(found, [0, *stops[:-1]], stops, strict=True)
        ]
        self.simple = all(isinstance(leaf, ARRAYS) for _, leaf in found)
        self._nested = isinstance(space, (spaces.Tuple, spaces.Dict)) or not self.simple
        self.shape: tuple[int, ...] = (stops[-1],) if self._nested else space.shape or ()
        self.dtype = _common_dtype([_stored_dtype(leaf) for _, leaf in found])
        tables = [_feature_table(leaf) for leaf in self._leaves]
        columns, values, scales = (np.concatenate(part) for part in zip(*tables, strict=True))
        self.num_features = len(columns)
        # All features are numbers on one scale: what is stored is nearly what is read.
        self._scale: float | None = None
        if np.isnan(values).all() and (scales == scales[0]).all():
            self._scale = float(scales[0])
        one_hot = ~np.isnan(values)
        kind = np.float32 if self.dtype.kind == "f" else np.int64
        self._table = [
            torch.from_numpy(table)
            for table in (
                columns.astype(np.int64),
                np.where(one_hot, values, 0).astype(kind),
                scales.astype(np.float32),
                one_hot,
            )
        ]
        self._tables = {torch.device("cpu"): self._table}

    def parts(self, batch: Any) -> list[Any]:
        """The parts of a batch as a VectorEnv returns it."""
        return [functools.reduce(operator.getitem, leaf.path, batch) for leaf in self._leaves]

    def parts_of(self, items: Sequence[Any]) -> list[Any]:
        """The parts of a batch that comes as single observations."""
        rows = zip(*map(self.parts, items), strict=True) if self._nested else [items]
        try:
            return [
                np.array(row) if isinstance(leaf.space, ARRAYS) else row
                for row, leaf in zip(rows, self._leaves, strict=True)
            ]
        except ValueError as error:
            raise Broken(f"observations differ in shape: {say(error)}") from error

    def encode(
        self, parts: Sequence[Any], num_rows: int, copies: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """A new array [num_rows, *shape] of what is to be stored; row i is of copy copies[i]."""
        arrays = [
            self._checked(leaf.space, part, num_rows, copies)
            for leaf, part in zip(self._leaves, parts, strict=True)
        ]
        if not self._nested and arrays[0].dtype == self.dtype:
            stored = arrays[0].copy()
        else:
            stored = np.empty((num_rows, *self.shape), self.dtype)
            with np.errstate(over="ignore"):
                for array, leaf in zip(arrays, self._leaves, strict=True):
                    if self._nested:
                        stored[:, leaf.columns] = array.reshape(num_rows, -1)
                    else:
                        stored[:] = array
        if self.dtype.kind == "f" and not np.isfinite(stored).all():
            bad = ~np.isfinite(stored).reshape(num_rows, -1).all(1)
            row = int(np.flatnonzero(bad)[0])
            values = stored[row][~np.isfinite(stored[row])]
            raise Broken(f"its observation holds {values[0]}", _copy(row, copies))
        return stored

    @staticmethod
    def _checked(
        space: spaces.Space[Any], part: Any, num_rows: int, copies: NDArray[np.int64] | None
    ) -> NDArray[Any]:
        """A part as an array [num_rows, ...] with the values that its space has."""
        if not isinstance(space, ARRAYS):
            return np.stack([np.asarray(spaces.flatten(space, item)) for item in part])
        array = np.asarray(part)
        shape = (num_rows, *(space.shape or ()))
        if array.shape != shape:
            raise Broken(f"observations have the shape {array.shape}, not {shape}")
        array = as_dtype(array, np.dtype(space.dtype))
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            first = space.start
            last = first + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
            wrong = (array < first) | (array > last)
            if wrong.any():
                row = int(np.flatnonzero(wrong.reshape(num_rows, -1).any(1))[0])
                raise Broken(
                    f"its observation {array[row]} is not in {shorten(str(space))}",
                    _copy(row, copies),
                )
        return array

    def features(self, obs: Tensor) -> Tensor:
        """float32 [..., F] of stored observations [..., *shape]."""
        flat = obs.flatten(-len(self.shape)) if self.shape else obs.unsqueeze(-1)
        if self._scale is not None:
            return flat.float() if self._scale == 1.0 else flat.float() / self._scale
        if obs.device not in self._tables:
            self._tables[obs.device] = [table.to(obs.device) for table in self._table]
        columns, values, scales, one_hot = self._tables[obs.device]
        spread = flat[..., columns]
        return torch.where(one_hot, (spread == values).float(), spread.float() / scales)


ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def _leaves(
    space: spaces.Space[Any], path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], spaces.Space[Any]]]:
    """Path and space of every part that is no Tuple or Dict, in the order of Gymnasium."""
    if isinstance(space, (spaces.Tuple, spaces.Dict)):
        parts = space.spaces
        for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
            yield from _leaves(part, (*path, key))
    else:
        yield path, space


def _width(space: spaces.Space[Any]) -> int:
    """Columns that a part is stored in."""
    if isinstance(space, ARRAYS):
        return math.prod(space.shape or ())
    try:
        return int(spaces.flatdim(space))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"has no fixed size because of {shorten(str(space))}") from error


def _stored_dtype(space: spaces.Space[Any]) -> np.dtype[Any]:
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        size = space.n if isinstance(space, spaces.Discrete) else space.nvec
        least, most = np.min(space.start), np.max(space.start + size - 1)
        for kind in (np.uint8, np.int8, np.int16, np.int32):
            if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max:
                return np.dtype(kind)
        return np.dtype(np.int64)
    if isinstance(space, spaces.MultiBinary):
        return np.dtype(np.uint8)
    if isinstance(space, spaces.Box) and space.dtype in _SMALL:
        return np.dtype(space.dtype)
    return np.dtype(np.float32)


_SMALL = tuple(map(np.dtype, (np.bool_, np.uint8, np.int8, np.int16, np.float16)))


def _common_dtype(dtypes: list[np.dtype[Any]]) -> np.dtype[Any]:
    """Smallest dtype that holds all; float32 at most, which is what the network reads."""
    common = np.result_type(*dtypes)
    return np.dtype(np.float32) if common == np.float64 else common


def _feature_table(leaf: _Leaf) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of each feature of a part: the column that it is read from, the value that makes it one (NaN
    where it is the number itself), and what that number is divided by."""
    space, columns = leaf.space, np.arange(leaf.columns.start, leaf.columns.stop)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        nvec = space.nvec if isinstance(space, spaces.MultiDiscrete) else [space.n]
        sizes, starts = np.ravel(nvec), np.ravel(space.start)
        values = np.concatenate([np.arange(n) + s for n, s in zip(sizes, starts, strict=True)])
        return np.repeat(columns, sizes), values.astype(float), np.ones(len(values))
    pixels = (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )
    scale = 255.0 if pixels else 1.0
    return columns, np.full(len(columns), np.nan), np.full(len(columns), scale)


def as_dtype(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`array` in the dtype of its space; refused where whole numbers would not survive that."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in "biuf":
        raise Broken(f"its observation has the dtype {array.dtype}, its space {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast, array):
        raise Broken(f"its observation is {array.dtype} and does not fit the {dtype} of its space")
    return cast


def _copy(row: int, copies: NDArray[np.int64] | None) -> int:
    return row if copies is None else int(copies[row])


def show(value: Any) -> str:
    """A value for a message: what type it is, and what it looks like."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{shorten(repr(value))} ({type(value).__name__})"


def say(error: BaseException) -> str:
    """An exception in one line."""
    text = shorten(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shorten(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
