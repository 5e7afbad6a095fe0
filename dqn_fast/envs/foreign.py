"""Parameters of environments that come from a file which somebody else may have written.

A constructor gets them as they are. It may import a module, make another environment, open a file
or a window that a parameter names: in Gymnasium's registry `GymV21Environment-v0(env_id)` and
`GymV26Environment-v0(env_id)` import from "module:ID", `dqn_fast/...(env)` makes an environment by
its id, MuJoCo's `xml_file` is a file, and `render_mode="human"` opens a window.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dqn_fast.envs.params import parse_text

_NAMES = re.compile(
    r"(^|_)(env|envs|id|ids|spec|entry|point|module|import|package|plugin|class|cls|"
    r"callable|callback|function|func|fn|factory|maker|wrapper|wrappers|kwargs|args|hook|code|eval|"
    r"exec|command|cmd|script|shell|program|binary|exe|path|paths|file|files|filename|filepath|dir|"
    r"directory|folder|root|url|uri|host|port|address|socket|server|rom|roms|xml|mjcf|urdf|asset|"
    r"assets|checkpoint|model|render|display|window|screen|record|video|save|log|logger)(_|$)",
    re.IGNORECASE,
)
"""Names of parameters, or words in them, that may tell a constructor what to import or to open."""
_WORD = re.compile(r"[A-Za-z0-9_+\-, ]{0,100}")
_MOST_VALUES, _MOST_DEPTH, _MOST_LINE = 100_000, 8, 500


def doubtful_param(params: Mapping[str, Any]) -> str | None:
    """The first parameter that is not plain; None: all are.

    Plain are numbers, truth values and None, and words without a dot, colon or slash, also in lists
    and dicts. A word is not plain if the parameter's name is one for files, modules, environments
    or windows.
    """
    budget = [_MOST_VALUES]
    for key, value in params.items():
        if not (isinstance(key, str) and _is_plain(key, value, budget, 0)):
            return str(key)
    return None


def _is_plain(key: str, value: Any, budget: list[int], depth: int) -> bool:
    budget[0] -= 1
    if budget[0] < 0 or depth > _MOST_DEPTH:
        return False
    if isinstance(value, str):
        value = parse_text(value) if len(value) <= _MOST_VALUES else value
    if value is None or isinstance(value, bool | int | float):
        return True
    if isinstance(value, list | tuple):
        return all(_is_plain(key, item, budget, depth + 1) for item in value)
    if _NAMES.search(re.sub("([a-z0-9])([A-Z])", r"\1_\2", key)):
        return False
    if isinstance(value, Mapping):
        return all(
            isinstance(name, str) and _is_plain(name, item, budget, depth + 1)
            for name, item in value.items()
        )
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def flags_for(
    env_id: str, params: Mapping[str, Any], env: str | None = None, wrappers: Sequence[str] = ()
) -> str | None:
    """The flags that name an environment, its parameters and its wrappers, to be typed in a shell;
    None: they hold what nobody can type.

    Args:
        env_id: id, if `env` is None.
        params: parameters.
        env: import path of a callable.
        wrappers: import paths with arguments.
    """
    if not _is_small(params, [_MOST_LINE], 0):
        return None
    words = ["--env-id", env_id] if env is None else ["--env", env]
    if params:
        words.append("--env-params")
    for key, value in params.items():
        words += [key, value if isinstance(value, str) else json.dumps(value)]
    words += ["--wrappers", *wrappers] if wrappers else []
    line = " ".join(map(shlex.quote, words))
    return line if line.isprintable() and len(line) <= _MOST_LINE else None


def _is_small(value: Any, budget: list[int], depth: int) -> bool:
    """Whether a value has few parts: a list that holds another one twice, and so on, has 2^n."""
    budget[0] -= 1
    if budget[0] < 0 or depth > _MOST_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(_is_small(item, budget, depth + 1) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_small(item, budget, depth + 1) for item in value)
    return isinstance(value, str | bool | int | float | None)
