"""Exact solutions of tabular Markov decision processes, against which Q-functions are measured.

X states, A actions, everything on the MDP's device in float64. A policy is int64 [X], the action
taken in each state, or float64 [X, A], the probability of each action. An MDP has no time limit:
values have no horizon unless a function takes one.

    mdp = TabularMDP.from_transition_table(env.unwrapped.P, env.unwrapped.initial_state_distrib)
    optimum = value_iteration(mdp, gamma=0.99)
    expected_return(mdp, greedy_policy(optimum.q), horizon=200)

Sources: Bellman (1957), Dynamic Programming; Puterman (1994), Markov Decision Processes; Sutton &
Barto (2018), Reinforcement Learning, 2nd ed., chapters 3, 4 and 6.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

TransitionTable = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]
"""Gymnasium's toy-text `P[s][a] = [(probability, next state, reward, terminated), ...]`."""


class ToleranceError(ValueError):
    """float64 is not exact enough for values of this size."""


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A finite Markov decision process.

    A terminal state has value 0: its rows of P and R are ignored and replaced by a self-loop with
    reward 0, so that no solver needs a special case for terminal states.

    Attributes:
        P: P[s, a, s'] = Pr(s' | s, a), [X, A, X] float64.
        R: R[s, a] = E[r | s, a], the expected reward of one step, [X, A] float64.
        terminal: [X] bool; the episode terminates on entering such a state.
        start: Pr(S_0 = s), [X] float64.

    Raises:
        ValueError: shapes, dtypes or devices disagree, R is not finite, or `start` or a row of P is
            not a probability distribution.
    """

    P: Tensor
    R: Tensor
    terminal: Tensor
    start: Tensor

    def __post_init__(self) -> None:
        if self.P.ndim != 3 or 0 in self.P.shape:
            raise ValueError(f"P must be [X, A, X] with X, A >= 1, got {list(self.P.shape)}")
        n_states, n_actions = self.n_states, self.n_actions
        for name, shape, dtype in (
            ("P", (n_states, n_actions, n_states), torch.float64),
            ("R", (n_states, n_actions), torch.float64),
            ("terminal", (n_states,), torch.bool),
            ("start", (n_states,), torch.float64),
        ):
            _check_tensor(name, getattr(self, name), shape, dtype, self.P.device)
        ends = self.terminal[:, None]
        self_loop = torch.eye(n_states, dtype=self.P.dtype, device=self.P.device)[:, None, :]
        object.__setattr__(self, "P", torch.where(ends[..., None], self_loop, self.P))
        object.__setattr__(self, "R", self.R.masked_fill(ends, 0.0))
        if not self.R.isfinite().all():
            raise ValueError("R must be finite")
        _check_distribution("P", self.P)
        _check_distribution("start", self.start)

    @property
    def n_states(self) -> int:
        return self.P.shape[0]

    @property
    def n_actions(self) -> int:
        return self.P.shape[1]

    @classmethod
    def from_transition_table(
        cls, table: TransitionTable, start: ArrayLike, device: torch.device | str = "cpu"
    ) -> "TabularMDP":
        """Build the MDP of a Gymnasium toy-text table, in which transitions terminate, not states.

        State ids do not change. A state that is entered through terminated transitions only is
        terminal; its own outcomes in the table are ignored. If a state is also entered without
        termination (from another state, or as the start), its terminated transitions lead to one
        extra terminal state n. So every state that is not terminal has its exact value.

        Args:
            table: the outcomes of actions 0..A-1 in states 0..n-1.
            start: Pr(S_0 = s), [n]; Gymnasium's `initial_state_distrib`.

        Returns:
            An MDP of n states, or of n + 1 with the extra one.

        Raises:
            ValueError: ids that are not 0..n-1 and 0..A-1, or rows that are no distribution.
        """
        n, actions = len(table), set(range(len(table.get(0, ()))))
        if set(table) != set(range(n)) or any(set(row) != actions for row in table.values()):
            raise ValueError("table must have states 0..n-1, each with the same actions 0..A-1")
        outcomes = [
            (s, a, next_s, probability, reward, terminated)
            for s, row in table.items()
            for a, cell in row.items()
            for probability, next_s, reward, terminated in cell
            if probability != 0
        ]
        if any(not 0 <= next_s < n for _, _, next_s, *_ in outcomes) or not outcomes:
            raise ValueError(f"table must have outcomes, with next states in 0..{n - 1}")
        columns = list(zip(*outcomes, strict=True))
        s, a, next_s = torch.tensor(columns[:3], dtype=torch.int64, device=device)
        probability, reward = torch.tensor(columns[3:5], dtype=torch.float64, device=device)
        terminated = torch.tensor(columns[5], dtype=torch.bool, device=device)
        first = torch.as_tensor(start, dtype=torch.float64, device=device)
        _check_tensor("start", first, (n,), torch.float64, s.device)

        elsewhere = ends_elsewhere(s, next_s, terminated, first)
        next_s = next_s.masked_fill(elsewhere, n)
        n_states = n + int(elsewhere.any())
        terminal = torch.zeros(n_states, dtype=torch.bool, device=device)
        terminal[next_s[terminated]] = True
        zeros = probability.new_zeros
        return cls(
            P=zeros(n_states, len(actions), n_states).index_put_(
                (s, a, next_s), probability, accumulate=True
            ),
            R=zeros(n_states, len(actions)).index_put_(
                (s, a), probability * reward, accumulate=True
            ),
            terminal=terminal,
            start=torch.cat([first, zeros(n_states - n)]),
        )


def ends_elsewhere(state: Tensor, next_state: Tensor, terminated: Tensor, start: Tensor) -> Tensor:
    """Which outcomes terminate in a state in which other episodes continue or start.

    Their successor has value 0, but that state does not. So `TabularMDP.from_transition_table`
    leads these outcomes to an extra terminal state.

    Args:
        state, next_state: int64 [J], of J outcomes of positive probability.
        terminated: [J] bool.
        start: Pr(S_0 = s), [X].

    Returns:
        [J] bool.
    """
    live = start > 0
    live[next_state[~terminated & (state != next_state)]] = True
    return terminated & live[next_state]


class Solution(NamedTuple):
    """Values found by iterating a Bellman operator.

    Attributes:
        q: action values, [X, A] float64.
        v: state values, [X] float64.
        iterations: applications of the operator.
        error_bound: no entry of q or v is farther than this from its exact value.
    """

    q: Tensor
    v: Tensor
    iterations: int
    error_bound: float


def action_values(mdp: TabularMDP, v: Tensor, gamma: float) -> Tensor:
    """Q(s, a) = R(s, a) + gamma sum_s' P(s, a, s') V(s'), [X, A], from state values v [X]."""
    return mdp.R + gamma * (mdp.P @ v)


def policy_evaluation(mdp: TabularMDP, policy: Tensor, gamma: float) -> Tensor:
    """V^pi, by solving the Bellman expectation equation as a linear system, in O(X^3).

        V = R_pi + gamma P_pi V,  so  V = (I - gamma P_pi)^-1 R_pi

    Args:
        policy: int64 [X] or float64 [X, A].
        gamma: discount per step, in [0, 1).

    Returns:
        [X] float64.

    Source: Bellman (1957); Puterman (1994), theorem 6.1.1.
    """
    _check_discount(gamma)
    transition, reward = _markov_chain(mdp, policy)
    identity = torch.eye(mdp.n_states, dtype=transition.dtype, device=transition.device)
    v: Tensor = torch.linalg.solve(identity - gamma * transition, reward)
    return v


def iterative_policy_evaluation(
    mdp: TabularMDP, policy: Tensor, gamma: float, tolerance: float = 1e-8
) -> Solution:
    """V^pi and Q^pi, by iterating V <- R_pi + gamma P_pi V from 0.

    Arguments, error bound and exceptions are those of `value_iteration`; the policy is int64 [X] or
    float64 [X, A].

    Source: Sutton & Barto (2018), section 4.1.
    """
    transition, reward = _markov_chain(mdp, policy)
    v, iterations, error_bound = _fixed_point(
        lambda v: reward + gamma * (transition @ v), torch.zeros_like(reward), gamma, tolerance
    )
    return Solution(action_values(mdp, v, gamma), v, iterations, error_bound)


def value_iteration(mdp: TabularMDP, gamma: float, tolerance: float = 1e-8) -> Solution:
    """Q* and V*, by iterating the Bellman optimality equation from 0.

        Q_{k+1}(s, a) = R(s, a) + gamma sum_s' P(s, a, s') max_a' Q_k(s', a')

    The operator contracts by gamma in the sup norm, hence the error bound

        |Q_{k+1} - Q*| <= gamma / (1 - gamma) |Q_{k+1} - Q_k|

    to which rounding is added. Costs O(X^2 A) for each of some log(tolerance) / log(gamma) rounds.

    Args:
        gamma: discount per step, in [0, 1).
        tolerance: stop when the error bound is at most this, in reward units, > 0.

    Raises:
        ValueError: an argument is out of range, or float64 cannot reach the tolerance.

    Source: Bellman (1957); Puterman (1994), section 6.3.
    """
    q, iterations, error_bound = _fixed_point(
        lambda q: action_values(mdp, q.amax(1), gamma), torch.zeros_like(mdp.R), gamma, tolerance
    )
    return Solution(q, q.amax(1), iterations, error_bound)


def greedy_policy(q: Tensor) -> Tensor:
    """argmax_a Q(s, a), the lowest such action where several tie; [..., A] to int64 [...]."""
    return q.argmax(-1)


def is_optimal_policy(
    q_star: Tensor, policy: Tensor, atol: float = 1e-6, where: Tensor | None = None
) -> bool:
    """Whether every action that the policy may take has value max_a Q*(s, a), to within atol.

    Args:
        q_star: optimal action values, [X, A] float64.
        policy: int64 [X] or float64 [X, A].
        atol: how far below the best an action may be, in reward units; at least twice the error
            bound of q_star, so that actions that tie count as tied.
        where: states to check, [X] bool, such as `reachable_states(mdp)`; None: all.
    """
    near_best = q_star >= q_star.amax(1, keepdim=True) - atol
    optimal = (near_best | (_action_probabilities(policy, q_star) == 0)).all(1)
    return bool((optimal if where is None else optimal | ~where).all())


def expected_return(mdp: TabularMDP, policy: Tensor, horizon: int, gamma: float = 1.0) -> float:
    """E[sum_{t < horizon} gamma^t r_{t+1}] from the start distribution, by backward induction.

        V_0 = 0,  V_{h+1} = R_pi + gamma P_pi V_h,  and the result is start . V_horizon

    Args:
        policy: int64 [X] or float64 [X, A].
        horizon: maximum number of steps of an episode (the time limit), >= 0.
        gamma: discount per step, in [0, 1]; 1 for the return as episodes report it.

    Source: Puterman (1994), section 4.2.
    """
    if horizon < 0 or not 0 <= gamma <= 1:
        raise ValueError(f"horizon must be >= 0 and gamma in [0, 1], got {horizon} and {gamma}")
    transition, reward = _markov_chain(mdp, policy)
    v = torch.zeros_like(reward)
    for _ in range(horizon):
        v = reward + gamma * (transition @ v)
    return float(mdp.start @ v)


def visited_states(
    mdp: TabularMDP, policy: Tensor, horizon: int, probability: float = 0.0
) -> Tensor:
    """States that an episode visits with a probability above `probability`, [X] bool.

    Let p_t(s) = Pr(S_t = s), which costs O(X^2) per step. The probability of a visit is bounded by

        max_t p_t(s) <= Pr(S_t = s for some t <= horizon) <= sum_t p_t(s)

    It is computed exactly, in O(X^2) per step and state, only if `probability` lies between the
    bounds.

    Args:
        policy: int64 [X] or float64 [X, A].
        horizon: maximum number of steps of an episode, >= 0. The start and the last observation of
            an episode count as visited, terminal states included.
        probability: in [0, 1).
    """
    chain, _ = _markov_chain(mdp, policy)
    most = total = now = mdp.start
    for _ in range(horizon):
        now = now @ chain
        most, total = torch.maximum(most, now), total + now
    open_question = ((most <= probability) & (total > probability)).nonzero()[:, 0]
    visited = most > probability
    visited[open_question] = _reach(chain, mdp.start, horizon, open_question) > probability
    return visited


def reachable_states(mdp: TabularMDP) -> Tensor:
    """[X] bool: the states, terminal ones included, that some policy visits in some episode."""
    leads_to = _transitive_closure((mdp.P > 0).any(1))
    return (leads_to & (mdp.start > 0)[:, None]).any(0)


class Experience(NamedTuple):
    """A batch of B transitions of a tabular environment.

    Attributes:
        obs: state ids, [B] int64.
        action: [B] int64.
        reward: [B] float64, in reward units.
        terminated: [B] bool; True only where the MDP ended, never for a time limit.
        next_obs: ids of the true successors, [B] int64.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    next_obs: Tensor


def q_learning(
    batches: Iterable[Experience], q: Tensor, gamma: float, exponent: float = 0.6
) -> tuple[Tensor, Tensor]:
    """Tabular Q-learning: one update per batch of each (s, a) that occurs in it.

        Q(s, a) += alpha_n * (mean of r + gamma * (not terminated) * max_a' Q(s', a') - Q(s, a))

    The mean is over the batch's transitions from (s, a); n counts the updates of (s, a), and
    alpha_n = n^-exponent meets the Robbins-Monro conditions, so Q converges to Q* if every pair
    keeps occurring. Exponent 1 takes time exponential in 1 / (1 - gamma); a smaller one forgets the
    initial values sooner and averages less.

    Args:
        batches: experience, from any behaviour policy.
        q: initial action values, [X, A] float64; not modified.
        gamma: discount per step, in [0, 1).
        exponent: in (0.5, 1].

    Returns:
        Q, [X, A] float64, and the number of updates of each pair, [X, A] float64.

    Source: Watkins & Dayan (1992); Even-Dar & Mansour (2003) for the exponent.
    """
    _check_discount(gamma)
    if not 0.5 < exponent <= 1:
        raise ValueError(f"exponent must be in (0.5, 1], got {exponent}")
    updates = torch.zeros_like(q)
    for obs, action, reward, terminated, next_obs in batches:
        target = reward + gamma * q[next_obs].amax(-1).masked_fill(terminated, 0.0)
        pair, zeros = (obs, action), torch.zeros_like(q)
        count = zeros.index_put(pair, torch.ones_like(target), accumulate=True)
        mean_target = zeros.index_put(pair, target, accumulate=True) / count.clamp(min=1)
        updates = updates + (count > 0)
        step_size = updates.clamp(min=1) ** -exponent
        q = torch.where(count > 0, q + step_size * (mean_target - q), q)
    return q, updates


def _markov_chain(mdp: TabularMDP, policy: Tensor) -> tuple[Tensor, Tensor]:
    """P_pi(s, s') = sum_a pi(a|s) P(s, a, s') [X, X] and R_pi(s) = sum_a pi(a|s) R(s, a) [X]."""
    pi = _action_probabilities(policy, mdp.R)
    return torch.einsum("xa,xay->xy", pi, mdp.P), (pi * mdp.R).sum(1)


def _reach(chain: Tensor, start: Tensor, horizon: int, states: Tensor) -> Tensor:
    """Pr(S_t = s for some t <= horizon) for J states s, int64 [J]: [J] float64.

    Let F_h(x, s) be the probability of visiting s within h steps from x. Then

        F_0 = I,  F_{h+1}(x, s) = 1 if x = s else sum_y P_pi(x, y) F_h(y, s)
    """
    column = torch.arange(len(states), device=states.device)
    visited = torch.zeros(len(chain), len(states), dtype=chain.dtype, device=chain.device)
    visited[states, column] = 1.0
    for _ in range(horizon):
        visited = chain @ visited
        visited[states, column] = 1.0
    return (start @ visited).clamp(0.0, 1.0)


def _action_probabilities(policy: Tensor, q: Tensor) -> Tensor:
    """A policy of either form as pi(a|s), [X, A] float64, for q [X, A]."""
    n_states, n_actions = q.shape
    if policy.dtype == torch.int64:
        _check_tensor("policy", policy, (n_states,), torch.int64, q.device)
        if not ((policy >= 0) & (policy < n_actions)).all():
            raise ValueError(f"policy must have actions in 0..{n_actions - 1}")
        return torch.nn.functional.one_hot(policy, n_actions).to(torch.float64)
    _check_tensor("policy", policy, (n_states, n_actions), torch.float64, q.device)
    _check_distribution("policy", policy)
    return policy


def _fixed_point(
    operator: Callable[[Tensor], Tensor], x: Tensor, gamma: float, tolerance: float
) -> tuple[Tensor, int, float]:
    """Fixed point of a gamma-contraction in the sup norm, number of iterations and error bound.

    The bound assumes a rounding error of eps * max|x| per application. Residuals shrink by gamma or
    faster, so the first residual gives the iterations that suffice in exact arithmetic. If twice as
    many do not suffice, rounding prevents convergence.
    """
    _check_discount(gamma)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    eps, limit = torch.finfo(x.dtype).eps, math.inf
    for iterations in itertools.count(1):
        previous, x = x, operator(x)
        residual, rounding = float((x - previous).abs().max()), eps * float(x.abs().max())
        error_bound = (gamma * residual + rounding) / (1 - gamma)
        if error_bound <= tolerance:
            break
        if iterations == 1 and math.isfinite(error_bound):
            orders = math.log(tolerance) - math.log(error_bound)
            limit = 1 + 2 * orders / math.log(max(gamma, 0.5))
        if iterations >= limit or not math.isfinite(error_bound):
            raise ToleranceError(
                f"tolerance {tolerance:g} is too small for float64: the error bound is still "
                f"{error_bound:g} after {iterations} iterations"
            )
    return x, iterations, error_bound


def _transitive_closure(edge: Tensor) -> Tensor:
    """[X, X] bool: whether y is reached from x in any number of steps, 0 included."""
    path = edge | torch.eye(len(edge), dtype=torch.bool, device=edge.device)
    for _ in range(len(edge).bit_length()):  # paths of 1, 2, 4, ... edges
        path = (path.float() @ path.float()) > 0
    return path


def _check_tensor(
    name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if value.shape != shape or value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on {device}, "
            f"got {list(value.shape)} {value.dtype} on {value.device}"
        )


def _check_distribution(name: str, probability: Tensor) -> None:
    """Raise unless each row (last axis) is finite, not negative and sums to one."""
    if not (probability.isfinite() & (probability >= 0)).all():
        raise ValueError(f"{name} must be finite and not negative")
    total = probability.sum(-1)
    wrong = (total - 1).abs() > 1e-9
    if wrong.any():
        row = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}{row or ''} must sum to 1, sums to {float(total[wrong][0]):.9g}")


def _check_discount(gamma: float) -> None:
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
