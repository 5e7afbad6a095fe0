"""What the code of loaded modules is, also where a program has replaced a part of it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

PLAIN = (bool, int, float, str, type(None))


def digest_of(modules: Iterable[str]) -> str:
    """Digest of the functions, methods and constants of loaded modules, as they are now.

    Args:
        modules: names, such as "dqn_fast.dqn".
    """
    digest = hashlib.sha256()
    for name in sorted(set(modules)):
        for key, value in sorted(vars(sys.modules[name]).items()):
            if key.startswith("__"):
                continue
            for part in _parts(value, name):
                digest.update(f"{name} {key} {part}\n".encode())
    return digest.hexdigest()


def _parts(value: Any, module: str) -> Iterator[str]:
    """Text for everything that a value does; values that say nothing give nothing."""
    if isinstance(value, PLAIN) or (isinstance(value, tuple) and _is_plain(value)):
        yield repr(value)
    elif isinstance(value, type):
        if value.__module__ == module:
            for key, attribute in sorted(vars(value).items()):
                yield from (f"{key} {part}" for part in _parts(attribute, module))
        else:  # of another module, which is asked itself
            yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, property):
        yield from _parts(value.fget, module)
    else:
        # Decorators keep what they wrap.
        function = getattr(value, "__func__", value)
        while isinstance(inner := getattr(function, "__wrapped__", None), FunctionType):
            function = inner
        if isinstance(function, FunctionType):
            yield repr((function.__defaults__, list(_of_code(function.__code__))))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _of_code(code: CodeType) -> Iterator[Any]:
    yield code.co_code.hex(), code.co_names, code.co_varnames
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _of_code(const)
        elif isinstance(const, frozenset):  # in an order that differs from process to process
            yield sorted(map(repr, const))
        else:
            yield repr(const)
