"""Settings: a dataclass whose fields declare type, default and range in one place.

    num_envs: Annotated[int, at_least(1)] = 64

`check_settings` checks settings that Python code made, `parse` reads them from a command line whose
--help shows the ranges. What depends on several settings at once is checked where they are used.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
import tyro

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


MOST_COUNT = 2**53
"""Largest whole number of a setting. Up to here float64 is exact, in which schedules are computed
and other programs read JSON. Products of two counts are still checked where they are made."""
MOST_CHARACTERS = 255
"""Maximum length of a text; file systems allow as many bytes in a name."""


class UsageError(ValueError):
    """Input that makes no sense; the message names the flag, the value and what is allowed.

    The message is one line of printable text, whatever it quotes.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message, 1_000))


# -------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Range:
    """Interval of a number, or of every item of a tuple of numbers; never contains NaN.

    Attributes:
        low, high: its ends; infinite where there is none.
        ends: "[" or "(" then "]" or ")": whether each end itself is allowed.
        note: meaning of a special value, such as "0: off".
        each: whether the text says that it is about every item of a tuple.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    note: str = ""
    each: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.ends[0] == "(" else self.low <= number
        return above and (number < self.high if self.ends[1] == ")" else number <= self.high)

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else " each" if self.each else ""
        if self.high < math.inf:
            return f"in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}{note}"
        words = []
        if self.low > -math.inf:
            words += [f"{'above' if self.ends[0] == '(' else 'at least'} {self.low:g}"]
        if self.ends[1] == ")":
            words += ["finite"]
        return " and ".join(words) + note

    def __call__(self, default: str) -> str:
        """End of a flag's help text."""
        text = str(self)
        return f"{text[0].upper()}{text[1:]}. (default: {default})"


def _declared(allowed: Range) -> Any:
    """The range as tyro takes metadata: it calls what is given as hint with the default's text."""
    return tyro.conf.arg(help_behavior_hint=allowed)


def at_least(low: float, *, finite: bool = False, note: str = "", each: bool = False) -> Any:
    """Metadata of a field: [low, inf], or [low, inf) if `finite`."""
    return _declared(Range(low, ends="[)" if finite else "[]", note=note, each=each))


def above(low: float, *, finite: bool = False, note: str = "") -> Any:
    """Metadata of a field: (low, inf], or (low, inf) if `finite`."""
    return _declared(Range(low, ends="()" if finite else "(]", note=note))


def between(low: float, high: float, ends: str = "[]", *, note: str = "") -> Any:
    """Metadata of a field: the interval from low to high; `ends` "[)" leaves out high."""
    return _declared(Range(low, high, ends, note))


def finite() -> Any:
    """Metadata of a field: any number but an infinite one."""
    return _declared(Range(ends="()"))


# --------------------------------------------------------------------------------------- types


class _WrongTypeError(Exception):
    """A value that its field's type does not allow."""


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _WrongTypeError


def _int(value: Any) -> int:
    if isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0:
        return int(value)
    raise _WrongTypeError


def _float(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # of a whole number beyond all floats
            raise _WrongTypeError from None
    raise _WrongTypeError


def _str(value: Any) -> str:
    if isinstance(value, str | torch.device):
        return str(value)
    raise _WrongTypeError


def _path(value: Any) -> Path:
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise _WrongTypeError


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    bool: _bool, int: _int, float: _float, str: _str, Path: _path,
}  # fmt: skip
_NAMES = {
    bool: ("True or False", "truth values"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}


def _python(value: Any) -> Any:
    """Numbers and arrays of NumPy and torch as Python's numbers and lists."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    return value


def _plain(value: Any) -> Any:
    """A parameter's value: a number, text, truth value, None, or nested lists of them."""
    value = _python(value)
    if isinstance(value, os.PathLike):
        value = str(value)
    # No file can have these: NUL, and bytes of the command line that are no UTF-8.
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise _WrongTypeError
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [*map(_plain, value)] if isinstance(value, list) else tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    raise _WrongTypeError


def _form(item: Any) -> str | None:
    """What a value of the right type must also be, if it is not; or None."""
    if isinstance(item, int) and abs(item) > MOST_COUNT:
        return (
            f"at most 2**53 ({MOST_COUNT:,})" if item > 0 else f"at least -2**53 (-{MOST_COUNT:,})"
        )
    if isinstance(item, str) and not (len(item) <= MOST_CHARACTERS and item.isprintable()):
        return f"at most {MOST_CHARACTERS} characters, all printable"
    if isinstance(item, Path):
        names = [len(os.fsencode(name)) for name in item.parts]
        if (
            not str(item).isprintable()
            or max(names, default=0) > 255
            or sum(names) + len(names) > 3_500
        ):
            return "a path of printable characters, at most 255 bytes in a name and 3,500 in all"
    return None


# -------------------------------------------------------------------------------------- checks


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Attributes:
        flag: as on the command line, "--num-envs".
        kind: its type without None: bool, int, float, str, Path, Literal, tuple or dict; of any
            other type every value passes.
        choices: of a Literal.
        item: type of a tuple's items.
        optional: whether None is allowed.
        range: which numbers are allowed; None: all.
    """

    flag: str
    kind: Any
    choices: tuple[Any, ...] = ()
    item: Any = None
    optional: bool = False
    range: Range | None = None

    def clean(self, value: Any) -> Any:
        """`value` in the field's own type.

        Another type is taken where nothing is lost: 1e4 for 10_000, 1 for 1.0, a list for a tuple,
        text for a Path, a torch.device for its name, numbers of NumPy and torch for Python's.

        Raises:
            UsageError: it is of another type, no choice, or out of range.
        """
        if value is None and self.optional:
            return None
        try:
            taken = self._taken(_python(value))
        except (_WrongTypeError, RecursionError):  # the latter: a list that contains itself
            shown = value if self.choices and isinstance(value, str) else _Repr(value)
            raise UsageError(f"{self.flag} {one_line(shown)}: must be {self._allowed()}") from None
        items = taken if self.kind is tuple else (taken,)
        if self.range is not None and not all(item in self.range for item in items):
            raise UsageError(f"{self.flag} {one_line(taken)}: must be {self.range}")
        for form in filter(None, map(_form, items)):
            raise UsageError(f"{self.flag} {one_line(taken)}: must be {form}")
        return taken

    def _taken(self, value: Any) -> Any:
        if self.kind is Literal:
            for choice in self.choices:
                if type(choice) is type(value) and choice == value:
                    return choice
            raise _WrongTypeError
        if self.kind is tuple:
            if not isinstance(value, list | tuple):
                raise _WrongTypeError
            return tuple(_CONVERTERS[self.item](_python(item)) for item in value)
        if self.kind is dict:
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise _WrongTypeError
            return _plain(value)
        return _CONVERTERS[self.kind](value) if self.kind in _CONVERTERS else value

    def _allowed(self) -> str:
        """Everything that is allowed, for people."""
        if self.kind is Literal:
            words = " or ".join(map(str, self.choices))
        elif self.kind is tuple:
            words = f"a tuple of {_NAMES[self.item][1]}"
        elif self.kind is dict:
            words = "a dict from names to numbers, texts or truth values"
        else:
            words = _NAMES[self.kind][0]
        if self.range is not None:
            words += f", {self.range}"
        return f"{words}, or None" if self.optional else words


class _Repr:
    """Stands for an object's `repr` in `one_line`."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return repr(self._value)


def one_line(value: object, most: int = 80) -> str:
    """A value as one line of at most `most` printable characters."""
    try:
        text = " ".join(str(value).split())
    except Exception:  # a whole number of thousands of digits, a deep list, a foreign object
        text = f"({type(value).__name__} that has no text)"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def absolute(path: Path) -> Path:
    """A path that does not depend on the working directory, if there is one."""
    try:
        return path.absolute()
    except OSError:  # the working directory was removed
        return path


def flag(name: str) -> str:
    """A field as on the command line."""
    return "--" + name.replace("_", "-")


@cache
def declarations(cls: type[DataclassInstance]) -> dict[str, Setting]:
    """All fields of a dataclass by name, as their type hints declare them."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: _declaration(f.name, hints[f.name]) for f in dataclasses.fields(cls) if f.init}


def _declaration(name: str, hint: Any) -> Setting:
    allowed = None
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        for entry in metadata:
            hint_of_entry = getattr(entry, "help_behavior_hint", None)
            allowed = hint_of_entry if isinstance(hint_of_entry, Range) else allowed
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    optional, kinds = NoneType in kinds, tuple(kind for kind in kinds if kind is not NoneType)
    if len(kinds) > 1:
        return Setting(flag(name), Any, optional=optional)
    kind, arguments = get_origin(kinds[0]) or kinds[0], get_args(kinds[0])
    if kind is tuple and not (arguments[0] in _CONVERTERS and arguments[1:] == (...,)):
        kind = Any
    return Setting(
        flag(name),
        kind,
        choices=arguments if kind is Literal else (),
        item=arguments[0] if kind is tuple else None,
        optional=optional,
        range=allowed,
    )


def check_value(cls: type[DataclassInstance], name: str, value: Any) -> Any:
    """One field's value in the field's own type, see `Setting.clean`.

    Raises:
        UsageError: the value is not allowed, or `cls` has no such field.
    """
    settings = declarations(cls)
    if name not in settings:
        raise UsageError(f"{flag(name)}: is no setting of {cls.__name__}")
    return settings[name].clean(value)


def check_settings(args: S) -> S:
    """A copy of settings, each value in its field's own type.

    Raises:
        UsageError: an attribute that is no field, or the first value, in the order of the fields,
            that its field does not allow.
    """
    if isinstance(args, type) or not dataclasses.is_dataclass(args):
        raise UsageError(f"args {one_line(_Repr(args))}: must be settings, as of Args(num_envs=64)")
    settings = declarations(type(args))
    for name in vars(args).keys() - {f.name for f in dataclasses.fields(args)}:
        near = difflib.get_close_matches(name, settings, 1)
        hint = f"; is {near[0]} meant?" if near else ""
        raise UsageError(f"{flag(name)}: is no setting of {type(args).__name__}{hint}")
    return dataclasses.replace(
        args, **{name: setting.clean(getattr(args, name)) for name, setting in settings.items()}
    )


# -------------------------------------------------------------------------------- command line


def parse(cls: type[S], default: S | None = None, argv: Sequence[str] | None = None) -> S:
    """Settings from the command line: as tyro reads it, after `expand_flags`.

    Args:
        cls: dataclass of the settings.
        default: values of the flags that are not given; None: the fields' own defaults.
        argv: words after the program's name; None: those of this process.

    Returns:
        Values of the right type, not checked for their range.

    Raises:
        UsageError: a flag that is on or off has another value.
        SystemExit: --help, or a value that tyro cannot read; it printed what is wrong.
    """
    words = expand_flags(cls, sys.argv[1:] if argv is None else argv)
    return (
        tyro.cli(cls, args=words) if default is None else tyro.cli(cls, args=words, default=default)
    )


def expand_flags(cls: type[DataclassInstance], argv: Sequence[str]) -> list[str]:
    """Flags as `wandb agent` and Python write them, in tyro's own form.

    --double_q=True becomes --double-q, and False --no-double-q; --hidden_sizes=[32, 32] becomes
    --hidden-sizes 32 32; --env_params={'n_states': 9} becomes --env-params n_states 9;
    --num_envs=1e2 becomes --num-envs 100. The value may also be the next word.

    Raises:
        UsageError: --double_q=VALUE with another value than true or false, or a flag of names and
            values that is given twice.
    """
    settings = {setting.flag: setting for setting in declarations(cls).values()}
    expanded: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        setting = settings.get(name.replace("_", "-")) if name.startswith("--") else None
        if setting is None:
            expanded.append(word)
            continue
        if setting.kind is dict and setting.flag in expanded:  # tyro would take the last one
            raise UsageError(f"{setting.flag}: must be given once, with all its names and values")
        if not equals and words:
            value = words[0]
        replaced = _expanded(setting, value)
        if replaced is None:
            if equals and setting.kind is bool:
                raise UsageError(f"{setting.flag} {one_line(value)}: must be true or false")
            expanded.append(word)
            continue
        expanded += replaced
        if not equals:
            words.popleft()
    return expanded


def _expanded(setting: Setting, text: str) -> list[str] | None:
    """A flag with its value in tyro's own form; None where tyro reads them as they are."""
    text = text.strip()
    brackets = text[:1] + text[-1:]
    if setting.kind is bool:
        negated = setting.flag.replace("--", "--no-", 1)
        return {"true": [setting.flag], "false": [negated]}.get(text.lower())
    if setting.kind is int and not text.lstrip("+-").isdigit():
        try:
            return [setting.flag, str(_int(float(text)))]
        except (ValueError, _WrongTypeError):
            return None
    if setting.kind is tuple and brackets in ("[]", "()"):
        items = _literal(text)
        if not isinstance(items, list | tuple):  # without quotes, as a shell leaves them
            items = [item.strip().strip("'\"") for item in text[1:-1].split(",")]
        return [setting.flag, *(_word(setting.item, item) for item in items)]
    if setting.kind is tuple and setting.item in (int, float) and len(items := _split(text)) > 1:
        return [setting.flag, *(_word(setting.item, item) for item in items)]
    if setting.kind is dict and brackets == "{}":
        pairs = _literal(text)
        if isinstance(pairs, dict):
            values = (v if isinstance(v, list | tuple) else (v,) for v in pairs.values())
            words = (word for name, own in zip(pairs, values, strict=True) for word in (name, *own))
            return [setting.flag, *map(str, words)]
    return None


def _split(text: str) -> list[str]:
    """The words of a text, which commas or spaces separate."""
    return text.replace(",", " ").split()


def _word(kind: Any, item: Any) -> str:
    """An item of a tuple as a word; 64.0 as 64 where it is to be a whole number."""
    if kind is int:
        with contextlib.suppress(TypeError, ValueError, _WrongTypeError):
            return str(_int(float(item)))
    return str(item)


def _literal(text: str) -> Any:
    """The value that Python writes like this; None where there is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
