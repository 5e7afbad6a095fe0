"""Why did my run not learn? Checks of a recorded run, with results in words and numbers.

    for finding in check_health(read_run(run_dir)):
        print(finding.status, finding.check, finding.observed, finding.advice)

A check without data has the status "not known". Thresholds are rules of thumb and are written in
the check that uses them. With several members, the worst member counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dqn_fast.report.recorded import RecordedRun

Status = Literal["ok", "warning", "problem", "not known"]


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    check: str
    """The property that was checked, in a few words."""
    status: Status
    observed: str
    """The observation, with its numbers."""
    advice: str = ""
    """How to fix the problem; empty if there is none."""


def check_health(run: RecordedRun) -> list[Finding]:
    """Run all checks, always in the same order."""
    checks = (
        _check_end,
        _check_gradient_steps,
        _check_loss,
        _check_targets,
        _check_exploration,
        _check_replay,
        _check_evaluation,
        _check_over_estimation,
        _check_dead_units,
        _check_policy,
    )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # of what files hold
        return [check(run) for check in checks]


def _judge(check: str, observed: str, advice: str, *, warning: bool, problem: bool) -> Finding:
    if problem:
        return Finding(check, "problem", observed, advice)
    if warning:
        return Finding(check, "warning", observed, advice)
    return Finding(check, "ok", observed)


def _check_end(run: RecordedRun) -> Finding:
    check = "The run reached its end"
    status, total = run.summary.get("status"), run.number("total_timesteps")
    reached = f"global step {_format_number(run.last_step)} of {_format_number(total)}"
    if status is None:
        observed = f"summary.json was not written; the record ends at {reached}."
        advice = "The run is still going, or it was killed."
    else:
        observed = f"Status {status!s}, at {reached}."
        advice = (
            "The run was stopped early; the curves end there."
            if status == "stopped"
            else "Read the message; the curves end just before it."
        )
    early = status in (None, "stopped")
    return _judge(check, observed, advice, warning=early, problem=status != "done" and not early)


def _check_gradient_steps(run: RecordedRun) -> Finding:
    check = "Gradient steps are taken"
    updates, step, batch = run.number("num_updates"), run.last_step, run.number("batch_size")
    if updates is None and step:  # no summary: a logged loss proves that steps were taken
        if "losses/td_loss" in run.metrics:
            return Finding(
                check, "ok", "TD losses were logged; the number of steps was not recorded."
            )
        updates = 0.0
    if updates is None or batch is None or not step:
        return Finding(check, "not known", "The number of gradient steps was not recorded.")
    ratio = updates * batch / step
    observed = (
        f"{updates:,.0f} gradient steps of {batch:,.0f} transitions each, after {step:,.0f} "
        f"collected ones: replay ratio {ratio:.3g}."
    )
    if updates == 0:
        advice = (
            "Nothing was learned: lower learning_starts "
            f"(it is {_format_number(run.number('learning_starts'))}), train longer, or raise "
            "gradient_steps."
        )
    else:
        advice = (
            "Most transitions are never sampled (the original DQN has a replay ratio of 8): raise "
            "gradient_steps or batch_size, or lower train_freq."
        )
    return _judge(check, observed, advice, warning=ratio < 0.1, problem=updates == 0)


def _check_loss(run: RecordedRun) -> Finding:
    check = "The loss stays bounded"
    advice = "Lower learning_rate, or make tau smaller so that targets move more slowly."
    if run.loss_not_finite_at is not None or "not finite" in str(run.summary.get("status")):
        observed = (
            "The TD loss was no longer a finite number at global step "
            f"{_format_number(run.loss_not_finite_at or run.last_step)}."
        )
        return Finding(check, "problem", observed, advice)
    found = run.series("losses/td_loss")
    losses = found[1][np.isfinite(found[1]).all(1)] if found else np.empty((0, 1))
    if len(losses) < 10:
        return Finding(check, "not known", "Fewer than 10 log points have a TD loss.")
    # The loss diverges if it rises to the end and ends far above its lowest level.
    fifths = np.array([np.median(part, 0) for part in np.array_split(losses, 5)])
    quietest = fifths[:-1].min(0)
    rising = (fifths[2] < fifths[3]) & (fifths[3] < fifths[4]) & (fifths[4] >= 10 * quietest)
    worst = int(np.argmax(rising))
    observed = (
        f"Median TD loss {fifths[-1, worst]:.3g} in the last fifth of training, "
        f"{quietest[worst]:.3g} in the quietest fifth before."
    )
    # The loss also rises with the values if returns rise. Values above all returns are wrong.
    values, returns = np.abs(run.last("losses/q_value")), np.abs(_collect_returns(run))
    beyond = bool(len(values) and len(returns) and values.max() > 2 * returns.max())
    if rising.any() and beyond:
        observed += (
            f" Mean |Q| has reached {values.max():.3g}, but no return was larger than "
            f"{returns.max():.3g}: the values diverge."
        )
    elif rising.any():
        advice = (
            "The loss may only follow rising returns; if they do not rise, lower learning_rate."
        )
    return _judge(
        check, observed, advice, warning=bool(rising.any()), problem=bool(rising.any()) and beyond
    )


def _check_targets(run: RecordedRun) -> Finding:
    check = "Targets are synchronised"
    interval, tau, step = run.number("target_update_interval"), run.number("tau"), run.last_step
    if run.number("num_updates") == 0:
        return Finding(check, "not known", "No gradient step was taken.")
    if (tau is not None and not 0 < tau <= 1) or (interval is not None and interval < 0):
        return Finding(check, "not known", "tau or target_update_interval is not a possible one.")
    recorded = run.diagnostics.get("num_syncs", np.empty(0))
    if len(recorded):
        syncs, source = float(recorded[-1]), ""
    elif interval is not None and step is not None:
        learning = max(step - (run.number("learning_starts") or 0.0), 0.0)
        syncs, source = (learning // interval if interval else 0.0), "By the settings, about "
    else:
        return Finding(check, "not known", "The number of synchronisations was not recorded.")
    moved = 1 - (1 - (1.0 if tau is None else tau)) ** syncs
    observed = (
        f"{source}{syncs:,.0f} synchronisations (every {_format_number(interval)} transitions, tau "
        f"{_format_number(tau)}): {moved:.0%} of the initial target network has been replaced."
    )
    advice = (
        "Targets come from an old network: raise tau or lower target_update_interval "
        "(0 disables synchronisation)."
    )
    return _judge(check, observed, advice, warning=moved < 0.5, problem=syncs == 0)


def _check_exploration(run: RecordedRun) -> Finding:
    check = "Exploration comes and goes"
    found = run.series("charts/epsilon")
    if found is None:
        return Finding(check, "not known", "Epsilon was not recorded.")
    highest, lowest = float(np.nanmax(found[1])), float(np.nanmin(found[1]))
    observed = f"Epsilon was between {highest:.3g} and {lowest:.3g} at the log points."
    advice = (
        "The agent acts at random until the end. Training returns stay low, and the agent rarely "
        "reaches rewards that need many right actions in a row: lower eps_end or eps_fraction."
        if lowest > 0.1
        else "The agent hardly explored: raise eps_start or eps_fraction."
    )
    return _judge(
        check, observed, advice, warning=lowest > 0.1 or highest < 0.02, problem=lowest > 0.3
    )


def _check_replay(run: RecordedRun) -> Finding:
    check = "Replay holds whole episodes"
    size, length = run.number("buffer_size"), run.number("max_steps")
    what = f"the time limit is {_format_number(length)} steps"
    if len(run.episodes.get("episode_length", ())):
        length = float(run.episodes["episode_length"].mean())
        what = f"an episode takes {length:,.1f} steps on average"
    if size is None or not length:
        return Finding(check, "not known", "Buffer size or episode length was not recorded.")
    observed = f"Replay holds {size:,.0f} transitions, {what}: {size / length:,.1f} episodes."
    advice = "Replay overwrites the steps before a reward too early: raise buffer_size."
    return _judge(check, observed, advice, warning=size < 5 * length, problem=size < length)


def _check_evaluation(run: RecordedRun) -> Finding:
    """Compare with the first evaluation or the first training episodes, mostly random play."""
    check = "Evaluation improves"
    found = run.series("eval/return_mean")
    if found is None:
        return Finding(check, "not known", "The greedy policy was not evaluated.")
    spread = run.series("eval/return_std")
    noise = float(np.nanmean(spread[1])) if spread else 0.0
    noise /= np.sqrt(max(run.number("eval_episodes") or 1.0, 1.0))
    order = ("not known", "ok", "warning", "problem")
    findings = []
    for member, column in enumerate(found[1].T):
        curve = column[np.isfinite(column)]
        if len(run.episodes):
            mine = run.episodes["episode_return"][run.episodes["member"] == member]
            curve = np.concatenate([[mine[:20].mean()] if len(mine) else [], curve])
        who = f"Member {member}: greedy" if found[1].shape[1] > 1 else "Greedy"
        findings.append(_judge_improvement(check, who, curve, noise, run.optimal_return))
    return max(findings, key=lambda finding: order.index(finding.status))


def _judge_improvement(
    check: str, who: str, curve: NDArray[np.float64], noise: float, optimum: float | None
) -> Finding:
    """Judge returns in order of time. The first is from before learning; `noise` is their error."""
    if len(curve) < 2:
        return Finding(check, "not known", "There are fewer than two returns to compare.")
    first, best, last = curve[0], curve[1:].max(), curve[-1]
    observed = (
        f"{who} return {last:.4g} in the last evaluation, {best:.4g} in the best; the first "
        f"episodes had {first:.4g}"
    ) + ("." if optimum is None else f", the optimum is {optimum:.4g}.")
    gained = best - first > max(2 * noise, 0.01 * abs(first))
    lost = best - last > 0.5 * (best - first)
    solved = optimum is not None and last >= optimum - max(2 * noise, 0.05 * abs(optimum))
    if gained:
        advice = (
            "The agent learned and then lost most of the gain; best.pt holds the best agent. Lower "
            "learning_rate or tau, or raise buffer_size."
        )
    else:
        advice = (
            "The return did not improve. Look at the other checks first; then train longer, "
            "explore longer (eps_fraction), or try another learning_rate."
        )
    return _judge(
        check, observed, advice, warning=lost and not solved, problem=not gained and not solved
    )


def _check_over_estimation(run: RecordedRun) -> Finding:
    check = "Predictions meet reality"
    predicted, realised = run.last("eval/q_start"), run.last("eval/discounted_return")
    if not len(predicted) or len(predicted) != len(realised):
        observed = "Predicted and realised returns of the greedy policy were not recorded."
        return Finding(check, "not known", observed)
    # Relative to the returns of the run, so that the unit of reward cancels. The minimum of 0.01
    # is for runs that never see a reward.
    returns = _collect_returns(run)
    scale = max(np.abs(realised).max(), 0.1 * np.ptp(returns) if len(returns) else 0.0, 0.01)
    worst = int(np.argmax(predicted - realised))
    gap = float(predicted[worst] - realised[worst])
    observed = (
        f"Q predicts {predicted[worst]:.4g} from the start, greedy episodes realise "
        f"{realised[worst]:.4g} (discounted): off by {gap:+.3g}, or {gap / scale:+.1%}."
    )
    advice = (
        "The maximum over noisy values is too high: lower learning_rate, make tau smaller, or "
        "train longer. If a time limit truncates episodes, part of the gap is the reward after "
        "the limit."
    )
    return _judge(check, observed, advice, warning=gap > 0.2 * scale, problem=gap > scale)


def _check_dead_units(run: RecordedRun) -> Finding:
    check = "Hidden units are alive"
    dead = run.last("dead_units")
    if not len(dead):
        return Finding(check, "not known", "Dead units were not recorded.")
    share = float(dead.max())
    observed = f"{share:.0%} of the hidden units are zero on every state of a replayed batch."
    advice = "Dead units do not recover: lower learning_rate, or scale the observations."
    return _judge(check, observed, advice, warning=share > 0.5, problem=share > 0.9)


def _check_policy(run: RecordedRun) -> Finding:
    check = "The greedy policy changes"
    found = run.series("policy_changes")
    if found is None:
        return Finding(check, "not known", "Changes of the greedy policy were not recorded.")
    # The member with the smallest change counts. The first log point is NaN.
    change = float(np.nan_to_num(found[1]).max(0).min())
    observed = (
        f"From one log point to the next, the greedy action changed in at most {change:.1%} of the "
        "states of a replayed batch."
    )
    advice = (
        "Learning never changed the greedy actions: check that gradient steps are taken and that "
        "rewards occur, and raise learning_rate."
    )
    solved = run.summary.get("policy_optimal") is True
    return _judge(check, observed, advice, warning=False, problem=change == 0 and not solved)


def _collect_returns(run: RecordedRun) -> NDArray[np.float64]:
    """Collect all recorded undiscounted returns, of episodes and means of episodes."""
    columns = [run.episodes.get("episode_return", np.empty(0)).astype(np.float64)]
    for name in ("charts/episodic_return", "eval/return_mean"):
        found = run.series(name)
        columns += [found[1].ravel()] if found else []
    returns = np.concatenate(columns)
    return returns[np.isfinite(returns)]


def _format_number(number: float | None) -> str:
    return "not known" if number is None else f"{number:,.10g}"
