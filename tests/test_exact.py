"""The exact solution of a tabular environment, and how far a network is from it."""

from __future__ import annotations

import pytest
import torch

from dqn_fast.envs import LineWorld, make_env
from dqn_fast.exact import ExactValues, solve
from tests.test_evaluate import table_network


def test_exact_values_of_the_default_experiment():
    """The known values of LineWorld with slip 0.05, gamma 0.99."""
    exact = ExactValues(LineWorld(slip_prob=0.05), [0.99])
    assert exact.optimal_return[0] == pytest.approx(0.84506, abs=1e-5)
    assert exact.optimal_start_value[0] == pytest.approx(0.72054, abs=1e-5)
    for state, action, value in (
        (0, 0, 0.70424),
        (0, 1, 0.72054),
        (7, 1, 0.85913),
        (13, 1, 0.98780),
    ):
        assert exact.q_star[0, state, action].item() == pytest.approx(value, abs=1e-5)


def test_a_network_is_compared_where_it_goes():
    """The right table is optimal; a value wrong by 0.2 shows only where the policy passes."""
    env = LineWorld(slip_prob=0.0)
    exact = ExactValues(env, [0.99])
    right = exact.compare(table_network(env, exact.q_star.float()))
    assert right["policy_optimal"] == [True]
    assert right["q_error_max"][0] < 1e-6

    q = exact.q_star[0].float().clone()
    q[7, 1] += 0.2
    passed = exact.compare(table_network(env, q[None]))
    assert passed["q_error_max"] == [pytest.approx(0.2, abs=1e-6)]
    assert passed["policy_optimal"] == [False]  # right actions, wrong values

    q = exact.q_star[0].float().clone()
    q[2] = torch.tensor([9.0, 0.0])  # turns back at 2 and never comes to 7
    q[7, 1] += 0.2
    stuck = exact.compare(table_network(env, q[None]))
    assert stuck["q_error_max"][0] > 8
    assert stuck["policy_optimal"] == [False]


def test_the_start_value_is_that_of_the_greedy_policy():
    """Each member's own: the optimal one, and -0.01 for ever for the one that always goes left; for
    the discount of training, without time limit, from the start distribution."""
    env = LineWorld(max_steps=3)
    exact = ExactValues(env, [0.9, 0.9])
    left = torch.tensor([[1.0, 0.0]] * 15)
    q_net = table_network(env, torch.stack([exact.q_star[0].float(), left]))
    best = -0.01 * (1 - 0.9**14) / 0.1 + 0.9**13
    assert exact.optimal_start_value[0] == pytest.approx(best, abs=1e-7)
    assert exact.compare(q_net)["start_value"] == pytest.approx([best, -0.1], abs=1e-7)


@pytest.mark.parametrize("slip_prob", [0.0, 0.3])
def test_the_table_is_the_environment(slip_prob):
    """10**6 random steps: empirical transition frequencies and mean rewards agree with P and R."""
    env = LineWorld(n_states=5, slip_prob=slip_prob, max_steps=50)
    mdp = env.mdp()
    copies, steps = 1000, 1000
    generator = torch.Generator().manual_seed(0)
    vector = env.vector_reset(torch.zeros(copies, 0))
    counts = torch.zeros(5 * 2 * 5, dtype=torch.int64)
    rewards = torch.zeros(5 * 2, dtype=torch.float64)
    for _ in range(steps):
        action = torch.randint(2, (copies,), generator=generator)
        noise = torch.rand((copies, 1), generator=generator)
        state = env.state_index(vector.obs)
        vector, outcome = env.vector_step(vector, action, noise, torch.zeros(copies, 0))
        pair = state * 2 + action
        counts += torch.bincount(pair * 5 + env.state_index(outcome.next_obs), minlength=50)
        rewards.index_add_(0, pair, outcome.reward.double())
        assert torch.equal(outcome.terminated, mdp.terminal[env.state_index(outcome.next_obs)])
    counts = counts.view(5, 2, 5).double()
    visits = counts.sum(2, keepdim=True)
    frequency = (counts / visits)[:4]
    deviation = (mdp.P * (1 - mdp.P) / visits).sqrt()[:4]
    assert visits[:4].min() > 10_000
    assert ((frequency - mdp.P[:4]).abs() <= 5 * deviation + 1e-12).all()
    mean = (rewards.view(5, 2) / visits[..., 0])[:4]
    assert ((mean - mdp.R[:4]).abs() <= 5 * deviation[..., 4] + 1e-6).all()


def test_the_states_are_in_the_order_of_the_table():
    """state_index undoes observe on all states."""
    env = LineWorld(n_states=300)
    assert torch.equal(env.state_index(env.observe(env.states())), torch.arange(300))


def test_only_what_is_worth_the_wait_is_solved():
    """Tables of up to 1,024 states, with a discount below 0.9999."""
    assert isinstance(solve(LineWorld(), [0.9]), ExactValues)
    assert solve(LineWorld(n_states=1_025), [0.9]) is None
    assert solve(LineWorld(), [0.9, 0.99999]) is None
    assert solve(make_env("CartPole-v1"), [0.9]) is None


def test_each_member_has_the_solution_of_its_own_discount():
    """Values, returns and errors of a member are those of its gamma alone."""
    env = LineWorld(slip_prob=0.05)
    both = ExactValues(env, [0.9, 0.99])
    alone = [ExactValues(env, [gamma]) for gamma in (0.9, 0.99)]
    assert torch.equal(both.q_star, torch.cat([one.q_star for one in alone]))
    assert both.optimal_start_value == [one.optimal_start_value[0] for one in alone]
    errors = both.compare(table_network(env, both.q_star.flip(0).float()))["q_error_max"]
    gap = (both.q_star[0] - both.q_star[1]).abs()[:14].max().item()
    assert errors == pytest.approx([gap, gap], abs=1e-5)


def test_values_in_all_states_are_the_networks():
    """Each member's, in the order of the table."""
    env = LineWorld(n_states=5)
    exact = ExactValues(env, [0.9, 0.9])
    q = torch.arange(20.0).view(2, 5, 2)
    assert torch.equal(exact.q_values(table_network(env, q)), q)


@pytest.mark.parametrize(
    "params", [{"max_steps": 10_001}, {"step_penalty": -1e9}, {"step_penalty": -1e308}]
)
def test_what_takes_too_long_or_is_not_exact_has_no_solution(params):
    """A time limit of more than 10,000 steps, and rewards beyond float64's digits."""
    assert solve(make_env("LineWorld-v0", params), [0.5]) is None
    assert solve(make_env("LineWorld-v0", {"max_steps": 10_000}), [0.5]) is not None
