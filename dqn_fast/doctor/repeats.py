"""Plays that must be equal: of two copies, of one copy twice, and beside another copy."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dqn_fast.doctor.findings import Finding, fault, note, ok
from dqn_fast.doctor.plays import (
    AnyEnv,
    MakeEnv,
    actions_of,
    first_difference,
    play,
    same_global_numbers,
)
from dqn_fast.doctor.single import Watched

REPEATED, REPEAT_S = 300, 2.0
"""Steps of plays that are compared; fewer, but at least 20, if they take longer than REPEAT_S
seconds."""


class Repeats(NamedTuple):
    """Findings about plays, and whether equal seeds give equal plays of separate copies."""

    findings: list[Finding]
    comparable: bool


def check_repeats(make: MakeEnv, seen: Watched) -> Repeats:
    """Compare plays with one seed: of two copies, of one copy twice, and beside another copy."""
    names = ", ".join(sorted(seen.global_numbers))
    findings = []
    if names:
        findings.append(
            fault(
                "global numbers",
                f"reset or step uses the process's generator of {names}. A run seeds it, but "
                "reset(seed=seed) does not: copies disturb each other, and a resumed run begins "
                "new episodes: use self.np_random, which reset(seed=seed) seeds",
            )
        )
    else:
        findings.append(ok("global numbers", "random, numpy.random and torch are not touched"))
    made: list[AnyEnv] = []

    def copies(count: int) -> list[AnyEnv]:
        made.extend(make() for _ in range(count))
        return made[-count:]

    try:
        repeated, comparable = _compared(copies, bool(names))
        return Repeats([*findings, *repeated], comparable)
    finally:
        for env in made:
            with contextlib.suppress(Exception):
                env.close()


def _compared(
    copies: Callable[[int], list[AnyEnv]], uses_globals: bool
) -> tuple[list[Finding], bool]:
    first, second = copies(2)
    endless = actions_of(first.action_space, seed=1)
    actions: list[Any] = []
    with same_global_numbers():
        deadline = time.perf_counter() + REPEAT_S
        alone = list(play(first, _recorded(endless, actions, deadline), 7))
    with same_global_numbers():
        other = list(play(second, actions, 7))
    findings = []
    over = f"over {len(actions)} steps"
    if (where := first_difference(alone, other)) is not None:
        help = {
            "the first reset": "reset(seed=seed) must seed everything: call "
            "super().reset(seed=seed) and draw from self.np_random",
            "a reset without a seed": "reset without a seed must continue the generator of the "
            "last seed: make a new one only if seed is given",
        }.get(where.split(",")[0], "draw from self.np_random, which reset(seed=seed) seeds")
        words = f"two copies with one seed and the same actions differ in {where}, so no run can "
        return [fault("repeats", f"{words}be repeated: {help}")], False
    if not uses_globals:
        findings.append(ok("repeats", f"two copies with one seed are equal {over}, bit for bit"))
    with same_global_numbers():
        again = list(play(first, actions, 7))
    if (where := first_difference(alone, again)) is not None:
        words = f"a copy that has played differs from a new one with the same seed, in {where}: "
        words += "something survives reset. If that is meant, as in a running normalisation, "
        words += "evaluations see other values than training; if not, set all of it in reset"
        findings.append(note("reset", words))
    else:
        findings.append(ok("reset", "starts anew: a copy that has played equals a new one"))
    if not uses_globals:
        played, beside = copies(2)
        with same_global_numbers():
            theirs = play(beside, actions[::-1], 8)
            together = [item for item, _ in zip(play(played, actions, 7), _endless(theirs))]  # noqa: B905
        if (where := first_difference(alone, together)) is not None:
            words = f"a copy plays differently while another one plays, first in {where}: they "
            words += "share state, such as an attribute of the class or a global variable: keep it"
            findings.append(fault("copies", f"{words} in self"))
            return findings, False
        findings.append(ok("copies", "do not influence each other"))
        findings.append(_about_generator(copies(1)[0], actions[: len(actions) // 6]))
    return findings, not uses_globals


def _recorded(actions: Iterator[Any], into: list[Any], deadline: float) -> Iterator[Any]:
    """REPEATED actions, or as many as are asked for until the deadline; at least 20."""
    while len(into) < REPEATED and (len(into) < 20 or time.perf_counter() < deadline):
        into.append(next(actions))
        yield into[-1]


def _endless(play: Iterator[Any]) -> Iterator[Any]:
    yield from play
    while True:
        yield None


def _about_generator(env: AnyEnv, actions: list[Any]) -> Finding:
    """Whether later episodes of a seed differ from its first, if seeds differ."""

    def episode(**arguments: Any) -> list[tuple[str, Any]]:
        results = [("a step", copy.deepcopy(env.reset(**arguments)[0]))]
        for action in actions:
            obs, reward, terminated, truncated, _ = env.step(action)
            results.append(("a step", copy.deepcopy((obs, reward, terminated, truncated))))
            if terminated or truncated:
                break
        return results

    with same_global_numbers():
        by_seed = [episode(seed=seed) for seed in range(11, 16)]
        first = episode(seed=11)
        later = [episode() for _ in range(4)]
    differ = any(first_difference(first, other) is not None for other in by_seed)
    if not differ:
        return ok("seeds", "all seeds give the same episodes: it draws no random numbers")
    if all(first_difference(first, other) is None for other in later):
        words = "every reset without a seed starts the generator of the last seed again, so a copy "
        words += "plays one episode for ever: make a generator only if a seed is given"
        return fault("seeds", words)
    return ok("seeds", "differ, and later episodes continue the generator")
