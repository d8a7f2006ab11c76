"""What would let a gang start that does not fit, and when it may: worked out question by question.

After each question the cluster is as before, so that whoever asks can do other things in between.
"""

from __future__ import annotations

from collections.abc import Iterator

from podgroup.api import Advice
from podgroup.explain.counterfactual import counterfactuals
from podgroup.queue.entry import entry_of, of_interest, question
from podgroup.queue.queue import Queue
from podgroup.queue.runtimes import starts_step_by_step
from podgroup.solve.place import place
from podgroup.solve.question import Debt
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import sort_members


def advise(cluster: Cluster, queue: Queue, key: str, now: float) -> Iterator[Advice]:
    """What is known after each question, the whole of it last; nothing of a gang that does not wait for room."""
    memory, entry = queue.waiting.get(key), entry_of(cluster, key, queue.settings)
    if memory is None or memory.reason != "Unschedulable" or memory.question is None or entry is None:
        return
    priority, owed = entry.priority, queue.owed.against(key, entry.priority)
    gang, _ = question(cluster, entry, queue.settings, owed)
    satisfied = sort_members(cluster.pods_of(key), queue.settings.schedulers).satisfied
    resources = {resource for debt in gang.leave for resource in debt.amounts}

    def owed_without(other: str) -> tuple[Debt, ...]:
        return of_interest(queue.owed.against(key, priority, without=other), resources)

    with cluster.ledger.empty():
        fits = place(cluster.ledger, gang._replace(leave=())) is not None
    found = []
    for change in counterfactuals(cluster, key, gang, satisfied, owed_without):
        found += [change] if change is not None else []
        yield Advice(counterfactuals=list(found), fits_when_empty=fits)
    steps, when = starts_step_by_step(cluster, gang, now), None
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            when = ended.value
            break
        yield Advice(counterfactuals=list(found), fits_when_empty=fits)
    estimate = None if when is None else (round(when[0] - now, 1), round(when[1] - now, 1))
    yield Advice(counterfactuals=found, fits_when_empty=fits, estimate_seconds=estimate)
