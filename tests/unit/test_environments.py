"""Environments: they keep Gymnasium's contract, and decide, alone or many at once, as the queue simulator does."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.errors import BadInput
from colocate.simulate import environments, traces
from colocate.simulate.episodes import new_pools, rated
from colocate.simulate.placement import arrivals, place
from colocate.simulate.queue import Jobs, bounded_slowdown, started
from colocate.simulate.train import CANDIDATES, SHORTEST_FIRST, evolve
from tests.unit.test_reproduce import FOLDER, needs
from tests.unit.test_simulate_queue import ROWS, SIZE, jobs_of

ROOT = Path(__file__).resolve().parents[2]


def trace(count, seed=3):
    rng = np.random.default_rng(seed)
    run = rng.lognormal(3.0, 1.5, count).round() + 1
    return Jobs(np.cumsum(rng.exponential(12.0, count)).round(), run, run * 2, rng.integers(1, SIZE + 1, count))


def test_the_environment_keeps_gymnasiums_contract():
    env = gymnasium.make(environments.QUEUE, jobs=trace(400), size=SIZE, episode_jobs=64, slots=16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not been set up.*")
        check_env(env.unwrapped, skip_render_check=True)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, backfill=st.booleans())
def test_whoever_always_takes_the_shortest_gets_what_the_queue_simulator_says(rows, backfill):
    jobs = jobs_of(rows)
    env = environments.QueueEnv(jobs, size=SIZE, episode_jobs=len(rows), slots=len(rows), backfill=backfill)
    seen, _ = env.reset(seed=1)
    total, ended = 0.0, False
    while not ended:
        waiting = int(seen[:, 0].sum())
        seen, reward, ended, truncated, info = env.step(np.argmin(seen[:waiting, 2]))
        total += float(reward)
        assert not truncated
    assert info["invalid"] == 0
    asked = np.log1p(jobs.request).astype(np.float32)  # as precise as what is observed
    expected = bounded_slowdown(jobs, started(jobs, asked.astype(float), SIZE, backfill=backfill))
    assert -total == pytest.approx(expected)
    linear = rated(new_pools(1, len(rows)), jobs, SIZE, np.array([0]), SHORTEST_FIRST, backfill)
    assert linear[0] == pytest.approx(expected)


@pytest.mark.parametrize("backfill", [False, True])
def test_many_at_once_are_as_many_alone(backfill):
    jobs, count = trace(300), 5
    options = {"size": SIZE, "episode_jobs": 20, "slots": 8, "backfill": backfill}
    many = gymnasium.make_vec(environments.QUEUE, num_envs=count, jobs=jobs, **options)
    alone = [environments.QueueEnv(jobs, **options) for _ in range(count)]
    seen, info = many.reset(seed=7)
    for i, env in enumerate(alone):
        one, about = env.reset(seed=7 + i)
        assert (seen[i] == one).all()
        assert (info["action_mask"][i] == about["action_mask"]).all()
    rng, over, ends = np.random.default_rng(1), np.zeros(count, bool), 0
    for _ in range(200):
        actions = rng.integers(8, size=count)
        seen, rewards, ended, truncated, info = many.step(actions)
        assert not truncated.any()
        for i, env in enumerate(alone):
            if over[i]:
                one, about = env.reset()
                reward, end = 0.0, False
            else:
                one, reward, end, _, about = env.step(actions[i])
            assert (seen[i] == one).all()
            assert (rewards[i], ended[i], info["invalid"][i]) == (reward, end, about["invalid"])
            over[i] = end
            ends += end
    assert ends > count, "also over the ends of episodes"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(
            {"episode_jobs": 11}, "episode_jobs: 11 are more than the 10 jobs", id="a trace that is too short"
        ),
        pytest.param(
            {"size": 1, "episode_jobs": 5}, "size: job . of the trace asks for", id="a pool that is too small"
        ),
    ],
)
def test_what_an_environment_cannot_be_made_of_is_said(options, said):
    with pytest.raises(BadInput, match=said):
        environments.QueueEnv(trace(10), **options)
    with pytest.raises(BadInput, match=said):
        environments.QueueVectorEnv(2, trace(10), **options)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        pytest.param("procs", 0, "jobs, procs: job 3 has 0", id="no processors"),
        pytest.param("request", -1.0, "jobs, request: job 3 has -1.0", id="a negative request"),
        pytest.param("run", np.nan, "jobs, run: job 3 has nan", id="no number"),
        pytest.param("submit", -9.0, "jobs, submit: they are not in the order", id="another order"),
    ],
)
def test_jobs_that_cannot_be_observed_are_refused(column, value, said):
    jobs = trace(10)
    getattr(jobs, column)[3] = value
    with pytest.raises(BadInput, match=said):
        environments.QueueEnv(jobs, size=SIZE, episode_jobs=4)


def test_a_place_of_nobody_is_the_first_ones_also_below_nought():
    alone = environments.QueueEnv(trace(50), size=SIZE, episode_jobs=20, slots=8)
    many = environments.QueueVectorEnv(2, trace(50), size=SIZE, episode_jobs=20, slots=8)
    alone.reset(options={"first": 4})
    many.reset(options={"first": [4, 4]})
    for count in (1, 2, 3):
        one, reward, *_, info = alone.step(np.int64(-1))
        seen, rewards, *_, infos = many.step(np.array([-1, 0]))
        assert (seen == one).all()
        assert rewards.tolist() == [reward, reward]
        assert (info["invalid"], infos["invalid"].tolist()) == (count, [count, 0])
        assert infos["_invalid"].all()


def test_a_vector_environment_says_what_it_was_not_given():
    many = environments.QueueVectorEnv(3, trace(50), size=SIZE, episode_jobs=4)
    with pytest.raises(gymnasium.error.ResetNeeded):
        many.step(np.zeros(3, int))
    with pytest.raises(BadInput, match="seed: 2 values for 3 environments"):
        many.reset(seed=[1, 2])
    with pytest.raises(BadInput, match="first: 1 values for 3 environments"):
        many.reset(options={"first": [3]})
    seen, _ = many.reset(seed=np.int64(5))  # type: ignore[arg-type] # as numpy counts
    assert (many.reset(seed=5)[0] == seen).all()
    assert (many.reset(seed=[5, 6, 7])[0] == seen).all()
    with pytest.raises(ValueError, match="actions of shape"):
        many.step(np.zeros(2, int))


def test_an_episode_begins_where_it_is_told_to():
    env = environments.QueueEnv(trace(10), size=SIZE, episode_jobs=4)
    env.reset(options={"first": 6})
    with pytest.raises(BadInput, match="first: 7 is none of 0 to 6"):
        env.reset(options={"first": 7})


def placed(env, choose, **options):
    seen, info = env.reset(**options)
    total, steps, ended = 0.0, 0, False
    while not ended:
        seen, reward, ended, truncated, info = env.step(choose(seen))
        total, steps = total + reward, steps + 1
        assert not truncated
        assert ((seen >= 0) & (seen <= 1)).all()
    return total, steps, info["invalid"]


@pytest.fixture
def shared_gpus(tmp_path):
    """Thirty nodes and forty pods in openb's columns."""
    rng, nodes, pods = np.random.default_rng(5), tmp_path / "nodes.csv", tmp_path / "pods.csv"
    rows = "".join(f"n{i},{16000 * (1 + i % 4)},65536,{i % 9},T4\n" for i in range(30))
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\n" + rows)
    asks = [((1, 500), (1, 1000), (4, 1000), (0, 0), (1, 200))[i] for i in rng.integers(5, size=40)]
    rows = "".join(f"{1000 * (1 + i % 4)},4096,{num},{milli}\n" for i, (num, milli) in enumerate(asks))
    pods.write_text("cpu_milli,memory_mib,num_gpu,gpu_milli\n" + rows)
    made, models = traces.openb_nodes(nodes)
    return made, traces.openb_pods(pods, models)


def test_the_placement_environment_keeps_gymnasiums_contract(shared_gpus):
    nodes, pods = shared_gpus
    env = gymnasium.make(environments.PLACEMENT, nodes=nodes, pods=pods)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not been set up.*")
        check_env(env.unwrapped, skip_render_check=True)


def test_many_fleets_are_as_many_alone(shared_gpus):
    nodes, pods = shared_gpus
    many = gymnasium.make_vec(environments.PLACEMENT, num_envs=3, nodes=nodes, pods=pods, arrived=0.3)
    alone = [environments.PlacementEnv(nodes, pods, arrived=0.3) for _ in range(3)]
    with pytest.raises(gymnasium.error.ResetNeeded):
        many.step(np.zeros(3, int))
    seen, info = many.reset(seed=5)
    for i, env in enumerate(alone):
        one, about = env.reset(seed=5 + i)
        assert (seen[i] == one).all()
        assert (info["action_mask"][i] == about["action_mask"]).all()
    draws, over, ends = np.random.default_rng(1), np.zeros(3, bool), 0
    for _ in range(300):
        actions = draws.integers(len(nodes.gpus), size=3)
        seen, rewards, ended, truncated, info = many.step(actions)
        assert not truncated.any()
        for i, env in enumerate(alone):
            if over[i]:
                one, reward, end, about = *((env.reset()[0], 0.0, False)), env.about
            else:
                one, reward, end, _, about = env.step(actions[i])
            assert (seen[i] == one).all()
            assert (rewards[i], ended[i], info["invalid"][i]) == (reward, end, about["invalid"])
        over, ends = ended, ends + int(ended.sum())
    assert ends > 3, "episodes begin anew"


def test_the_rewards_of_an_episode_are_its_allocation_ratio(shared_gpus):
    """Whoever takes the fullest node gets what `place` gets with such a score, on the same pods."""
    nodes, pods = shared_gpus
    env = environments.PlacementEnv(nodes, pods)
    capacity = int(nodes.gpus.sum()) * 1000
    come = arrivals(pods.kinds, pods.kind_of, 1.3 * capacity, 7)
    total, steps, invalid = placed(env, lambda seen: np.int64(np.argmax(seen[:, 3])), options={"pods": come})
    assert 0.9 < total <= 1.0
    assert invalid == 0
    assert steps <= len(come)
    packed = place(nodes, pods.kinds, come, "most-allocated", 1).allocated_milli[-1] / capacity
    assert total == pytest.approx(packed, abs=0.05)
    again = placed(env, lambda seen: np.int64(np.argmax(seen[:, 3])), seed=3)
    assert placed(env, lambda seen: np.int64(np.argmax(seen[:, 3])), seed=3) == again


def test_a_node_on_which_a_pod_does_not_fit_leaves_it_out(shared_gpus):
    nodes, pods = shared_gpus
    env = environments.PlacementEnv(nodes, pods)
    total, steps, invalid = placed(env, lambda seen: np.int64(np.argmin(seen[:, 0])), seed=3)
    assert 0 < invalid <= steps
    assert total < 1.0
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.int64(0))
    with pytest.raises(BadInput, match="options, pods: kinds are 0 to"):
        env.reset(options={"pods": [999]})
    with pytest.raises(BadInput, match="needs nodes that have some"):
        environments.PlacementEnv(nodes._replace(gpus=0 * nodes.gpus), pods)


def test_training_is_deterministic_and_never_worse_than_where_it_began():
    jobs, heard = trace(600), []
    first, again = (
        evolve(jobs, SIZE, 100, backfill=True, seed=5, generations=4, say=lambda n, _: heard.append(n))
        for _ in range(2)
    )
    assert first.weights.tolist() == again.weights.tolist()
    assert heard == [1, 2, 3, 4] * 2
    assert min(g.checked for g in first.curve) <= first.curve[0].checked
    assert CANDIDATES > 0
    with pytest.raises(BadInput, match="100 jobs are too few to train on windows of 100"):
        evolve(trace(100), SIZE, 100, backfill=True, seed=5)


def test_the_example_trains_and_plots(tmp_path):
    """As a user types it, on a small trace."""
    jobs, path, page = trace(600), tmp_path / "jobs.swf", tmp_path / "learning.html"
    fields = zip(*jobs, strict=True)
    path.write_text(
        "".join(f"{i} {s:g} -1 {r:g} {p} -1 -1 {p} {a:g}{' -1' * 9}\n" for i, (s, r, a, p) in enumerate(fields))
    )
    command = [sys.executable, str(ROOT / "examples" / "train_queue_policy.py"), str(path), "--size", str(SIZE)]
    command += ["--jobs", "100", "--generations", "3", "--file", str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert "least first: " in done.stdout
    assert "<svg" in page.read_text()
    done = subprocess.run([*command, "--size", "1"], capture_output=True, text=True)
    assert (done.returncode, "--size: a job asks for" in done.stderr) == (2, True)


@pytest.mark.slow
@needs("rlscheduler-sc20")
@pytest.mark.parametrize("name", ["lublin_256", "lublin_256_new2"])
def test_the_examples_policy_beats_the_heuristics_on_what_it_did_not_see(tmp_path, name):
    trace_file = FOLDER / "rlscheduler-sc20" / f"{name}.swf.gz"
    command = [sys.executable, str(ROOT / "examples" / "train_queue_policy.py"), str(trace_file), "--size", "256"]
    done = subprocess.run([*command, "--file", str(tmp_path / "l.html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()[1:5]}
    assert rows["trained"] < min(rows["FCFS"], rows["SJF"], rows["F1"]), json.dumps(rows)
