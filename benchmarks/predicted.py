"""What the engine `fused` is predicted to take on an H100, without one.

    python -m benchmarks.predicted --out predicted_h100

The programs of each environment and size are generated as for a card, for one block a member and
for clusters of blocks, and `engines.fused.cost` predicts their phases; a row is of the fastest.
Nothing is measured here, and the file says so: it is there to be compared with the first run on a
card, which `python -m benchmarks.components --engines fused --device cuda` prints phase by phase
beside the same prediction.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from benchmarks.common import at_least_one, finish, plain_name
from benchmarks.phases import show_cycles
from benchmarks.throughput import endless, fast_args
from dqn_fast import tree
from dqn_fast.device import MatmulPrecision
from dqn_fast.engines.fused import expr
from dqn_fast.engines.fused.chunk import trace_functions
from dqn_fast.engines.fused.cost import CLOCK_GHZ, Phase, Prediction, phases_of, room_for
from dqn_fast.engines.fused.gpu import CLUSTERS, PRECISIONS, SHARED_BYTES, generate
from dqn_fast.settings import UsageError
from dqn_fast.setup import setup

NOTE = "a prediction; no GPU has run this"


@dataclass
class PredictedArgs:
    """Predicted cycles of each phase, and rates, on an H100."""

    env_id: tuple[str, ...] = ("LineWorld-v0", "CartPole-v1", "Acrobot-v1")
    """Environments of tensors."""
    num_envs: tuple[int, ...] = (64, 256, 4096)
    """Env copies N of each member; >= 1 each."""
    num_seeds: tuple[int, ...] = (1, 8, 132, 264, 1024)
    """Members M; >= 1 each."""
    matmul_precision: tuple[MatmulPrecision, ...] = ("highest", "high")
    """Of float32 products."""
    multiprocessors: int = 132
    """Of the card; >= 1."""
    out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Write results/NAME.json as well."""

    def validate(self) -> None:
        """Raise UsageError for a flag that makes no sense."""
        plain_name("--out", self.out)
        at_least_one(self, "multiprocessors")
        for name in ("num_envs", "num_seeds"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {values}: must be at least 1 each")
        for name in ("env_id", "matmul_precision"):
            if not getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')}: must be one or more")


def predicted(
    env_id: str, num_envs: int, precision: MatmulPrecision
) -> list[tuple[list[Phase], Prediction]]:
    """Phases and totals of the program of one member, with one gradient step a vector step, for
    each number of blocks that may run it.

    Raises:
        UsageError: there is no such environment, or it is not one of tensors.
    """
    args = dataclasses.replace(endless(fast_args(num_envs, "cpu")), env_id=env_id, engine="eager")
    with closing(setup(args)) as training:
        if training.env.on_host:
            raise UsageError(f"--env-id {env_id}: must be an environment of tensors")
        training.dqn.draw(training.noise, 1, 1, 0, 0)  # makes counters
        traced = trace_functions(training.dqn.one_member(), training.state, training.noise)
        kind, made = PRECISIONS[precision], list[tuple[list[Phase], Prediction]]()
        parts = traced.lowered, len(tree.leaves(training.state)), True, SHARED_BYTES, kind
        for num_blocks in CLUSTERS:
            generated = generate(*parts, num_blocks=num_blocks)
            phases = [phase for plan in generated.plans for phase in phases_of(plan, kind)]
            made.append((phases, Prediction(**generated.described["predicted"])))
        expr.forget()
    return made


def table(args: PredictedArgs) -> dict[str, Any]:
    """A row for each number of members, and the programs, those of the first --num-envs with their
    phases.

    Raises:
        UsageError: a setting makes no sense.
    """
    args.validate()
    programs, rows = [], []
    kinds = itertools.product(args.env_id, args.num_envs, args.matmul_precision)
    for env_id, num_envs, precision in kinds:
        same = {"env_id": env_id, "num_envs": num_envs, "matmul_precision": precision}
        made = predicted(env_id, num_envs, precision)
        for phases, prediction in made:
            programs.append({**same, **prediction._asdict()})
            if num_envs == args.num_envs[0]:
                programs[-1]["phases"] = [phase.row() for phase in phases]
        for members in args.num_seeds:
            may_run = (
                (prediction.fused_us(members, args.multiprocessors), prediction)
                for _, prediction in made
                if members <= room_for(prediction.num_blocks, args.multiprocessors)
                or prediction.num_blocks == 1
            )
            us, prediction = min(may_run, key=lambda each: each[0])
            graph_us = prediction.graph_us(members)
            rows.append(
                {
                    **same,
                    "num_seeds": members,
                    "num_blocks": prediction.num_blocks,
                    "us": us,
                    "updates_per_s": 1e6 * members / us,
                    "env_steps_per_s": 1e6 * members * num_envs / us,
                    "graph_us": graph_us,
                    "refused": us > graph_us,
                }
            )
    return {
        "note": NOTE,
        "args": vars(args),
        "clock_ghz": CLOCK_GHZ,
        "rows": rows,
        "programs": programs,
    }


def show(result: dict[str, Any]) -> None:
    """The tables: rates of all rows, and the phases of the first program."""
    print(f"{NOTE}: an H100 at {result['clock_ghz']:g} GHz, 128x128, batch 64, one update a step")
    head = f"{'envs':>6}{'members':>9}{'blocks':>8}  {'products':<10}{'us':>9}"
    head += f"{'updates/s':>13}{'env steps/s':>14}"
    print(f"{'environment':<14}{head}{'graph us':>10}")
    for row in result["rows"]:
        print(
            f"{row['env_id']:<14}{row['num_envs']:>6,}{row['num_seeds']:>9,}"
            f"{row['num_blocks']:>8}  "
            f"{row['matmul_precision']:<10}{row['us']:>9.1f}{row['updates_per_s']:>13,.0f}"
            f"{row['env_steps_per_s']:>14,.0f}{row['graph_us']:>10.0f}"
            f"{'  refused' * row['refused']}"
        )
    few = result["rows"][0]["num_blocks"]
    shown = {p["num_blocks"]: p for p in result["programs"][: len(CLUSTERS)]}
    for num_blocks in sorted({1, few}):
        what = "phases of {env_id}, {num_envs} envs, {matmul_precision}, blocks of a member: "
        print("\n" + what.format(**shown[num_blocks]) + str(num_blocks))
        show_cycles(shown[num_blocks]["phases"])


def main() -> int:
    """Print tables and one JSON line last; returns the exit status."""
    args = tyro.cli(PredictedArgs)
    try:
        result = table(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result)
    finish("predicted", result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
