"""Random fleets and jobs, and what has to hold at every moment of their simulation.

With NUMBA_DISABLE_JIT=1, so that the engine is plain Python, which can be looked at: `-m tests.simulate_moments N`.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np

from colocate.simulate import engine, running
from colocate.simulate.fleet import DISCIPLINES, simulate, too_large
from colocate.simulate.outages import NO_OUTAGES, Outages
from colocate.simulate.paces import NO_MODEL, NO_PACES, Paces
from colocate.simulate.placement import Kinds, Nodes
from colocate.simulate.running import BUSY, HELD, Play, Work
from colocate.simulate.scores import CLASS, CPU, LEFT, MOST_GPUS, WHOLE

LATE = 1e6
"""When the last job comes: areas are told until then."""
MOST_PASSES, MOST_MEMBERS = 20_000, 5
passes = list[float]()
"""Of this simulation, when."""
_pass = engine._pass


def looked_at(play: Play, ends: list[tuple[float, int]], *rest: Any) -> Any:
    """As the engine's own pass over the queue; what has to hold after it is looked at."""
    found = _pass(play, ends, *rest)
    passes.append(rest[2])
    assert len(passes) < MOST_PASSES, "it comes to an end"
    if not found[4]:
        now = rest[2]
        running.repace(play, ends, now)
        check(play, ends, found[0], now)
    return found


def check(play: Play, ends: list[tuple[float, int]], count: int, now: float) -> None:
    """Nobody has what somebody else has, and everybody who waits is in the queue once, in its order."""
    board, pods, work, progress = play.board, play.pods, play.work, play.progress
    free = np.zeros((len(board.version), MOST_GPUS), np.int64)
    free[np.arange(MOST_GPUS) < board.nodes.gpus[:, None]] = WHOLE
    cpu, gpus = board.nodes.cpu_milli.copy(), np.zeros(2, np.int64)
    waits = []
    for job in range(len(work.submit)):
        k, runs = work.kind[job], not np.isnan(progress[job, running.OVER])
        for p in range(pods.first[job], pods.first[job] + pods.placed[job]):
            cpu[pods.node[p]] -= board.kinds.cpu_milli[k]
            mine = [g for g in range(MOST_GPUS) if (pods.mask[p] >> g) & 1]
            free[pods.node[p], mine] -= board.kinds.gpu_milli[k]
            assert len(mine) == board.kinds.gpus[k]
        gpus[BUSY if runs else HELD] += running.size_of(board.kinds, k) * pods.placed[job]
        if runs:
            assert pods.placed[job] >= work.least[job]
            assert progress[job, running.PACE] == running.pace_of(play, job)
            assert progress[job, running.OVER] == np.inf or (progress[job, running.OVER], job) in ends
            assert progress[job, running.OVER] >= now
        if work.submit[job] <= now and np.isnan(play.end[job]) and pods.placed[job] < work.members[job]:
            waits.append(job)
    down = board.state.nodes[:, CPU] < -running.NEVER // 2
    assert free.min() >= 0 <= cpu.min()
    assert (free == board.state.nodes[:, LEFT:CLASS]).all()
    assert (cpu == board.state.nodes[:, CPU] + down * running.NEVER).all()
    assert gpus.tolist() == play.gpus[:2].tolist()
    queue = play.waiting[:count].tolist()
    assert sorted(queue) == waits
    assert not any(engine._first(play, later, sooner) for sooner, later in itertools.pairwise(queue))
    for job in queue:
        runs, k = not np.isnan(progress[job, running.OVER]), work.kind[job]
        needs = work.least[job] if play.rule.gang and not runs else 1
        assert room(play, k, cpu - down * running.NEVER, free) < needs, "who could begin or grow has done so"
        if play.rule.strict and not runs:
            break


def room(play: Play, k: int, cpu: Any, free: Any) -> int:
    """For how many pods of a kind."""
    kinds, found = play.board.kinds, 0
    for i in range(len(cpu)):
        fit = cpu[i] // kinds.cpu_milli[k] if kinds.cpu_milli[k] else 10**6
        if kinds.gpus[k]:
            whole = kinds.gpu_milli[k] == WHOLE
            parts = (free[i] == WHOLE).sum() // kinds.gpus[k] if whole else (free[i] // kinds.gpu_milli[k]).sum()
            fit = min(fit, parts)
        found += max(int(fit), 0) if cpu[i] >= 0 else 0
    return found


def drawn(seed: int) -> tuple[Nodes, Kinds, Work, Outages, Paces]:
    """A fleet, its jobs, its failures, and who slows down whom."""
    draw = np.random.default_rng(seed)
    count, each, kinds, jobs = (int(draw.integers(*of)) for of in ((1, 5), (1, 5), (1, 5), (2, 11)))
    ones, sorts = np.ones(count, np.int64), int(draw.integers(1, 3))
    nodes = Nodes(8000 * ones, 8000 * ones, each * ones, *(draw.integers(0, sorts, count) for _ in range(3)))
    gpus, milli = draw.integers(0, each + 1, kinds), np.full(kinds, WHOLE)
    part = draw.random(kinds) < 0.5
    gpus[part], milli[part] = 1, draw.choice([300, 500, 700], int(part.sum()))
    priority = draw.integers(0, 3, kinds) * int(draw.random() < 0.5)
    asks = Kinds(draw.choice([0, 1000, 3000], kinds), 0 * gpus, gpus, milli, 0 * gpus, priority)
    submit = np.cumsum(draw.integers(0, 8, jobs)).astype(float)
    submit, members = np.append(submit - submit[0], LATE), np.append(draw.integers(1, MOST_MEMBERS + 1, jobs), 1)
    run, kind = np.append(draw.integers(0, 25, jobs).astype(float), 0.0), draw.integers(0, kinds, jobs + 1)
    least = np.minimum(draw.integers(1, 6, jobs + 1), members) if draw.random() < 0.7 else members
    work = Work(submit, run, kind, members, least, np.ones((jobs + 1, 2)))
    outages = NO_OUTAGES
    if draw.random() < 0.7:
        at = 6 * draw.choice(12, 3, replace=False) + draw.integers(0, 2)
        events = sorted((float(t) + 5 * back, i % count, not back) for i, t in enumerate(at) for back in (False, True))
        times, where, fails = (np.array(column) for column in zip(*events, strict=True))
        outages = NO_OUTAGES._replace(at=times, node=where, down=fails, restart=float(draw.choice([0, 3])))
        outages = outages._replace(checkpoint=float(draw.choice([2.0, 3.0, np.inf])))
    paces = NO_PACES
    if draw.random() < 0.7:
        pair = draw.choice([1.0, 1.25, 2.0, np.inf], (sorts, 3, 3))
        pair = np.where(np.isinf(pair) | np.isinf(pair.transpose(0, 2, 1)), np.inf, pair)
        model = np.where(gpus[kind] == 0, NO_MODEL, draw.integers(-1, 3, jobs + 1))
        row = np.where(model == NO_MODEL, NO_MODEL, MOST_MEMBERS * model)
        paces = Paces(row, model, draw.choice([1.0, 1.5, 2.0], (MOST_MEMBERS * 3, sorts, 2)), pair)
    return nodes, asks, work, outages, paces


def main() -> int:
    """So many draws, each under every policy; how many simulations that were."""
    simulations = 0
    engine._pass = looked_at  # type: ignore[assignment]
    for seed in range(int(sys.argv[1])):
        nodes, kinds, work, outages, paces = drawn(seed)
        if too_large(nodes, kinds, work) >= 0:
            continue
        for name, discipline in DISCIPLINES.items():
            passes.clear()
            run = simulate(nodes, kinds, work, discipline, seed, None, outages, paces)
            simulations += 1
            assert not discipline.gang or not np.isnan(run.end).any(), (seed, name, "somebody never ended")
            if np.isnan(run.end).any():
                continue  # who holds a part may wait for ever
            each = kinds.gpus[work.kind] * work.members * work.run
            assert abs(run.done_gpu_seconds - each.sum()) < 1e-6, (seed, name)
            asked = (each * kinds.gpu_milli[work.kind] / WHOLE).sum()
            if paces is NO_PACES:
                assert abs(run.busy_gpu_seconds - asked - run.lost_gpu_seconds) < 1e-6, (seed, name)
            assert min(run.lost_gpu_seconds, run.held_gpu_seconds, run.idle_gpu_seconds) > -1e-9, (seed, name)
    print(simulations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
