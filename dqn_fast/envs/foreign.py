"""Parameters of environments that come from a file which somebody else may have written.

A constructor gets them as they are. It may import a module, make another environment, open a file
or a window that a parameter names: in Gymnasium's registry `GymV21Environment-v0(env_id)` and
`GymV26Environment-v0(env_id)` import from "module:ID", `dqn_fast/...(env)` makes an environment by
its id, MuJoCo's `xml_file` is a file, and `render_mode="human"` opens a window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dqn_fast.envs.from_gymnasium import parse_text

_NAMES = re.compile(
    r"(^|_)(env|envs|id|ids|spec|entry|point|module|import|package|plugin|class|cls|type|object|"
    r"callable|callback|function|func|fn|factory|maker|wrapper|wrappers|kwargs|args|hook|code|eval|"
    r"exec|command|cmd|script|shell|program|binary|exe|path|paths|file|files|filename|filepath|dir|"
    r"directory|folder|root|url|uri|host|port|address|socket|server|rom|roms|xml|mjcf|urdf|asset|"
    r"assets|load|checkpoint|model|render|display|window|screen|record|video|save|log|logger)(_|$)",
    re.IGNORECASE,
)
"""Names of parameters, or words in them, that may tell a constructor what to import or to open."""
_WORD = re.compile(r"[A-Za-z0-9_+\-, ]{0,100}")
_MOST_VALUES, _MOST_DEPTH = 100_000, 8


def doubtful_param(params: Mapping[str, Any]) -> str | None:
    """The first parameter that is not plain; None: all are.

    Plain are numbers, truth values, None, and words without a dot, colon or slash, also in lists and
    dicts; whatever the value, a parameter is not plain if its name is one for files, modules,
    environments or windows, unless it is a number, a truth value or None.
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
    if _NAMES.search(key):
        return False
    if isinstance(value, Mapping):
        return all(
            isinstance(name, str) and _is_plain(name, item, budget, depth + 1)
            for name, item in value.items()
        )
    return isinstance(value, str) and _WORD.fullmatch(value) is not None
