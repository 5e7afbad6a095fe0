"""States of single Gymnasium environments as plain values, so that a run can be resumed.

A layer is a wrapper or the environment inside. A layer with the methods `state_dict()` and
`load_state_dict(state)` is saved with these; of any other layer every attribute must be data, a
random generator, or a constant that a newly made copy has too. What no attribute shows, such as a
global random generator, is found by playing: two copies with one state must give equal results. The
order in which Python iterates over a set is not saved.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import random
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from dqn_fast.ambient import global_numbers_kept
from dqn_fast.envs.spaces import describe_error

Env = gymnasium.Env[Any, Any]

_ROUNDS = (11, 20, 5)
"""Rounds of the check by playing: steps before the state is copied."""
_STEPS = 60
"""Steps of each round after that."""
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_MOST_POOL = 1024
"""Largest pool of a seed sequence that a file may ask for."""
_KINDS = "biufcSUmM"
"""Kinds of NumPy dtypes that are data."""


class UnsavableError(Exception):
    """The state of an environment cannot be saved; the message says why."""


class StateKeeper:
    """Saves and loads the states of the copies that one callable makes.

    Args:
        make: makes a further copy.
    """

    def __init__(self, make: Callable[[], Env]) -> None:
        self._make = make
        self._fresh: list[_Layer] | None = None
        self._reason = ""

    def save(self, env: Env) -> dict[str, Any]:
        """State of a copy that was reset: plain values and tensors.

        "fresh" describes a copy that was never reset, "layers" the attributes that differ from it.

        Raises:
            UnsavableError: the state cannot be saved.
        """
        if self._reason:
            raise UnsavableError(self._reason)
        try:
            state = _encode_env(env)  # before another copy is made, which may be costly
            if self._fresh is None:
                self._check_by_playing()
            assert self._fresh is not None
            layers = _difference(state, self._fresh)
        except Exception as error:
            known = isinstance(error, UnsavableError)
            self._reason = str(error) if known else f"it raised {describe_error(error)}"
            raise UnsavableError(self._reason) from error
        return {"fresh": [layer.data for layer in self._fresh], "layers": layers}

    def try_save(self, env: Env) -> dict[str, Any] | str:
        """As `save`, but return the reason why the state cannot be saved."""
        try:
            return self.save(env)
        except UnsavableError as error:
            return str(error)

    def _check_by_playing(self) -> None:
        """Two copies with one state must give the same results, bit for bit."""
        copies: list[Env] = []
        try:
            with global_numbers_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                first = self._make()
                copies.append(first)
                fresh = _encode_env(first, is_fresh=True)
                second = self._make()
                copies.append(second)
                _difference(_encode_env(second, is_fresh=True), fresh)
                first.reset(seed=1)
                second.reset(seed=2)
                for number, warm_up in enumerate(_ROUNDS):
                    _play(first, 3 * number, warm_up)
                    _play(second, 3 * number + 1, 1)
                    layers = _difference(_encode_env(first), fresh)
                    saved = {"fresh": [layer.data for layer in fresh], "layers": layers}
                    load_state_(second, saved)
                    seed = 3 * number + 2
                    if not identical(_play(first, seed, _STEPS), _play(second, seed, _STEPS)):
                        raise UnsavableError(
                            "two copies with the same attributes give different results: a part of "
                            "its state is elsewhere, such as in a global random generator"
                        )
        except UnsavableError:
            raise
        except Exception as error:
            raise UnsavableError(f"a further copy of it raised {describe_error(error)}") from error
        finally:
            for env in copies:
                with contextlib.suppress(Exception):
                    env.close()
        self._fresh = fresh


def load_state_(env: Env, saved: Mapping[str, Any]) -> None:
    """Give a copy that was reset the state that `StateKeeper.save` returned.

    Raises:
        ValueError: the state is not one of such a copy.
    """
    layers = _layers(env)
    try:
        fresh, changed = saved["fresh"], saved["layers"]
        if not len(layers) == len(fresh) == len(changed):
            raise ValueError(f"it has {len(layers)} layers, the saved one {len(changed)}")
        for layer, common, own in zip(layers, fresh, changed, strict=True):
            if common["class"] != _class_name(layer):
                raise ValueError(f"it has a {_class_name(layer)}, the saved one {common['class']}")
            _load_layer_(layer, {**common["attributes"], **own["attributes"]}, own)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the saved state does not fit: {describe_error(error)}") from error


def _load_layer_(layer: Env, attributes: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Set the attributes of one layer, and remove those that the saved one did not have."""
    if "state" in own:
        generator = getattr(layer, "_np_random", None)
        for name, value in attributes.items():  # its random generator, which others may refer to
            saved = _decode(value)
            if isinstance(generator, np.random.Generator) and (
                type(generator.bit_generator) is type(saved.bit_generator)
            ):
                generator.bit_generator.state = saved.bit_generator.state
            else:
                setattr(layer, name, saved)
        layer.load_state_dict(_decode(own["state"]))  # type: ignore[attr-defined]
        return
    values = {
        name: _decode(value) for name, value in attributes.items() if name not in own["absent"]
    }
    for name, value in list(vars(layer).items()):
        if name not in values and not _is_constant(layer, name, value):
            delattr(layer, name)
    vars(layer).update(values)


# -------------------------------------------------------------------------------- layers as data


class _Layer:
    """One layer: its data as plain values, and its constants."""

    def __init__(self, data: dict[str, Any], constants: dict[str, Any], state: Any) -> None:
        self.data, self.constants, self.state = data, constants, state


def _layers(env: Env) -> list[Env]:
    """Wrappers from the outside inwards, and the environment."""
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _class_name(layer: Env) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _has_protocol(layer: Env) -> bool:
    return all(callable(getattr(type(layer), n, None)) for n in ("state_dict", "load_state_dict"))


def _encode_env(env: Env, is_fresh: bool = False) -> list[_Layer]:
    """All layers; constants are not yet compared with those of another copy.

    Of a fresh copy, which was never reset, `state_dict` is not asked.
    """
    encoder, layers = _Encoder(), _layers(env)
    result = []
    for layer in layers:
        data: dict[str, Any] = {"class": _class_name(layer), "attributes": {}}
        if _has_protocol(layer):
            generator = vars(layer).get("_np_random")
            if isinstance(generator, np.random.Generator):
                data["attributes"]["_np_random"] = encoder.encode(generator, "_np_random")
            state = None
            if not is_fresh:
                name = f"{type(layer).__name__}.state_dict()"
                state = [_Encoder().encode(layer.state_dict(), name)]  # type: ignore[attr-defined]
            result.append(_Layer(data, {}, state))
            continue
        if type(layer).__basicsize__ != gymnasium.Env.__basicsize__:
            raise UnsavableError(
                f"{type(layer).__name__} keeps a part of its state outside its attributes"
            )
        constants = {}
        for name, value in vars(layer).items():
            if _is_constant(layer, name, value):
                # One of the layers, by its number, so that it can be compared with another copy.
                numbers = [i for i, other in enumerate(layers) if other is value]
                constants[name] = numbers[0] if numbers else _constant(value)
            else:
                path = f"{type(layer).__name__}.{name}"
                data["attributes"][name] = encoder.encode(value, path)
        result.append(_Layer(data, constants, None))
    return result


def _difference(layers: list[_Layer], fresh: list[_Layer]) -> list[dict[str, Any]]:
    """What of each layer differs from a newly made copy.

    Raises:
        UnsavableError: a constant differs.
    """
    if [layer.data["class"] for layer in layers] != [layer.data["class"] for layer in fresh]:
        raise UnsavableError("its copies have different wrappers")
    result = []
    for layer, other in zip(layers, fresh, strict=True):
        attributes, common = layer.data["attributes"], other.data["attributes"]
        for name, value in layer.constants.items():
            if name not in other.constants or not _same_constant(value, other.constants[name]):
                path = f"{layer.data['class'].rpartition('.')[2]}.{name}"
                raise UnsavableError(f"{path} is not the same in a newly made copy")
        own: dict[str, Any] = {
            "attributes": {
                name: value
                for name, value in attributes.items()
                if name not in common or not identical(value, common[name])
            },
            "absent": [name for name in common if name not in attributes],
        }
        if layer.state is not None:
            own["state"] = layer.state[0]
        result.append(own)
    return result


def _is_constant(layer: Env, name: str, value: Any) -> bool:
    """Whether an attribute is left out, as it must be equal in all copies."""
    return (
        isinstance(
            value,
            gymnasium.Space
            | EnvSpec
            | enum.Enum
            | type
            | np.dtype
            | types.ModuleType
            | types.FunctionType
            | types.BuiltinFunctionType
            | np.ufunc,
        )
        or (isinstance(value, types.MethodType) and value.__self__ is layer)
        or any(value is other for other in _layers(layer))
        # A wrapper of Gymnasium keeps its arguments, to describe itself.
        or (name == "_saved_kwargs" and isinstance(value, dict))
    )


class _Function(NamedTuple):
    """A function as it was: it can change what it has enclosed."""

    code: types.CodeType
    defaults: Any
    cells: list[Any]


def _constant(value: Any) -> Any:
    """A constant, for a later comparison with that of another copy."""
    if not isinstance(value, types.FunctionType):
        return value
    defaults = (value.__defaults__, value.__kwdefaults__)
    return _Function(
        value.__code__, defaults, [cell.cell_contents for cell in value.__closure__ or ()]
    )


def _same_constant(value: Any, other: Any) -> bool:
    """Whether two copies have the same constant."""
    if isinstance(value, _Function) and isinstance(other, _Function):
        return (
            value.code == other.code
            and identical(value.defaults, other.defaults)
            and all(isinstance(item, bool | int | float | str | None) for item in value.cells)
            and identical(value.cells, other.cells)
        )
    if isinstance(value, types.MethodType):
        return isinstance(other, types.MethodType) and value.__func__ is other.__func__
    if isinstance(value, dict):  # _saved_kwargs
        return isinstance(other, dict) and value.keys() == other.keys()
    if isinstance(value, EnvSpec):
        return isinstance(other, EnvSpec)
    if isinstance(value, gymnasium.Space | np.dtype | int):
        return bool(value == other)
    return value is other


# ----------------------------------------------------------------------------- values as plain data


class _Encoder:
    """Converts data to None, bool, int, float, str, lists and dicts of them, and tensors."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, str]] = {}

    def encode(self, value: Any, path: str) -> Any:
        """`value` as plain data; `path` names it in errors.

        Raises:
            UnsavableError: it is not data, or a mutable part of it occurs twice.
        """
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind is tuple:
            return {"tuple": [self.encode(item, path) for item in value]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if isinstance(value, np.generic) and value.dtype.kind in _KINDS:
            return {"scalar": value.dtype.str, "bytes": value.tobytes().hex()}
        if kind is np.ndarray:
            return self._array(value, path)
        if kind is Tensor:
            return self._tensor(value, path)
        self._note(value, path)
        if kind is list:
            return [self.encode(item, path) for item in value]
        if kind is dict:
            items = [[self.encode(k, path), self.encode(v, path)] for k, v in value.items()]
            return {"dict": items}
        if kind is collections.deque:
            items = [self.encode(item, path) for item in value]
            return {"deque": items, "maxlen": value.maxlen}
        if kind in (set, frozenset):
            return {kind.__name__: [self.encode(item, path) for item in value]}
        if kind is random.Random:
            return {"random": self.encode(value.getstate(), path)}
        if kind is np.random.RandomState:
            state = value.get_state(legacy=False)
            return {"random_state": _Encoder().encode(state, path)}
        if kind is np.random.Generator:
            return self._generator(value, path)
        raise UnsavableError(f"{path} is a {kind.__name__}, which is no plain data")

    def _note(self, value: Any, path: str, key: int | None = None) -> None:
        """Refuse a mutable object that occurs twice: two copies of it would not stay one."""
        key = id(value) if key is None else key
        if key in self._seen:
            first = self._seen[key][1]
            raise UnsavableError(
                f"{path} and {first} are one object"
                if first != path
                else f"{path} holds one object twice"
            )
        self._seen[key] = (value, path)  # kept, so that its id stays its own

    def _array(self, array: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        if array.dtype.kind not in _KINDS:
            raise UnsavableError(f"{path} is an array of {array.dtype}, which is no plain data")
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if owner.base is not None:
            raise UnsavableError(f"{path} is an array of a {type(owner.base).__name__}'s memory")
        self._note(owner, path)
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        data = np.frombuffer(array.tobytes("F" if fortran else "C"), np.uint8)
        return {
            "array": array.dtype.str,
            "shape": list(array.shape),
            "order": "F" if fortran else "C",
            "writeable": bool(array.flags.writeable),
            "data": torch.from_numpy(data.copy()),
        }

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if (
            tensor.layout is not torch.strided
            or tensor.requires_grad
            or tensor.device.type != "cpu"
        ):
            raise UnsavableError(f"{path} is a tensor that is not plain data on the CPU")
        self._note(tensor, path, tensor.untyped_storage().data_ptr() or id(tensor))
        return {"tensor": tensor.clone()}

    def _generator(self, generator: np.random.Generator, path: str) -> dict[str, Any]:
        bits = generator.bit_generator
        sequence = bits.seed_seq
        self._note(bits, path)
        if type(bits).__name__ not in _BIT_GENERATORS or (
            type(sequence) is not np.random.SeedSequence
        ):
            raise UnsavableError(f"{path} is a random generator of another kind")
        return {
            "generator": type(bits).__name__,
            "state": _Encoder().encode(bits.state, path),
            "seeds": _Encoder().encode(
                {
                    "entropy": sequence.entropy,
                    "spawn_key": tuple(sequence.spawn_key),
                    "pool_size": sequence.pool_size,
                    "n_children_spawned": sequence.n_children_spawned,
                },
                path,
            ),
        }


def _decode(value: Any) -> Any:
    """Inverse of `_Encoder.encode`."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    match kind:
        case "tuple":
            return tuple(_decode(item) for item in content)
        case "bytes":
            return bytes.fromhex(content)
        case "scalar":
            return np.frombuffer(bytes.fromhex(value["bytes"]), _dtype(content))[0]
        case "array":
            data = np.frombuffer(value["data"].numpy().tobytes(), _dtype(content))
            array = data.reshape(value["shape"], order=value["order"]).copy("K")
            array.flags.writeable = value["writeable"]
            return array
        case "tensor":
            return content.clone()
        case "dict":
            return {_decode(key): _decode(item) for key, item in content}
        case "deque":
            return collections.deque(_decode(content), value["maxlen"])
        case "set" | "frozenset":
            return {"set": set, "frozenset": frozenset}[kind](_decode(content))
        case "random":
            python = random.Random()
            python.setstate(_decode(content))
            return python
        case "random_state":
            legacy = np.random.RandomState()
            legacy.set_state(_decode(content))
            return legacy
        case "generator" if content in _BIT_GENERATORS:
            arguments = _decode(value["seeds"])
            if not 4 <= arguments["pool_size"] <= _MOST_POOL:
                raise ValueError(
                    f"pool_size {arguments['pool_size']}: must be in 4 .. {_MOST_POOL}"
                )
            seeds = np.random.SeedSequence(**arguments)
            bits = getattr(np.random, content)(seeds)
            bits.state = _decode(value["state"])
            return np.random.Generator(bits)
    raise ValueError(f"{kind!r} is no kind of saved data")


def _dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{text!r} is no dtype of data")
    return dtype


def identical(a: Any, b: Any) -> bool:
    """Whether two results of `encode` are equal, in types and bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
    return a.hex() == b.hex() if isinstance(a, float) else bool(a == b)


# ----------------------------------------------------------------------------- the check by playing


def _play(env: Env, seed: int, steps: int) -> list[Any]:
    """Results of random actions, with a reset in the middle and after each episode."""
    space: Any = env.action_space
    results = []
    for step, action in enumerate(np.random.default_rng(seed).integers(space.n, size=steps)):
        obs, reward, terminated, truncated, _ = env.step(space.dtype.type(action + space.start))
        results.append(_plain_result((obs, reward, terminated, truncated)))
        if terminated or truncated or 2 * step == steps:
            results.append(_plain_result(env.reset()[0]))
    return results


def _plain_result(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_result(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_result(item) for item in value]
    array = np.asarray(value)
    return [array.dtype.str, list(array.shape), array.tobytes() if array.dtype != object else value]
