"""Import paths that a person has named, such as `--env my_package.my_module:make`.

Whatever the import of foreign code raises becomes one line that names the flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_type_hints

from dqn_fast.envs.params import cast, parse_text
from dqn_fast.envs.spaces import describe_error


class ImportFailed(ValueError):
    """A module or a name in it cannot be imported."""


def import_module(flag: str, module: str) -> ModuleType:
    """Import a module.

    Args:
        flag: with its value, for the message.
        module: its dotted name.

    Raises:
        ImportFailed: whatever the import raised, also if it ended the program.
    """
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        reason = describe_error(error)
        raise ImportFailed(f"{flag}: {module} cannot be imported ({reason})") from error


def import_object(flag: str, path: str) -> Any:
    """The object that "module:name" names; the name may have dots.

    Raises:
        ImportFailed: the path has another form, the module cannot be imported, or has no such name.
    """
    module, _, name = path.partition(":")
    if not is_path(path):
        raise ImportFailed(f"{flag}: must be module:name, such as my_package.my_module:make_env")
    found = import_module(flag, module)
    try:
        return operator.attrgetter(name)(found)
    except AttributeError:
        raise ImportFailed(f"{flag}: {module} has no {name}") from None


def is_path(value: Any) -> bool:
    """Whether a value has the form of an import path, "module:name"."""
    return isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", value) is not None


def path_of(thing: Any) -> str | None:
    """The import path of a function or class; None: it has none that another program could use."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)) or module == "__main__":
        return None
    path = f"{module}:{name}"
    return path if is_path(path) else None


def parameters_of(function: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Parameters of a callable by name, and whether it takes others too; some have no signature."""
    try:
        known = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}, True
    return known, any(p.kind is p.VAR_KEYWORD for p in known.values())


_PLUMBING = ("render_mode", "disable_env_checker")
"""Parameters that Gymnasium and this program set; they are taken and not listed."""


def arguments_for(
    owner: str, function: Any, params: Mapping[str, Any], also: Sequence[str] = ()
) -> dict[str, Any]:
    """Keyword arguments for a callable.

    Text is cast to the types of a dataclass's fields; for other callables it becomes the value that
    it reads as, unless the default is text.

    Args:
        owner: name of the callable, for the message.
        function: the callable.
        params: the arguments by name.
        also: names that are taken beside those of the callable.

    Raises:
        ValueError: the callable has no such parameter, or its type is another.
    """
    known, any_name = parameters_of(function)
    hints: dict[str, Any] = {}
    if dataclasses.is_dataclass(function):
        with contextlib.suppress(NameError, TypeError):
            hints = get_type_hints(function)
    values = {}
    for name, value in params.items():
        if not any_name and name not in (*known, *also, *_PLUMBING):
            names = ", ".join(n for n in (*known, *also) if n not in _PLUMBING) or "none"
            raise ValueError(
                f"--env-params {name} {value}: {owner} has no such parameter; it has {names}"
            )
        default = known[name].default if name in known else None
        if name in hints:
            values[name] = cast(name, value, hints[name])
        elif isinstance(value, str) and not isinstance(default, str):
            values[name] = parse_text(value)
        else:
            values[name] = value
    return values


@dataclass(frozen=True)
class WrapperCall:
    """A wrapper and its arguments, as `--wrappers module:Wrapper,key=value` names them.

    Attributes:
        wrapper: called with the environment and the arguments.
        arguments: by name.
    """

    wrapper: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self, env: Any) -> Any:
        return self.wrapper(env, **self.arguments)


def read_wrapper(text: str) -> WrapperCall:
    """Import the wrapper that a value of --wrappers names, and read its arguments.

    Raises:
        ValueError: the text has another form, or the wrapper cannot be imported.
    """
    flag = f"--wrappers {text}"
    path, *pairs = _split(text)
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (equals and key.strip().isidentifier()):
            raise ValueError(f"{flag}: {pair!r} must be name=value")
        arguments[key.strip()] = parse_text(value)
    wrapper = import_object(flag, path)
    if not callable(wrapper):
        raise ValueError(f"{flag}: is {type(wrapper).__name__}; must be a wrapper's class")
    return WrapperCall(wrapper, arguments)


def _split(text: str) -> list[str]:
    """Parts between commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
