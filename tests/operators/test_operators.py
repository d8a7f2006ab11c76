"""What users of an operator do with its jobs: each starts whole or waits whole, whoever makes its pods."""

from __future__ import annotations

import asyncio

import pytest

from colocate.kube.client import PODS
from tests.operators.conftest import Played, first_worker
from tests.operators.jobs import ELASTIC, JOBSET, KUEUE, LWS, MPI, SUSPENDABLE, Adapter


def of(adapters: tuple[Adapter, ...]) -> pytest.MarkDecorator:
    """Only with these operators."""
    return pytest.mark.parametrize("world", adapters, ids=[a.name for a in adapters], indirect=True)


async def test_1_a_job_that_fits_starts(world: Played) -> None:
    await world.nodes("f0", "f1")
    await world.start("a", 2)
    await world.until_runs("a", 3)


async def test_2_a_job_that_does_not_fit_waits_and_starts_when_there_is_room(world: Played) -> None:
    await world.nodes("g0")
    await world.start("a", 2)
    await world.until_waits("a", 3)
    await world.nodes("g1")
    await world.until_runs("a", 3)


async def test_3_of_two_that_compete_one_starts_and_the_other_follows(world: Played) -> None:
    await world.nodes("h0", "h1")
    await world.start("a", 2)
    await world.start("b", 2)

    async def one_of_them() -> bool:
        return sorted([await world.bound_of("a"), await world.bound_of("b")]) == [0, 3]

    await world.until(one_of_them, "one runs whole, the other waits whole")
    await asyncio.sleep(1.0)
    assert await one_of_them()
    first, second = ("a", "b") if await world.bound_of("a") else ("b", "a")
    await world.end(first)
    await world.until_runs(second, 3)


async def test_4_a_worker_that_is_deleted_comes_back_to_its_place(world: Played) -> None:
    await world.nodes("i0", "i1")
    await world.start("a", 2)
    await world.until_runs("a", 3)
    await world.start("rival", 1)
    await world.until_waits("rival", 2)
    members = await world.members("a")
    lost = first_worker(members)
    await world.delete(PODS, lost, 0)

    async def replaced() -> bool:
        now = await world.members("a")
        return lost not in now or now[lost].metadata.uid != members[lost].metadata.uid

    await world.until(replaced, "the operator has made another one")
    await world.until_runs("a", 3)
    assert await world.bound_of("rival") == 0


@of(ELASTIC)
async def test_5_a_job_is_scaled_down_and_up_again(world: Played) -> None:
    await world.nodes("j0", "j1", "j2")
    await world.start("a", 3)
    await world.until_runs("a", 4)
    await world.change("a", world.adapter.scaled(1))
    await world.until_runs("a", 2)
    await world.change("a", world.adapter.scaled(3))
    await world.until_runs("a", 4)


@of(ELASTIC)
async def test_5b_growth_takes_no_equal_job_s_members(world: Played) -> None:
    async def all_members() -> dict[str, str]:
        return {n: p.metadata.uid for job in ("a", "b") for n, p in (await world.members(job)).items()}

    await world.nodes("k0", "k1", "k2", "k3")
    for name in ("a", "b"):
        await world.start(name, 2)
        await world.until_runs(name, 3)
    before = await all_members()
    for name in ("a", "b"):
        await world.change(name, world.adapter.scaled(3))
    await asyncio.sleep(5.0)
    assert before.items() <= (await all_members()).items(), ("who ran runs", await world.told_of())
    await world.nodes("k4", "k5")
    for name in ("a", "b"):
        await world.until_runs(name, 4)


async def test_6_a_job_that_is_deleted_leaves_its_room_at_once(world: Played) -> None:
    await world.nodes("l0", "l1")
    await world.start("big", 3)
    await world.until_waits("big", 4)
    await world.start("a", 2)
    await world.until_runs("a", 3)
    await world.end("big")
    await world.end("a")
    await world.start("b", 2)
    await world.until_runs("b", 3)


@of(SUSPENDABLE)
async def test_7_a_suspended_job_gives_its_room_away_and_comes_back_whole(world: Played) -> None:
    await world.nodes("m0", "m1")
    await world.start("a", 2)
    await world.until_runs("a", 3)
    await world.suspend("a", True)
    await world.start("b", 2)
    await world.until_runs("b", 3)
    await world.suspend("a", False)
    await world.until_waits("a", 3)
    await world.end("b")
    await world.until_runs("a", 3)


# what one operator alone does


@of(JOBSET)
async def test_a_job_set_that_restarts_as_a_whole_keeps_its_room(world: Played) -> None:
    """failurePolicy: one worker fails, and all jobs are deleted and made anew (reviews: F3)."""
    parts = world.adapter.job(world.called("a"), 2)["spec"]["replicatedJobs"]
    for part in parts:
        part["template"]["spec"]["backoffLimit"] = 0
    await world.nodes("o0", "o1")
    await world.start("a", 2, failurePolicy={"maxRestarts": 2}, replicatedJobs=parts)
    await world.until_runs("a", 3)
    before = await world.members("a")
    await world.start("rival", 1)
    await world.until_waits("rival", 2)
    await world.fail("a")

    async def anew() -> bool:
        now = await world.members("a")
        return len(now) == 3 and not {p.metadata.uid for p in now.values()} & {p.metadata.uid for p in before.values()}

    await world.until(anew, "all its pods are other ones")
    await world.until_runs("a", 3)
    assert await world.bound_of("rival") == 0


@of(JOBSET)
async def test_a_job_set_that_starts_in_order_starts(world: Played) -> None:
    """The workers are made once the leader is ready (reviews: F2)."""
    await world.nodes("p0", "p1")
    await world.start("a", 2, startupPolicy={"startupPolicyOrder": "InOrder"})
    await world.until_runs("a", 3)


@of(LWS)
async def test_a_set_whose_workers_come_after_their_leader_starts(world: Played) -> None:
    await world.nodes("q0", "q1")
    await world.start("a", 2, startupPolicy="LeaderReady")
    await world.until_runs("a", 3)


@of(MPI)
async def test_an_mpi_job_whose_worker_fails_gets_its_launcher_again(world: Played) -> None:
    """mpi-operator replaces no failed worker, so the launcher must run for it to decide (reviews: F4)."""
    await world.nodes("r0", "r1")
    await world.start("a", 2)
    await world.until_runs("a", 3)
    launcher = min(n for n in await world.members("a") if "launcher" in n)
    await world.fail("a")
    await world.set_phase(launcher, "Failed")

    async def again() -> bool:
        return any(
            "launcher" in n and n != launcher and p.spec.node_name for n, p in (await world.members("a")).items()
        )

    await world.until(again, "another launcher runs")


@of(KUEUE)
async def test_of_two_that_compete_for_quota_the_other_follows(world: Played) -> None:
    await world.nodes("s0", "s1", "s2", "s3")
    await world.start("a", 2, queue="small")
    await world.until_runs("a", 3)
    await world.start("b", 2, queue="small")
    await asyncio.sleep(1.0)
    assert await world.bound_of("b") == 0
    await world.end("a")
    await world.until_runs("b", 3)
