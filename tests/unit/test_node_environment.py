"""Colocate/Node-v0: it keeps Gymnasium's contract, many nodes are as many alone, and batch costs what it is felt."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.errors import BadInput
from colocate.simulate import environments
from colocate.simulate.evaluation import Assumptions
from colocate.simulate.node_environment import NodeEnv, NodeVectorEnv, made_demand


def returns(grant, seed, **more):
    """An hour with one grant: the sum of rewards, and what batch had and services felt too much, in the mean."""
    env = NodeEnv(episode_seconds=600, **more)
    env.reset(seed=seed)
    total, had, felt, over = 0.0, [], [], False
    while not over:
        _, reward, ended, over, info = env.step(np.array([grant], np.float32))
        assert not ended
        total += reward
        had.append(info["batch"])
        felt.append(info["too_much"])
    return total, float(np.mean(had)), float(np.mean(felt))


def test_the_environment_keeps_gymnasiums_contract():
    env = gymnasium.make(environments.NODE, episode_seconds=50)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not been set up.*")
        check_env(env.unwrapped, skip_render_check=True)


def test_many_nodes_are_as_many_alone():
    count = 5
    many = gymnasium.make_vec(environments.NODE, num_envs=count, episode_seconds=40)
    alone = [NodeEnv(episode_seconds=40) for _ in range(count)]
    seen, _ = many.reset(seed=7)
    for i, env in enumerate(alone):
        assert (seen[i] == env.reset(seed=7 + i)[0]).all()
    draws, over = np.random.default_rng(1), np.zeros(count, bool)
    for _ in range(130):
        actions = draws.random((count, 1)).astype(np.float32)
        seen, rewards, ended, truncated, info = many.step(actions)
        assert not ended.any()
        for i, env in enumerate(alone):
            if over[i]:
                one, reward, cut, about = *((env.reset()[0], 0.0, False)), {"batch": 0.0}
            else:
                one, reward, _, cut, about = env.step(actions[i])
            assert (seen[i] == one).all()
            assert (rewards[i], truncated[i], info["batch"][i]) == (reward, cut, about["batch"])
        over = truncated


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_batch_has_no_more_than_its_grant_and_what_is_seen_is_a_share(seed, grant):
    env = NodeEnv(episode_seconds=100)
    env.reset(seed=seed)
    for _ in range(100):
        seen, _, _, _, info = env.step(np.array([grant]))
        assert ((seen >= 0.0) & (seen <= 1.0)).all()
        assert info["batch"] <= min(grant, 1.0 - seen[0]) + 1e-6


def test_the_more_batch_is_granted_the_more_it_has_and_the_more_is_felt():
    means = [np.mean([returns(grant, seed) for seed in range(30)], axis=0) for grant in (0.0, 0.2, 1.0)]
    assert [means[0][1] == 0.0, means[0][1] < means[1][1] < means[2][1]] == [True, True]
    assert means[0][2] <= means[1][2] <= means[2][2]
    kind = Assumptions(shared=1e-6, scheduler=1e-6, bursts=0.0)
    assert returns(1.0, 3, assumed=kind)[2] == 0.0, "where batch is not felt nothing is too much"


def test_a_learner_that_looks_beats_every_fixed_grant():
    """One that gives way when the service waits has more than any that does not look: there is something to learn."""
    many = NodeVectorEnv(200, episode_seconds=900, price=20.0)

    def total(act):
        seen, _ = many.reset(seed=1)
        total = np.zeros(200)
        for _ in range(900):
            seen, rewards, *_ = many.step(act(seen).astype(np.float32)[:, None])
            total += rewards
        return total.mean()

    fixed = max(total(lambda seen, grant=grant: np.full(len(seen), grant)) for grant in (0.0, 0.05, 0.1, 0.2, 0.4, 1.0))
    looks = total(
        lambda seen: np.clip(1.0 - 8.0 * np.maximum(np.maximum(seen[:, 4], seen[:, 5]) - 0.15, 0.0), 0.0, 1.0)
    )
    assert looks > fixed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"episode_seconds": 0}, "episode_seconds: 0 is less than 1", id="no time"),
        pytest.param({"price": -1.0}, "price: -1.0 is less than 0", id="a negative price"),
        pytest.param({"demand": np.zeros(5)}, r"demand: its shape is \(5,\)", id="one row that is none"),
        pytest.param({"demand": np.array([[0.1, np.nan]])}, r"demand\[0, 1\]: nan is no share", id="NaN"),
    ],
)
def test_what_cannot_be_is_said(changes, said):
    with pytest.raises(BadInput, match=said):
        NodeEnv(**changes)


def test_one_that_is_given_no_seed_goes_on_as_before():
    def twice():
        many = NodeVectorEnv(3, episode_seconds=5)
        many.reset(seed=1)
        return many.reset(seed=[None, 2, 3])[0]

    assert (twice() == twice()).all()


def test_an_episode_can_begin_at_a_second_of_the_day():
    env = NodeEnv()
    seen, _ = env.reset(seed=1, options={"second": 6 * 3600})
    assert seen[7:] == pytest.approx([1.0, 0.5]), "a quarter of the day"
    with pytest.raises(BadInput, match="options, second: 86400 is none of 0 to 86399"):
        env.reset(options={"second": 86400})


def test_a_grant_that_is_no_number_is_refused():
    env = NodeEnv(made_demand())
    env.reset(seed=1)
    with pytest.raises(BadInput, match="actions: nan is no share of a node"):
        env.step(np.array([np.nan]))
    with pytest.raises(gymnasium.error.ResetNeeded):
        NodeEnv().step(np.array([0.5]))
