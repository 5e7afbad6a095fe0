"""The exact solution of a tabular environment, and a network's distance from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqn_fast.bellman import (
    ToleranceError,
    expected_return,
    greedy_policy,
    is_optimal_policy,
    policy_evaluation,
    reachable_states,
    value_iteration,
    visited_states,
)
from dqn_fast.dqn import QFunction
from dqn_fast.envs import TabularEnv, TensorEnv


class ExactValues:
    """The exact solution of a tabular environment, and a network's distance from it.

    Values ignore the time limit, as the network's values do. A policy counts as optimal only if its
    values are near Q*: policies have been right by luck long before their values were.

    Attributes:
        mdp: the environment as a table of X states.
        q_star: optimal action values at each member's discount, [M, X, A] float64.
        optimal_return: undiscounted return, within the time limit, of the policy that is optimal
            at the member's discount; [M].
        optimal_start_value: V* of the start distribution, at the member's discount; [M].
        features: network inputs of each state, [X, F] float32.
    """

    VALUE_TOLERANCE = 0.05
    REACH_PROBABILITY = 1e-3

    def __init__(
        self, env: TabularEnv, gammas: Sequence[float], device: torch.device | str = "cpu"
    ) -> None:
        self.mdp = env.mdp()
        solved = {gamma: self._solve(gamma, env.max_steps) for gamma in set(gammas)}
        q_star, returns, start_values = zip(*(solved[gamma] for gamma in gammas), strict=True)
        one = len(solved) == 1  # then members share its memory
        self.q_star = q_star[0].expand(len(gammas), -1, -1) if one else torch.stack(q_star)
        self.optimal_return, self.optimal_start_value = list(returns), list(start_values)
        self.features = env.features(env.observe(env.states())).to(device)
        self._gammas, self._max_steps = list(gammas), env.max_steps
        self._matters = reachable_states(self.mdp) & ~self.mdp.terminal

    def _solve(self, gamma: float, max_steps: int) -> tuple[Tensor, float, float]:
        q_star, v_star, *_ = value_iteration(self.mdp, gamma)
        optimal_return = expected_return(self.mdp, greedy_policy(q_star), max_steps)
        return q_star, optimal_return, float(self.mdp.start @ v_star)

    @torch.no_grad()
    def q_values(self, q_net: QFunction) -> Tensor:
        """The network's values in all states, float32 [M, X, A]."""
        return q_net(self.features.expand(q_net.num_members, -1, -1))

    def compare(self, q_net: QFunction) -> dict[str, list[Any]]:
        """One value per member.

        Returns:
            "q_error_max": the largest |Q - Q*| over the actions of every non-terminal state that
            the greedy policy reaches with probability above 1e-3 per episode; "policy_optimal":
            whether the greedy policy is optimal in every non-terminal state that any policy
            reaches and q_error_max is below 0.05; "start_value": exact value of the greedy policy
            at the start distribution, at the training discount and without time limit.
        """
        errors: list[float] = []
        optimal: list[bool] = []
        start_values: list[float] = []
        values = self.q_values(q_net).cpu().double()
        for q, q_star, gamma in zip(values, self.q_star, self._gammas, strict=True):
            policy = greedy_policy(q)
            seen = visited_states(self.mdp, policy, self._max_steps, self.REACH_PROBABILITY)
            seen &= ~self.mdp.terminal
            errors.append((q - q_star).abs()[seen].max().item())
            right = is_optimal_policy(q_star, policy, where=self._matters)
            optimal.append(right and errors[-1] < self.VALUE_TOLERANCE)
            v = policy_evaluation(self.mdp, policy, gamma)
            start_values.append(float(self.mdp.start @ v))
        return {"q_error_max": errors, "policy_optimal": optimal, "start_value": start_values}


def solve(
    env: TensorEnv, gammas: Sequence[float], device: torch.device | str = "cpu"
) -> ExactValues | None:
    """The solution of a tabular environment at each member's discount; None for other environments.

    Also None if it would take too long: more than 1,024 states, more than 16,384 states over all
    different discounts, or a time limit above 10,000 steps, take seconds; a discount above 0.9999
    takes minutes. And None for rewards so large that float64 is not exact enough.
    """
    if not isinstance(env, TabularEnv) or max(gammas) > 0.9999 or env.max_steps > 10_000:
        return None
    num_states = len(env.states()[0])
    if num_states > 1_024 or num_states * len(set(gammas)) > 16_384:
        return None
    try:
        return ExactValues(env, gammas, device)
    except ToleranceError:
        return None
