"""Exact solutions of tabular MDPs, held against hand-made, enumerated and independent ones."""

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import lil_array
from torch import Tensor

from dqn_fast.bellman import (
    Experience,
    TabularMDP,
    action_values,
    expected_return,
    greedy_policy,
    is_optimal_policy,
    iterative_policy_evaluation,
    policy_evaluation,
    q_learning,
    reachable_states,
    value_iteration,
    visited_states,
)

F64 = torch.float64
LEFT, RIGHT = 0, 1

random_mdps = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
gammas = st.sampled_from([0.0, 0.3, 0.9, 0.99])


def line_world(n_states: int = 15, slip_prob: float = 0.05, device: str = "cpu") -> TabularMDP:
    """A walk from state 0 to the last one: -0.01 a step, 1 at the goal, actions flip by chance."""
    P = np.zeros((n_states, 2, n_states))
    for s in range(n_states):
        left, right = max(s - 1, 0), min(s + 1, n_states - 1)
        P[s, LEFT, left] += 1 - slip_prob
        P[s, LEFT, right] += slip_prob
        P[s, RIGHT, right] += 1 - slip_prob
        P[s, RIGHT, left] += slip_prob
    R = -0.01 + 1.0 * P[:, :, -1]
    return TabularMDP(
        P=torch.tensor(P, device=device),
        R=torch.tensor(R, device=device),
        terminal=torch.arange(n_states, device=device) == n_states - 1,
        start=torch.eye(n_states, dtype=F64, device=device)[0],
    )


def random_mdp(seed: int) -> TabularMDP:
    """At most 6 states and 3 actions; sparse, so that closed and unreachable sets occur."""
    rng = np.random.default_rng(seed)
    n_states, n_actions = int(rng.integers(1, 7)), int(rng.integers(1, 4))
    weights = rng.integers(1, 5, (n_states, n_actions, n_states)).astype(float)
    weights *= rng.random(weights.shape) < 0.4
    weights[..., 0] += weights.sum(-1) == 0
    start = rng.integers(0, 2, n_states) + np.eye(n_states)[int(rng.integers(n_states))]
    return TabularMDP(
        P=torch.tensor(weights / weights.sum(-1, keepdims=True)),
        R=torch.tensor(rng.normal(size=(n_states, n_actions))),
        terminal=torch.tensor(rng.random(n_states) < 0.2),
        start=torch.tensor(start / start.sum()),
    )


def random_policy(mdp: TabularMDP, seed: int) -> Tensor:
    """Deterministic or stochastic, one as likely as the other."""
    rng = np.random.default_rng([seed, 1])
    if rng.random() < 0.5:
        return torch.tensor(rng.integers(0, mdp.n_actions, mdp.n_states))
    return torch.tensor(rng.dirichlet(np.ones(mdp.n_actions), mdp.n_states))


def policy_iteration(mdp: TabularMDP, gamma: float) -> Tensor:
    """Q*, by exact evaluation and strict improvement until no action is better."""
    policy = torch.zeros(mdp.n_states, dtype=torch.int64)
    while True:
        q = action_values(mdp, policy_evaluation(mdp, policy, gamma), gamma)
        better = q.amax(1) > q.gather(1, policy[:, None])[:, 0] + 1e-11
        if not better.any():
            return q
        policy = torch.where(better, q.argmax(1), policy)


def toy_text(env_id: str) -> Any:
    return gym.make(env_id).unwrapped


def linear_program(table: Any, gamma: float) -> np.ndarray:
    """Q* straight from a toy-text table: min sum_s V(s) subject to V(s) >= Q(s, a)."""
    n_states, n_actions = len(table), len(table[0])
    pairs = list(itertools.product(range(n_states), range(n_actions)))
    look_ahead, reward = lil_array((len(pairs), n_states)), np.zeros(len(pairs))
    own = lil_array((len(pairs), n_states))
    for row, (s, a) in enumerate(pairs):
        own[row, s] = 1.0
        for probability, next_s, r, terminated in table[s][a]:
            reward[row] += probability * r
            if not terminated:
                look_ahead[row, int(next_s)] += gamma * probability
    solution = linprog(
        np.ones(n_states), A_ub=(look_ahead - own).tocsr(), b_ub=-reward, bounds=(None, None)
    )
    assert solution.success
    return (reward + look_ahead @ solution.x).reshape(n_states, n_actions)


# ---------------------------------------------------------------- known values


def test_line_world_has_its_known_values():
    """Value iteration and both returns meet the published numbers to 1e-5."""
    mdp = line_world()
    q, v, _, error_bound = value_iteration(mdp, gamma=0.99)
    assert error_bound <= 1e-8
    found = torch.stack([q[0, LEFT], q[0, RIGHT], q[7, RIGHT], q[13, RIGHT]])
    torch.testing.assert_close(
        found, torch.tensor([0.70424, 0.72054, 0.85913, 0.98780], dtype=F64), atol=1e-5, rtol=0
    )
    assert torch.equal(v, q.amax(1))
    assert torch.equal(q[14], torch.zeros(2, dtype=F64))
    always_right = torch.ones(15, dtype=torch.int64)
    assert torch.equal(greedy_policy(q)[:14], always_right[:14])
    assert is_optimal_policy(q, always_right)
    assert expected_return(mdp, always_right, horizon=40) == pytest.approx(0.84506, abs=1e-5)
    uniform = torch.full((15, 2), 0.5, dtype=F64)
    assert expected_return(mdp, uniform, horizon=40) == pytest.approx(-0.35244, abs=1e-5)


@pytest.mark.parametrize(
    ("env_id", "terminal"),
    [
        ("FrozenLake8x8-v1", [19, 29, 35, 41, 42, 46, 49, 52, 54, 59, 63]),
        ("CliffWalking-v1", [47]),
        ("CliffWalkingSlippery-v1", [47]),
        ("Taxi-v4", [500]),
    ],
)
def test_toy_text_tables_agree_with_linear_programming(env_id: str, terminal: list[int]):
    """Q* and policy equal the linear program's in every state that is not terminal."""
    env = toy_text(env_id)
    mdp = TabularMDP.from_transition_table(env.P, env.initial_state_distrib)
    assert mdp.terminal.nonzero()[:, 0].tolist() == terminal
    optimum = value_iteration(mdp, gamma=0.99)
    expected = torch.tensor(linear_program(env.P, gamma=0.99))
    n = len(env.P)
    going_on = ~mdp.terminal[:n]
    torch.testing.assert_close(optimum.q[:n][going_on], expected[going_on], atol=1e-5, rtol=0)
    policy = greedy_policy(optimum.q)[:n]
    assert is_optimal_policy(expected, policy, atol=1e-5, where=going_on)
    assert is_optimal_policy(optimum.q[:n], greedy_policy(expected), atol=1e-5, where=going_on)


def test_frozen_lake_return_is_the_probability_of_the_goal():
    """With reward 1 at the goal, return and probability of a visit agree at any time limit."""
    env = toy_text("FrozenLake8x8-v1")
    mdp = TabularMDP.from_transition_table(env.P, env.initial_state_distrib)
    policy = greedy_policy(value_iteration(mdp, gamma=0.99).q)
    for horizon in (0, 13, 14, 100, 200):
        goal = visit_probability(mdp, policy, horizon, 63)
        assert goal == pytest.approx(expected_return(mdp, policy, horizon), abs=1e-12)


def test_optimal_return_agrees_with_play_in_gymnasium():
    """The mean return of 2 000 episodes in Gymnasium's own env is within 4 standard errors."""
    env = toy_text("FrozenLake8x8-v1")
    mdp = TabularMDP.from_transition_table(env.P, env.initial_state_distrib)
    policy = greedy_policy(value_iteration(mdp, gamma=0.99).q).tolist()
    expected = expected_return(mdp, torch.tensor(policy), horizon=50)
    returns = np.zeros(2000)
    for episode in range(len(returns)):
        obs, _ = env.reset(seed=episode)
        for _ in range(50):
            obs, reward, terminated, _, _ = env.step(policy[obs])
            returns[episode] += reward
            if terminated:
                break
    assert returns.mean() == pytest.approx(expected, abs=4 * returns.std() / len(returns) ** 0.5)


def test_a_world_that_only_truncates_has_an_infinite_horizon_value():
    """Reward 1 for ever at gamma 0.9 is worth 10, by every method; nothing terminates."""
    one = torch.ones(1, dtype=F64)
    mdp = TabularMDP(one.view(1, 1, 1), one.view(1, 1), torch.tensor([False]), one)
    stay = torch.tensor([0])
    assert value_iteration(mdp, 0.9).v.item() == pytest.approx(10, abs=1e-8)
    assert policy_evaluation(mdp, stay, 0.9).item() == pytest.approx(10)
    assert iterative_policy_evaluation(mdp, stay, 0.9).v.item() == pytest.approx(10, abs=1e-8)
    step = Experience(stay, stay, one, torch.tensor([False]), stay)
    q, _ = q_learning(itertools.repeat(step, 5000), torch.zeros(1, 1, dtype=F64), 0.9)
    assert q.item() == pytest.approx(10, abs=0.02)


# ---------------------------------------------------------------- transition tables


def test_termination_belongs_to_the_transition():
    """A state entered both ways keeps its value; its terminated entries go to an extra state."""
    table = {
        0: {0: [(0.5, 1, 1.0, True), (0.5, 1, 1.0, False)], 1: [(1.0, 2, 5.0, True)]},
        1: {
            0: [(1.0, 1, 2.0, True), (0.0, 2, 0.0, False)],
            1: [(0.25, 0, 0.0, False), (0.75, 0, 0.0, True)],
        },
        2: {0: [(1.0, 0, 9.0, False)], 1: [(1.0, 2, 0.0, False)]},
    }
    mdp = TabularMDP.from_transition_table(table, [1.0, 0.0, 0.0])
    assert mdp.terminal.tolist() == [False, False, True, True]
    assert mdp.P[0].tolist() == [[0, 0.5, 0, 0.5], [0, 0, 1, 0]]
    assert mdp.P[1].tolist() == [[0, 0, 0, 1], [0.25, 0, 0, 0.75]]
    assert mdp.R.tolist() == [[1, 5], [2, 0], [0, 0], [0, 0]]
    q = value_iteration(mdp, gamma=0.8).q
    torch.testing.assert_close(q[:2], torch.tensor([[1.8, 5.0], [2.0, 1.0]], dtype=F64))


def test_a_state_where_episodes_start_is_not_terminal():
    """Terminated transitions back to the start do not make the start worth 0."""
    mdp = TabularMDP.from_transition_table({0: {0: [(1.0, 0, 3.0, True)]}}, [1.0])
    assert mdp.terminal.tolist() == [False, True]
    assert value_iteration(mdp, gamma=0.9).v.tolist() == [3.0, 0.0]


# ---------------------------------------------------------------- solvers


@random_mdps
@given(seed=seeds, gamma=gammas)
def test_value_iteration_equals_policy_iteration(seed: int, gamma: float):
    """Two unlike algorithms find one Q*; the greedy policy is optimal and its value is V*."""
    mdp = random_mdp(seed)
    q_star = policy_iteration(mdp, gamma)
    q, v, _, _ = value_iteration(mdp, gamma)
    torch.testing.assert_close(q, q_star, atol=2e-8, rtol=0)
    assert is_optimal_policy(q_star, greedy_policy(q), atol=1e-7)
    torch.testing.assert_close(
        policy_evaluation(mdp, greedy_policy(q), gamma), v, atol=1e-5, rtol=0
    )


@random_mdps
@given(seed=seeds, gamma=gammas, tolerance=st.sampled_from([10.0, 1.0, 0.1, 1e-3, 1e-9]))
def test_error_bounds_hold(seed: int, gamma: float, tolerance: float):
    """However early the iterations stop, no value is off by more than the bound that is given."""
    mdp = random_mdp(seed)
    policy = random_policy(mdp, seed)
    optimum = value_iteration(mdp, gamma, tolerance)
    evaluation = iterative_policy_evaluation(mdp, policy, gamma, tolerance)
    q_star, v_pi = policy_iteration(mdp, gamma), policy_evaluation(mdp, policy, gamma)
    for solution, q in ((optimum, q_star), (evaluation, action_values(mdp, v_pi, gamma))):
        assert solution.error_bound <= tolerance
        assert (solution.q - q).abs().max() <= solution.error_bound + 1e-12
    assert (optimum.v - q_star.amax(1)).abs().max() <= optimum.error_bound + 1e-12
    assert (evaluation.v - v_pi).abs().max() <= evaluation.error_bound + 1e-12


def test_the_bound_is_of_use():
    """Tightness: on a world of constant reward the bound is the error itself."""
    one = torch.ones(1, dtype=F64)
    mdp = TabularMDP(one.view(1, 1, 1), one.view(1, 1), torch.tensor([False]), one)
    solution = value_iteration(mdp, gamma=0.9, tolerance=0.5)
    assert 10 - solution.v.item() == pytest.approx(solution.error_bound, rel=1e-9)
    assert solution.iterations == 29  # the first k with 10 * 0.9^k <= 0.5


@random_mdps
@given(seed=seeds, horizon=st.integers(0, 4))
def test_expected_return_equals_enumeration(seed: int, horizon: int):
    """Backward induction equals the sum over every trajectory of probability times return."""
    mdp = random_mdp(seed)
    policy = random_policy(mdp, seed)
    pi = torch.eye(mdp.n_actions, dtype=F64)[policy] if policy.ndim == 1 else policy
    P, R, pi = mdp.P.numpy(), mdp.R.numpy(), pi.numpy()

    def value(s: int, steps: int) -> float:
        if steps == 0 or mdp.terminal[s]:
            return 0.0
        return sum(
            pi[s, a] * (R[s, a] + 0.9 * sum(p * value(y, steps - 1) for y, p in enumerate(P[s, a])))
            for a in range(mdp.n_actions)
        )

    expected = sum(p * value(s, horizon) for s, p in enumerate(mdp.start.tolist()))
    assert expected_return(mdp, policy, horizon, gamma=0.9) == pytest.approx(expected, abs=1e-12)


def test_a_long_horizon_gives_the_value():
    """With a discount, the return within 5 000 steps is the value of the start state."""
    mdp = line_world()
    policy = torch.full((15, 2), 0.5, dtype=F64)
    value = policy_evaluation(mdp, policy, gamma=0.99)[0].item()
    assert expected_return(mdp, policy, 5000, gamma=0.99) == pytest.approx(value, abs=1e-12)


# ---------------------------------------------------------------- visits


def visit_probability(mdp: TabularMDP, policy: Tensor, horizon: int, state: int) -> float:
    """Probability that an episode visits a state: its share at the end, if nothing leaves it."""
    pi = torch.eye(mdp.n_actions, dtype=F64)[policy] if policy.ndim == 1 else policy
    chain = torch.einsum("xa,xay->xy", pi, mdp.P)
    chain[state] = torch.eye(mdp.n_states, dtype=F64)[state]
    now = mdp.start
    for _ in range(horizon):
        now = now @ chain
    return now[state].item()


def fork() -> TabularMDP:
    """0 stays or goes to 1 or 3; 1 and 2 alternate for ever; 3 terminates; 4 is never entered."""
    P = torch.zeros(5, 1, 5, dtype=F64)
    P[0, 0, [0, 1, 3]] = torch.tensor([0.5, 0.125, 0.375], dtype=F64)
    P[1, 0, 2] = P[2, 0, 1] = P[4, 0, 0] = 1
    start = torch.tensor([1.0, 0, 0, 0, 0], dtype=F64)
    return TabularMDP(P, torch.zeros(5, 1, dtype=F64), torch.arange(5) == 3, start)


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [
        (0, [1, 0, 0, 0, 0]),
        (1, [1, 0.125, 0, 0.375, 0]),
        (2, [1, 0.1875, 0.125, 0.5625, 0]),
    ],
)
def test_visited_states_by_hand(horizon: int, expected: list[float]):
    """Visits within 0, 1 and 2 steps are those worked out on paper, for thresholds around them."""
    policy = torch.zeros(5, dtype=torch.int64)
    for probability in {0.0, *(value - 1e-9 for value in expected if value), *expected} - {1}:
        visited = visited_states(fork(), policy, horizon, probability)
        assert visited.tolist() == [value > probability for value in expected]


@random_mdps
@given(seed=seeds, horizon=st.integers(0, 30))
def test_visited_states_are_those_reached(seed: int, horizon: int):
    """The bounds decide as the probabilities themselves do, whatever the threshold."""
    mdp = random_mdp(seed)
    policy = random_policy(mdp, seed)
    reach = torch.tensor(
        [visit_probability(mdp, policy, horizon, s) for s in range(mdp.n_states)], dtype=F64
    )
    for probability in (0.0, *np.random.default_rng(seed).random(20).tolist()):
        visited = visited_states(mdp, policy, horizon, probability)
        assert torch.equal(visited, reach > probability)


def test_visits_at_different_times_add_up():
    """A state that is visited with probability 1/4 after one step or else 3/16 after two is visited
    with more than 2/5, though never that much at one time; one that lingers counts once."""
    P = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]], dtype=F64)
    start = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    ends = torch.tensor([False, False, True])
    mdp = TabularMDP(P[:, None], torch.zeros(3, 1, dtype=F64), ends, start)
    policy = torch.zeros(3, dtype=torch.int64)
    assert visited_states(mdp, policy, 2, 0.4).tolist() == [True, True, False]
    assert visited_states(mdp, policy, 2, 0.4375).tolist() == [True, False, False]  # 0.5625 in sum


def test_reachable_states_are_those_of_some_policy():
    """States that only other states' episodes could lead to are out; the terminal one is in."""
    assert reachable_states(fork()).tolist() == [True, True, True, True, False]
    env = toy_text("CliffWalking-v1")
    cliff = TabularMDP.from_transition_table(env.P, env.initial_state_distrib)
    assert (~reachable_states(cliff)).nonzero()[:, 0].tolist() == list(range(37, 47))


# ---------------------------------------------------------------- policies


def test_greedy_policy_takes_the_lowest_of_tied_actions():
    """Ties go to the lowest action, for any leading shape."""
    q = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]], [[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0]]])
    assert greedy_policy(q).tolist() == [[0, 1], [0, 0]]


def test_tied_actions_are_all_optimal():
    """A policy may take any action within atol of the best, mixed or not, and no other."""
    q_star = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.99]], dtype=F64)
    assert is_optimal_policy(q_star, torch.tensor([1, 1]))
    assert not is_optimal_policy(q_star, torch.tensor([0, 2]))
    assert is_optimal_policy(q_star, torch.tensor([0, 2]), atol=0.02)
    assert is_optimal_policy(q_star, torch.tensor([0, 2]), where=torch.tensor([True, False]))
    mixed = torch.tensor([[0.3, 0.7, 0.0], [0.0, 1.0, 0.0]], dtype=F64)
    assert is_optimal_policy(q_star, mixed)
    assert not is_optimal_policy(q_star, mixed.flip(0))


@random_mdps
@given(seed=seeds, gamma=gammas)
def test_both_forms_of_a_policy_are_one(seed: int, gamma: float):
    """An action per state and its one-hot probabilities give the same values and visits."""
    mdp = random_mdp(seed)
    actions = torch.tensor(np.random.default_rng(seed).integers(0, mdp.n_actions, mdp.n_states))
    one_hot = torch.eye(mdp.n_actions, dtype=F64)[actions]
    for solve in (
        lambda policy: policy_evaluation(mdp, policy, gamma),
        lambda policy: visited_states(mdp, policy, 3, 0.3),
    ):
        assert torch.equal(solve(actions), solve(one_hot))


# ---------------------------------------------------------------- Q-learning


def experience(mdp: TabularMDP, batch_size: int, num_batches: int, seed: int):
    """Transitions of states and actions drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        obs = torch.randint(mdp.n_states, (batch_size,), generator=generator)
        action = torch.randint(mdp.n_actions, (batch_size,), generator=generator)
        next_obs = torch.multinomial(mdp.P[obs, action], 1, generator=generator)[:, 0]
        reward = -0.01 + 1.0 * (next_obs == mdp.n_states - 1)
        yield Experience(obs, action, reward.double(), mdp.terminal[next_obs], next_obs)


def test_q_learning_converges_to_q_star():
    """From sampled experience alone, Q comes within 0.005 of Q* and its policy is optimal."""
    mdp = line_world()
    q_star = value_iteration(mdp, gamma=0.99).q[:14]
    batches = experience(mdp, batch_size=512, num_batches=2000, seed=0)
    q, updates = q_learning(batches, torch.zeros(15, 2, dtype=F64), gamma=0.99)
    assert (q[:14] - q_star).abs().max() < 0.005
    assert is_optimal_policy(q_star, greedy_policy(q[:14]))
    assert (updates > 1990).all()


def test_q_learning_by_hand():
    """Repeated pairs are averaged, step sizes are n^-exponent, termination stops the bootstrap."""
    initial = torch.tensor([[0.0, 0.0], [4.0, 2.0], [8.0, 8.0]], dtype=F64)
    batch = Experience(
        obs=torch.tensor([0, 0, 0, 1]),
        action=torch.tensor([1, 1, 0, 1]),
        reward=torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=F64),
        terminated=torch.tensor([False, False, True, False]),
        next_obs=torch.tensor([1, 2, 2, 0]),
    )
    q, updates = q_learning([batch], initial, gamma=0.5, exponent=1.0)
    assert q.tolist() == [[3.0, 4.5], [4.0, 0.0], [8.0, 8.0]]  # 4.5: mean of 1 + 2 and 2 + 4
    assert updates.tolist() == [[1, 1], [0, 1], [0, 0]]
    q, updates = q_learning([batch, batch], initial, gamma=0.5, exponent=1.0)
    assert q.tolist() == [[3.0, 4.5], [4.0, 1.125], [8.0, 8.0]]  # 1.125: half-way to 4.5 / 2
    assert updates.tolist() == [[2, 2], [0, 2], [0, 0]]
    assert initial.tolist() == [[0.0, 0.0], [4.0, 2.0], [8.0, 8.0]]


# ---------------------------------------------------------------- bad inputs

ROW = torch.tensor([[[0.5, 0.5]], [[0.0, 1.0]]], dtype=F64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": torch.ones(2, 2, dtype=F64)}, r"P must be \[X, A, X\].* got \[2, 2\]"),
        ({"P": torch.ones(0, 1, 0, dtype=F64)}, r"P must be \[X, A, X\]"),
        ({"P": torch.ones(2, 1, 3, dtype=F64)}, r"P must be \[2, 1, 2\].* got \[2, 1, 3\]"),
        ({"P": ROW.float()}, "P must be .*float64.* got .*float32"),
        ({"P": ROW * 0.9}, r"P\[0, 0\] must sum to 1, sums to 0.9"),
        ({"P": ROW * torch.tensor([3.0, -1.0], dtype=F64)}, "P must be finite and not negative"),
        ({"P": ROW * float("nan")}, "P must be finite"),
        ({"R": torch.zeros(2, 2, dtype=F64)}, r"R must be \[2, 1\]"),
        ({"R": torch.full((2, 1), float("inf"), dtype=F64)}, "R must be finite"),
        ({"terminal": torch.zeros(2)}, "terminal must be .*bool"),
        ({"start": torch.ones(3, dtype=F64) / 3}, r"start must be \[2\]"),
        ({"start": torch.ones(2, dtype=F64)}, "start must sum to 1, sums to 2"),
    ],
)
def test_bad_mdps_are_refused(change: dict[str, Tensor], message: str):
    """Shapes, dtypes, non-finite numbers and sums are checked, and the message has the numbers."""
    good = {
        "P": ROW,
        "R": torch.zeros(2, 1, dtype=F64),
        "terminal": torch.tensor([False, False]),
        "start": torch.tensor([1.0, 0.0], dtype=F64),
    }
    TabularMDP(**good)
    with pytest.raises(ValueError, match=message):
        TabularMDP(**(good | change))


def test_rows_of_terminal_states_are_ignored():
    """Whatever they hold, a terminal state loops to itself with reward 0; inputs stay untouched."""
    P, R = ROW.clone(), torch.zeros(2, 1, dtype=F64)
    P[1], R[1] = float("nan"), float("nan")
    mdp = TabularMDP(P, R, torch.tensor([False, True]), torch.tensor([1.0, 0.0], dtype=F64))
    assert mdp.P[1].tolist() == [[0.0, 1.0]]
    assert mdp.R[1].tolist() == [0.0]
    assert P[1].isnan().all()


@pytest.mark.parametrize(
    ("table", "start", "message"),
    [
        ({}, [], "outcomes"),
        ({1: {0: [(1.0, 0, 0.0, False)]}}, [1.0], "states 0..n-1"),
        ({0: {1: [(1.0, 0, 0.0, False)]}}, [1.0], "actions 0..A-1"),
        ({0: {0: []}}, [1.0], "outcomes"),
        ({0: {0: [(1.0, 1, 0.0, True)]}}, [1.0], r"next states in 0\.\.0"),
        ({0: {0: [(0.7, 0, 0.0, True)]}}, [1.0], r"P\[0, 0\] must sum to 1, sums to 0.7"),
        ({0: {0: [(1.0, 0, 0.0, False)]}}, [0.5, 0.5], r"start must be \[1\]"),
        ({0: {0: [(1.0, 0, 0.0, False)]}}, [0.5], "start must sum to 1"),
    ],
)
def test_bad_tables_are_refused(table: Any, start: list[float], message: str):
    """Gaps in the ids, missing outcomes and sums other than 1 are named."""
    with pytest.raises(ValueError, match=message):
        TabularMDP.from_transition_table(table, start)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (torch.zeros(14, dtype=torch.int64), r"policy must be \[15\]"),
        (torch.full((15,), 2), r"policy must have actions in 0\.\.1"),
        (torch.full((15,), -1), r"policy must have actions in 0\.\.1"),
        (torch.zeros(15, dtype=F64), r"policy must be \[15, 2\]"),
        (torch.zeros(15, 2, dtype=F64), r"policy\[0\] must sum to 1, sums to 0"),
        (torch.full((15, 2), 0.5), "policy must be .*float64"),
    ],
)
def test_bad_policies_are_refused(policy: Tensor, message: str):
    """A policy that is neither an action nor a distribution per state is named."""
    with pytest.raises(ValueError, match=message):
        policy_evaluation(line_world(), policy, gamma=0.9)


def test_bad_scalars_are_refused():
    """Discounts, tolerances, horizons and exponents out of range raise, with the number."""
    mdp, policy = line_world(), torch.ones(15, dtype=torch.int64)
    for gamma in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"gamma must be in \[0, 1\), got {gamma}"):
            value_iteration(mdp, gamma)
        with pytest.raises(ValueError, match="gamma must be in"):
            policy_evaluation(mdp, policy, gamma)
        with pytest.raises(ValueError, match="gamma must be in"):
            q_learning([], mdp.R, gamma)
    with pytest.raises(ValueError, match="tolerance must be > 0, got 0"):
        value_iteration(mdp, 0.9, tolerance=0)
    with pytest.raises(ValueError, match="got -1 and 1"):
        expected_return(mdp, policy, horizon=-1)
    with pytest.raises(ValueError, match=r"got 5 and 1\.1"):
        expected_return(mdp, policy, horizon=5, gamma=1.1)
    with pytest.raises(ValueError, match=r"exponent must be in \(0.5, 1\], got 0.5"):
        q_learning([], mdp.R, 0.9, exponent=0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_a_tolerance_below_rounding_is_refused(gamma: float):
    """Iteration ends, and says so, where float64 cannot give what is asked."""
    with pytest.raises(ValueError, match="tolerance 1e-18 is too small for float64"):
        value_iteration(line_world(), gamma, tolerance=1e-18)


# ---------------------------------------------------------------- devices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_numbers():
    """Every solver stays on the MDP's device and agrees with the CPU to rounding."""
    here, there = line_world(), line_world(device="cuda")

    def solve(mdp: TabularMDP) -> list[Tensor]:
        q = value_iteration(mdp, 0.99).q
        policy = greedy_policy(q)
        visited = [visited_states(mdp, policy, 40, 0.3), reachable_states(mdp)]
        return [q, policy_evaluation(mdp, policy, 0.99), *(states.double() for states in visited)]

    for on_cpu, on_cuda in zip(solve(here), solve(there), strict=True):
        assert on_cuda.is_cuda
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, atol=1e-12, rtol=0)
