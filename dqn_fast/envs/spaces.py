"""Gymnasium's observation spaces: how observations are checked, stored and read by a network."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""Spaces whose observations are arrays of a fixed shape and dtype."""
IMAGE = 1_024
"""Smallest number of bytes of an image: 32 x 32 pixels of one colour."""
_SMALL = tuple(map(np.dtype, (np.bool_, np.uint8, np.int8, np.int16, np.float16)))


class Violation(Exception):
    """An environment broke its contract.

    Attributes:
        text: the fault, in one line.
        index: which env copy, if that is known.
        error: the exception that the environment raised, if it raised one.
    """

    def __init__(
        self, text: str, index: int | None = None, error: BaseException | None = None
    ) -> None:
        super().__init__(text)
        self.text, self.index, self.error = text, index, error


class _Leaf(NamedTuple):
    """A part of an observation that is no Tuple or Dict.

    Attributes:
        path: keys that lead to it.
        space: its space.
        columns: where it is stored in the row of its block, if there are several parts.
    """

    path: tuple[Any, ...]
    space: spaces.Space[Any]
    columns: slice


class _Block:
    """Consecutive parts of an observation that are stored in one dtype.

    Attributes:
        leaves: the parts.
        dtype: in which they are stored.
        num_bytes: of a row.
        num_features: float32 numbers that the parts become.
    """

    def __init__(self, parts: Sequence[tuple[tuple[Any, ...], spaces.Space[Any]]], dtype: Any):
        ends = list(itertools.accumulate((_width(space) for _, space in parts), initial=0))
        self.leaves = [
            _Leaf(path, space, slice(*ends[i : i + 2])) for i, (path, space) in enumerate(parts)
        ]
        self.dtype = np.dtype(dtype)
        self.num_bytes = ends[-1] * self.dtype.itemsize
        columns, values, scales = map(
            np.concatenate, zip(*map(_feature_table, self.leaves), strict=True)
        )
        self.num_features = len(columns)
        one_hot = ~np.isnan(values)
        # Without one-hot features and with one scale for all, no table is needed.
        self._scale: float | None = None
        if not one_hot.any() and len(scales) and (scales == scales[0]).all():
            self._scale = float(scales[0])
        kind = np.float32 if self.dtype.kind == "f" else np.int64
        table = (columns, np.where(one_hot, values, 0).astype(kind), scales, one_hot)
        self._tables = {torch.device("cpu"): list(map(torch.from_numpy, table))}

    def write_(self, row: NDArray[Any], arrays: Iterable[NDArray[Any]]) -> None:
        """Write the parts [E, ...] into row [E, columns]."""
        with np.errstate(over="ignore"):
            for leaf, array in zip(self.leaves, arrays, strict=True):
                row[:, leaf.columns] = array.reshape(len(row), -1)

    def features(self, row: Tensor) -> Tensor:
        """float32 [..., num_features] of row [..., columns]."""
        if self._scale is not None:
            return row.float() if self._scale == 1.0 else row.float() / self._scale
        if row.device not in self._tables:
            tables = self._tables[torch.device("cpu")]
            self._tables[row.device] = [table.to(row.device) for table in tables]
        columns, values, scales, one_hot = self._tables[row.device]
        spread = row[..., columns]
        return torch.where(one_hot, (spread == values).float(), spread.float() / scales)


class ObservationEncoder:
    """Encodes the observations of a space as arrays, and these as features of a network.

    Observations are stored as [E, *shape]. A space without parts keeps its shape: a Box of at most
    two bytes an element keeps its dtype, any other becomes float32; Discrete and MultiDiscrete are
    stored as integers of the smallest sufficient dtype. The parts of a Tuple or Dict become columns
    of one row: in one dtype that holds all of them if this takes no more memory, else each in its
    own dtype, as bytes. Other spaces are stored as `gymnasium.spaces.flatten` encodes them.

    Attributes:
        shape, dtype: of one stored observation.
        num_features: F.
        arrays_only: every part is an array, so processes can share observations as memory.
        image_shapes: shapes of the parts that are images, see `IMAGE`.

    Raises:
        ValueError: the space is empty or has no fixed size.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        parts = list(_leaves(space))
        if sum(_width(part) for _, part in parts) == 0:
            raise ValueError("is empty")
        self.arrays_only = all(isinstance(part, ARRAYS) for _, part in parts)
        self._nested = isinstance(space, (spaces.Tuple, spaces.Dict)) or not self.arrays_only
        self.image_shapes = [part.shape or () for _, part in parts if is_image(part)]

        dtypes = [_stored_dtype(part) for _, part in parts]
        common = np.result_type(*dtypes)
        joint = _Block(parts, np.float32 if common == np.float64 else common)
        own, first = list[_Block](), 0
        for dtype, run in itertools.groupby(dtypes):
            end = first + len(list(run))
            own.append(_Block(parts[first:end], dtype))
            first = end
        # A block begins at a multiple of its items' size, and so does the next row.
        self._starts, end = list[int](), 0
        for block in own:
            self._starts.append(_round_up(end, block.dtype.itemsize))
            end = self._starts[-1] + block.num_bytes
        end = _round_up(end, max(block.dtype.itemsize for block in own))
        self._in_bytes = end < joint.num_bytes
        self._blocks = own if self._in_bytes else [joint]
        self._leaves = [leaf for block in self._blocks for leaf in block.leaves]
        self.dtype = np.dtype(np.uint8) if self._in_bytes else joint.dtype
        self.shape: tuple[int, ...] = space.shape or ()
        if self._nested:
            self.shape = (end if self._in_bytes else joint.num_bytes // self.dtype.itemsize,)
        self.num_features = sum(block.num_features for block in self._blocks)

    def parts(self, batch: Any) -> list[Any]:
        """The parts of a batch as a VectorEnv returns it."""
        return [functools.reduce(operator.getitem, leaf.path, batch) for leaf in self._leaves]

    def parts_of(self, items: Sequence[Any]) -> list[Any]:
        """The parts of a batch that comes as a list of single observations."""
        rows = zip(*map(self.parts, items), strict=True) if self._nested else [items]
        try:
            return [
                np.array(row) if isinstance(leaf.space, ARRAYS) else row
                for row, leaf in zip(rows, self._leaves, strict=True)
            ]
        except ValueError as error:
            text = f"observations differ in shape: {describe_error(error)}"
            raise Violation(text, error=error) from error

    def encode_any(self, obs: Any) -> NDArray[Any]:
        """Check what an environment or a VectorEnv returns, and encode it.

        Args:
            obs: one observation, or a batch with any leading axes.

        Returns:
            A new array [..., *shape] with these axes.

        Raises:
            Violation: it is not of the space.
        """
        hint = "; env.reset() returns (obs, info): pass obs" if is_reset_result(obs) else ""
        rows, axes = [], set()
        for leaf in self._leaves:
            try:
                flat, leading = _flat_rows(leaf, obs)
            except Violation as violation:
                raise Violation(f"its observation{violation}{hint}") from violation
            rows.append(flat)
            axes.add(leading)
        if len(axes) > 1:
            shapes = " and ".join(map(str, sorted(axes)))
            raise Violation(f"the parts of its observation have different leading axes, {shapes}")
        (leading,) = axes
        return self.encode(rows, math.prod(leading)).reshape((*leading, *self.shape))

    def encode(self, parts: Sequence[Any], num_rows: int) -> NDArray[Any]:
        """Check a batch of observations and encode it as a new array [num_rows, *shape].

        Raises:
            Violation: a row is not in the space or not finite; `index` is the row.
        """
        arrays = [
            _batch(leaf.space, part, num_rows)
            for leaf, part in zip(self._leaves, parts, strict=True)
        ]
        if not self._nested and arrays[0].dtype == self.dtype:
            stored = arrays[0].copy()
        else:  # zeros between the blocks: equal observations are equal bytes
            stored = np.zeros((num_rows, *self.shape), self.dtype)
        rows = self._rows(stored.reshape(num_rows, -1))
        left = iter(arrays)
        for block, row in zip(self._blocks, rows, strict=True):
            if self._nested or arrays[0].dtype != self.dtype:
                block.write_(row, itertools.islice(left, len(block.leaves)))
            if block.dtype.kind == "f" and not np.isfinite(row).all():
                index = first_true(~np.isfinite(row))
                value = row[index][~np.isfinite(row[index])][0]
                raise Violation(f"its observation holds {value}", index)
        return stored

    def features(self, obs: Tensor) -> Tensor:
        """float32 [..., F] of stored observations [..., *shape]."""
        flat = obs.flatten(-len(self.shape)) if self.shape else obs.unsqueeze(-1)
        if not self._in_bytes:
            return self._blocks[0].features(flat)
        parts = []
        for start, block in zip(self._starts, self._blocks, strict=True):
            row = flat[..., start : start + block.num_bytes].view(torch_dtype(block.dtype))
            parts.append(block.features(row))
        return torch.cat(parts, -1)

    def _rows(self, flat: NDArray[Any]) -> list[NDArray[Any]]:
        """The row of each block, as views of stored observations [E, columns]."""
        if not self._in_bytes:
            return [flat]
        return [
            flat[:, start : start + block.num_bytes].view(block.dtype)
            for start, block in zip(self._starts, self._blocks, strict=True)
        ]


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """torch's name of a dtype of NumPy."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def is_image(space: spaces.Space[Any]) -> bool:
    """Whether a space is one of images: bytes in two dimensions or more, at least IMAGE of them."""
    shape = space.shape or ()
    is_bytes = isinstance(space, spaces.Box) and space.dtype == np.uint8
    return is_bytes and len(shape) >= 2 and math.prod(shape) >= IMAGE


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _width(space: spaces.Space[Any]) -> int:
    """Columns in which a space that is no Tuple or Dict is stored."""
    return math.prod(space.shape or ()) if isinstance(space, ARRAYS) else spaces.flatdim(space)


def without_text(
    space: spaces.Space[Any], path: str = ""
) -> tuple[spaces.Space[Any], tuple[str, ...]]:
    """The space without text of no fixed size in a Dict, and the names of the parts left out.

    A Dict of such text alone stays as it is, and has no encoder.
    """
    if not isinstance(space, spaces.Dict):
        return space, ()
    kept: dict[str, spaces.Space[Any]] = {}
    left_out: tuple[str, ...] = ()
    for key, part in space.spaces.items():
        name = f"{path}{key}"
        if _is_endless_text(part):
            left_out += (name,)
            continue
        kept[key], below = without_text(part, f"{name}.")
        left_out += below
    return (spaces.Dict(kept), left_out) if kept and left_out else (space, ())


def _is_endless_text(space: spaces.Space[Any]) -> bool:
    if isinstance(space, (*ARRAYS, spaces.Tuple, spaces.Dict)):
        return False
    try:
        spaces.flatdim(space)
    except (ValueError, NotImplementedError):
        return isinstance(space.sample(), str)
    return False


def _leaves(
    space: spaces.Space[Any], path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], spaces.Space[Any]]]:
    """The parts that are no Tuple or Dict, with their paths, in Gymnasium's order."""
    if isinstance(space, (spaces.Tuple, spaces.Dict)):
        parts = space.spaces
        for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
            yield from _leaves(part, (*path, key))
        return
    try:
        _width(space)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"has no fixed size because of {shorten(str(space))}") from error
    yield path, space


def _stored_dtype(space: spaces.Space[Any]) -> np.dtype[Any]:
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        first, last = _bounds(space)
        least, most = np.min(first), np.max(last)
        for kind in (np.uint8, np.int8, np.int16, np.int32):
            if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max:
                return np.dtype(kind)
        return np.dtype(np.int64)
    if isinstance(space, spaces.MultiBinary):
        return np.dtype(np.uint8)
    if isinstance(space, spaces.Box) and space.dtype in _SMALL:
        return np.dtype(space.dtype)
    return np.dtype(np.float32)


def _bounds(space: spaces.Discrete | spaces.MultiDiscrete) -> tuple[Any, Any]:
    """Lowest and highest value, each as one number or as an array of the space's shape."""
    size = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return space.start, space.start + size - 1


def _feature_table(leaf: _Leaf) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """For each feature of a part: its column, int64; the value that a one-hot feature stands for,
    NaN if it is not one-hot; the divisor of one that is not, float32."""
    space, columns = leaf.space, np.arange(leaf.columns.start, leaf.columns.stop, dtype=np.int64)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        first, last = map(np.ravel, _bounds(space))
        values = [np.arange(low, high + 1.0) for low, high in zip(first, last, strict=True)]
        sizes = list(map(len, values))
        return np.repeat(columns, sizes), np.concatenate(values), np.ones(sum(sizes), np.float32)
    is_image = (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )
    shape = len(columns)
    return columns, np.full(shape, np.nan), np.full(shape, 255.0 if is_image else 1.0, np.float32)


def _part(obs: Any, path: tuple[Any, ...]) -> Any:
    """The part of an observation to which a path of keys and numbers leads."""
    for key in path:
        kinds = (tuple, list) if isinstance(key, int) else Mapping
        if not isinstance(obs, (kinds, Mapping)):
            kind = "tuple" if isinstance(key, int) else "dict"
            raise Violation(f" is {describe_value(obs)}, not a {kind} with {key!r}")
        if not (key in obs if isinstance(obs, Mapping) else key < len(obs)):
            raise Violation(f" is {describe_value(obs)} without {key!r}")
        obs = obs[key]
    return obs


def _flat_rows(leaf: _Leaf, obs: Any) -> tuple[Any, tuple[int, ...]]:
    """A part of one observation or of a batch, as rows, and the leading axes of the batch."""
    space, part = leaf.space, _part(obs, leaf.path)
    name = "".join(f"[{key!r}]" for key in leaf.path)
    if isinstance(part, Tensor):
        part = part.numpy(force=True)
    if not isinstance(space, ARRAYS):
        items = [part]
        leading: tuple[int, ...] = ()
        if part not in space and isinstance(part, (list, tuple, np.ndarray)):
            items, leading = list(part), (len(part),)
        for item in items:
            if item not in space:
                text = f"{name} is {describe_value(item)}, which is not in {shorten(str(space))}"
                raise Violation(text)
        return items, leading
    try:
        array = np.asarray(part)
    except Exception:
        raise Violation(f"{name} is {describe_value(part)}, not an array") from None
    shape = space.shape or ()
    split = array.ndim - len(shape)
    if array.dtype.kind not in "biuf" or split < 0 or array.shape[split:] != shape:
        wanted = f"numbers of shape [{', '.join(['...', *map(str, shape)])}]"
        raise Violation(f"{name} is {describe_value(part)}; must be {wanted}")
    return array.reshape(-1, *shape), array.shape[:split]


def _batch(space: spaces.Space[Any], part: Any, num_rows: int) -> NDArray[Any]:
    """A part of all observations as an array [num_rows, ...] whose values are in the space."""
    if not isinstance(space, ARRAYS):
        return np.stack([np.asarray(spaces.flatten(space, item)) for item in part])
    array = np.asarray(part)
    shape = (num_rows, *(space.shape or ()))
    if array.shape != shape:
        raise Violation(f"observations have the shape {array.shape}, not {shape}")
    array = as_dtype(array, np.dtype(space.dtype))
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        first, last = _bounds(space)
        wrong = (array < first) | (array > last)
        if wrong.any():
            row = first_true(wrong)
            text = f"its observation {array[row]} is not in {shorten(str(space))}"
            raise Violation(text, row)
    return array


def as_dtype(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`array` in the dtype of its space.

    Raises:
        Violation: it holds no numbers, or whole numbers would change.
    """
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in "biuf":
        raise Violation(f"its observation has the dtype {array.dtype}, its space {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast, array):
        raise Violation(
            f"its observation is {array.dtype} and does not fit the {dtype} of its space"
        )
    return cast


def first_true(mask: NDArray[np.bool_]) -> int:
    """First row of `mask` [E, ...] that holds a True."""
    return int(mask.reshape(len(mask), -1).any(1).argmax())


def is_reset_result(value: Any) -> bool:
    """Whether a value looks like the whole result of `env.reset()`."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)


def describe_value(value: Any) -> str:
    """A value's type and content, for an error message."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{shorten(repr(value))} ({type(value).__name__})"


def describe_error(error: BaseException) -> str:
    """An exception in one line."""
    text = shorten(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shorten(text: str, most: int = 300) -> str:
    """`text` in one line of at most `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
