"""The demonstration: what it counts, and what its simulated form shows."""

import pytest

from colocate.demo.page import sentence
from colocate.demo.progress import Progress
from colocate.demo.result import ARMS, differs_from_default
from colocate.demo.scenario import SPEC
from colocate.demo.simulated import simulate
from colocate.policy.schema import PolicySpec


def test_what_a_job_did_since_its_last_checkpoint_is_lost_with_it(tmp_path):
    progress = Progress(tmp_path / "job")
    progress.done.done, progress.saved.done = 100, 60
    assert progress.died() == 40
    assert (progress.done.done, progress.lost.done) == (60, 40)
    progress.done.done = 90  # its successor went on from there
    assert progress.died() == 30
    assert progress.lost.done == 70


def test_a_job_that_starts_from_nothing_finds_nothing_of_an_earlier_one(tmp_path):
    progress = Progress(tmp_path / "job")
    progress.done.done = progress.saved.done = progress.lost.done = 5
    progress.checkpoint.write_bytes(b"of before")
    progress.reset()
    assert (progress.done.done, progress.saved.done, progress.lost.done) == (0, 0, 0)
    assert not progress.checkpoint.exists()


def test_the_report_names_what_of_the_policy_is_not_its_default():
    assert differs_from_default(PolicySpec()) == ""
    assert "tick 0.5" in differs_from_default(SPEC)
    assert "memory.crawl 1" in differs_from_default(SPEC)
    assert "question" not in differs_from_default(SPEC)


@pytest.fixture(scope="module")
def simulated():
    return simulate(16.0, 1, 0.002)


def test_in_the_model_a_short_node_hurts_the_service_less_with_colocate(simulated):
    alone, unmanaged, plain, ours = (simulated.arms[a] for a in ARMS)
    assert ours.p99_ms < plain.p99_ms < unmanaged.p99_ms
    assert ours.stalled_seconds < plain.stalled_seconds
    assert ours.service_restarts == ours.failed_requests == 0
    assert ours.besteffort_work_ratio >= plain.besteffort_work_ratio - 0.01
    assert alone.stalled_seconds == alone.batch_work_per_second == 0.0


def test_in_the_model_who_has_to_go_loses_next_to_nothing(simulated):
    plain, ours = simulated.arms["besteffort"], simulated.arms["colocate"]
    assert ours.batch_processes_lost > 0
    assert plain.batch_processes_lost > 0
    assert ours.batch_lost_per_second < 0.25 * plain.batch_lost_per_second
    texts = [e.text for e in simulated.details["colocate"].events]
    assert any("was evicted" in t for t in texts)
    assert not any("killed by the kernel" in t for t in texts)


def test_the_sentence_says_that_it_is_one_run(simulated):
    assert "One run, no interval" in sentence(simulated)
