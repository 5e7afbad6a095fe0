"""Description and summary of a run, as JSON for programs and as lines of text for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dqn_fast.dqn import DQN
from dqn_fast.envs import Recipe, TensorEnv
from dqn_fast.envs.params import plain
from dqn_fast.exact import ExactValues
from dqn_fast.heads import describe_head
from dqn_fast.plan import Plan
from dqn_fast.settings import absolute
from dqn_fast.sweep import label_of, one_or_all

if TYPE_CHECKING:
    from dqn_fast.resume import Resumption

PRECISIONS = {"highest": "float32", "high": "TF32"}
"""Float format of each value of --matmul-precision."""

PACKAGES = ("torch", "numpy", "gymnasium", "plotly", "tyro", "wandb")


def describe(
    settings: Mapping[str, Any],
    usual: Mapping[str, Any],
    env_id: str,
    env: TensorEnv,
    recipe: Recipe,
    plan: Plan,
    dqn: DQN,
    device: torch.device,
    exact: ExactValues | None,
    members: list[dict[str, Any]],
    engine: str,
    engine_reason: str,
) -> dict[str, Any]:
    """Content of `config.json`: all settings, derived values, and versions of the software.

    Args:
        settings: the fields of `train.Args`.
        usual: the same fields with the defaults for this environment.
        env_id: the environment's name.
        env: the environment.
        recipe: how it is made.
        plan: of the run.
        dqn: the algorithm.
        device: of the run.
        exact: the environment's exact solution, or None.
        members: seed and swept settings of each member.
        engine: the engine that starts the run.
        engine_reason: why this engine, in a few words.
    """
    # An environment that no id has made has its own name; --env-id does not apply.
    settings = {**plain({**settings, **recipe.settings()}), "env_id": env_id}
    num_envs = settings["num_envs"]
    every = f"at the first multiple of {num_envs} from there on"
    rounded = [
        f"{name} {asked:,} -> {taken:,}"
        for name, asked, taken in (
            ("total_timesteps", settings["total_timesteps"], plan.end),
            ("learning_starts", settings["learning_starts"], plan.learning_starts_at),
        )
        if asked != taken
    ]
    rounded += [
        f"{name} {interval:,} -> {every}"
        for name in ("log_interval", "eval_interval", "checkpoint_interval")
        if (interval := settings[name]) % num_envs
    ]
    spacing = settings["train_freq"] / max(settings["gradient_steps"], 1)
    interval = settings["target_update_interval"]
    if 0 < interval < spacing:
        rounded.append(
            f"target_update_interval {interval:,} -> {spacing:g}, once per gradient step"
        )
    return {
        "env_id": env_id,
        "env_params": env.params,
        "environment": recipe.described(env),
        "changed": [name for name, value in settings.items() if value != plain(usual[name])],
        "args": settings,
        "derived": {
            "members": members,
            "num_actions": env.num_actions,
            "sizes": list(dqn.network.sizes),
            "network": plain(dataclasses.asdict(dqn.network)),
            "head": plain(describe_head(dqn.head)),
            "num_parameters": dqn.network.num_parameters,
            "replay_ratio": plan.replay_ratio(settings["batch_size"]),
            "replay_bytes": dqn.replay.num_bytes,
            "replay_bytes_per_transition": dqn.replay.bytes_per_transition,
            "end": plan.end,
            "total_vector_steps": plan.num_vector_steps,
            "total_updates": plan.total_updates,
            "optimal_return": one_or_all(exact.optimal_return) if exact else None,
            "optimal_start_value": one_or_all(exact.optimal_start_value) if exact else None,
            "grid_shape": getattr(env, "grid_shape", None),
            "rounded": rounded,
            "device": device_name(device),
            "num_threads": torch.get_num_threads(),
            "engine": engine,
            "engine_reason": engine_reason,
        },
        "software": software(),
    }


def software() -> dict[str, str | None]:
    """Versions of Python and packages, the platform, and the git commit if there is one."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = str(torch.__version__)  # has the CUDA version, which the metadata lack
    return versions | {"platform": platform.platform(), "git_commit": _git_commit()}


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Text for the device: its type, and the card's name if it has one."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def header(config: Mapping[str, Any], run_dir: Path, checkpoint_bytes: int) -> list[str]:
    """Lines of text at the start of a run."""
    args, derived = config["args"], config["derived"]
    params = ", ".join(f"{name}={value}" for name, value in config["env_params"].items())
    environment = config["environment"]
    around = environment["layers"][:-1]
    wrapped = f", wrapped in {', '.join(around)}" if around else ""
    on_cpu = derived["device"] == "cpu"
    threads = f", {derived['num_threads']} thread(s)" if on_cpu else ""
    precision = "" if on_cpu else f", products in {PRECISIONS[args['matmul_precision']]}"
    rounded = [f"rounded   {text}" for text in derived["rounded"]]
    unseen = {"env_id", "env_params", "seed", "num_seeds", "num_envs", "run_dir", "name", "quiet"}
    unseen |= {"resume", "wrappers"}
    every, kept = args["checkpoint_interval"], args["keep_checkpoints"]
    when = f"every {every:,} transitions and at the end" if every else "at the end"
    without = "" if args["checkpoint_replay"] else " without replay"
    shown = {
        **args,
        "sweep": " ".join(f"{k} {' '.join(map(str, v))}" for k, v in args["sweep"].items()),
    }
    changed = [f"{name} {shown[name]}" for name in config["changed"] if name not in unseen]
    return [
        f"env       {config['env_id']} ({params}){wrapped}",
        *(f"left out  {name}: text of no fixed size" for name in environment["left_out"]),
        f"device    {derived['device']}{threads}{precision}; engine {derived['engine']} "
        f"({derived['engine_reason']})",
        f"run       {len(derived['members'])} x {args['num_envs']} envs (seed {args['seed']}), "
        f"{derived['end']:,} transitions in {derived['total_vector_steps']:,} vector steps",
        f"learning  {derived['total_updates']:,} gradient steps of {args['batch_size']} "
        f"transitions, replay ratio {derived['replay_ratio']:g}",
        f"network   {'-'.join(map(str, derived['sizes']))}, {derived['num_parameters']:,} "
        f"parameters; replay {args['buffer_size']:,} x {derived['replay_bytes_per_transition']} "
        f"bytes, {in_words(derived['replay_bytes'])}",
        f"saved     {when}, {in_words(checkpoint_bytes)}{without}, the last {kept} kept",
        *([f"changed   {', '.join(changed)}"] if changed else []),
        *rounded,
        f"writing   {_shown(run_dir)}",
    ]


def image_warning(env: TensorEnv, config: Mapping[str, Any]) -> str | None:
    """A line about images that the network reads as numbers without order; None: there are none."""
    if not env.image_shapes:
        return None
    shapes = " and ".join(" x ".join(map(str, shape)) for shape in env.image_shapes)
    args, derived = config["args"], config["derived"]
    return (
        f"observations have images of {shapes}, which a multi-layer perceptron reads as "
        f"{derived['sizes'][0]:,} unrelated numbers: {derived['num_parameters']:,} parameters, and "
        f"{in_words(derived['replay_bytes'])} of replay with --buffer-size {args['buffer_size']}; "
        "there is no convolutional network yet"
    )


def in_words(num_bytes: int) -> str:
    """Bytes in MB or GB, two digits."""
    if num_bytes >= 995e6:
        digits = 1 if num_bytes < 9.95e9 else 0
        return f"{num_bytes / 1e9:,.{digits}f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 99.5e6 else f"{num_bytes / 1e6:.2g} MB"


def resumed_header(resumed: Resumption, end: int) -> list[str]:
    """Lines of text about a run that goes on."""
    step = resumed.global_step
    to_come = f"{end - step:,} transitions to come" if step < end else "nothing left to train"
    return [
        f"resumed   from {resumed.path} at global_step {step:,}; {to_come}",
        *(f"differs   {note}" for note in resumed.notes),
    ]


def closing(summary: Mapping[str, Any], args: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Lines of text at the end of a run."""
    members = summary.get("members") or []
    lines = [
        f"{summary['status']}: {summary['global_step']:,} transitions and "
        f"{summary['num_updates']:,} gradient steps in {summary['wall_s']:.1f} s",
        f"{summary['env_steps_per_s']:,.0f} env steps/s, {summary['updates_per_s']:,.0f} updates/s "
        f"over the {summary['loop_s']:.1f} s of the loop without evaluations and compiling",
    ]
    if summary["eval_s"] > 0.1 * summary["wall_s"]:
        lines.append(
            f"evaluations took {summary['eval_s']:.1f} s, "
            f"{summary['eval_s'] / summary['wall_s']:.0%} of the run; --eval-episodes "
            f"{args['eval_episodes']} and --eval-interval {args['eval_interval']} set their number"
        )
    if summary["eval_return_mean"] is not None:
        lines.append(
            f"greedy return {summary['eval_return_mean']:.5g} +- "
            f"{summary['eval_return_std']:.2g} over {args['eval_episodes']} episodes"
            + (f", mean of {len(members)} members" if members else "")
        )
        returns = [member["eval_return_best"] for member in members]
        if args["sweep"] and (known := [r for r in returns if r is not None]):
            best = returns.index(max(known))
            own = label_of({name: members[best][name] for name in args["sweep"]})
            lines.append(
                f"best member {best} (seed {members[best]['seed']}, {own}): "
                f"greedy return {returns[best]:.5g} in its best evaluation"
            )
    if summary["optimal_return"] is not None and summary["q_error_max"] is not None:
        lines.append(
            f"optimal return {summary['optimal_return']:.5g}; largest value error "
            f"{summary['q_error_max']:.2g}; policy optimal: "
            f"{'yes' if summary['policy_optimal'] else 'no'}"
        )
    return [*lines, f"results in {_shown(run_dir)}"]


def summarise(
    shared: Mapping[str, Any], values: Mapping[str, list[Any]], members: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The summary of a run: means over members at the top level, and a row per member if there are
    several.

    Args:
        shared: values that all members share.
        values: by name, one value per member; None: not known.
        members: seed and swept settings of each member.
    """
    summary = dict(shared)
    for name, each in values.items():
        if any(value is None for value in each):
            summary[name] = None
        elif isinstance(each[0], bool):
            summary[name] = all(each)
        else:
            summary[name] = each[0] if len(set(each)) == 1 else float(np.mean(each))
    if len(members) > 1:
        summary["members"] = [
            {**member, **{name: each[i] for name, each in values.items()}}
            for i, member in enumerate(members)
        ]
    return summary


def _shown(run_dir: Path) -> Path:
    """A directory as people write it: from the working directory on, if it is in there."""
    here = absolute(Path())
    return run_dir.relative_to(here) if run_dir.is_relative_to(here) else run_dir
