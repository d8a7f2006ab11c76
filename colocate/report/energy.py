"""Energy by who drew it, as Prometheus metrics under Kepler's names and labels (docs/user/metrics.md), so that
dashboards and chargeback made for Kepler work: and beside them what Kepler does not tell, the bounds of each figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from colocate.observe.energy import Account, Drawn
from colocate.observe.pods import Pod
from colocate.snapshot import Card

OF_ZONE, OF_CARD = ("zone", "path", "node_name"), ("gpu", "gpu_uuid", "gpu_name", "vendor", "node_name")
RUNNING, TERMINATED = "running", "terminated"
Series = list[tuple[tuple[str, ...], Drawn]]
"""Values of labels, and what they are of."""


class Meter(NamedTuple):
    """What an account is of: Kepler has a label of the zone of CPUs, and none of GPUs, on whoever drew it."""

    name: str
    of_node: tuple[str, ...]
    zones: bool

    def labels(self, *names: str) -> tuple[str, ...]:
        """Of containers, pods and jobs."""
        return (*names, "zone", "node_name") if self.zones else (*names, "node_name")

    def about(self, kind: str, node: str, *values: str) -> tuple[str, ...]:
        """The values of these."""
        return (*values, kind, node) if self.zones else (*values, node)


CPU, GPU = Meter("cpu", OF_ZONE, True), Meter("gpu", OF_CARD, False)


def energy_families(account: Account, pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    """All families of the CPUs' meter; none before anything was counted."""
    if not account.node:
        return
    yield GaugeMetricFamily("kepler_node_cpu_usage_ratio", "Share of all CPU time that was used", account.used)
    yield from _of_node(account, CPU, lambda kind: (kind, account.paths.get(kind, ""), node))
    yield from _of_consumers(account, CPU, pods, node)


def card_families(account: Account, cards: Mapping[str, Card], pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    """The same of the GPUs' meters."""
    if not account.node:
        return

    def about(uuid: str) -> tuple[str, ...]:
        card = cards.get(uuid, Card(uuid=""))
        index, vendor = (str(card.index), "amd" if card.file or card.preempts else "nvidia") if card.uuid else ("", "")
        return (index, card.uuid, card.name, vendor, node)

    info = GaugeMetricFamily("kepler_node_gpu_info", "A GPU of the node", labels=OF_CARD)
    for uuid in cards:
        info.add_metric(about(uuid), 1.0)
    yield info
    yield from _of_node(account, GPU, about)
    yield from _of_consumers(account, GPU, pods, node)


def _of_node(account: Account, meter: Meter, about: Callable[[str], tuple[str, ...]]) -> Iterator[Metric]:
    name, what = meter.name, f"{meter.name.upper()}s of the node"
    for full, text, drawn in (
        (f"kepler_node_{name}", what, account.node),
        (f"kepler_node_{name}_idle", f"{what}, doing nothing", account.idle),
        (f"kepler_node_{name}_active", f"{what}, by their work", account.active),
        (f"colocate_node_{name}_others", f"{what}, by work that is no container's nor job's", account.others),
    ):
        yield from _pair(full, text, meter.of_node, _summed([(about(kind), each) for kind, each in drawn.items()]))


def _of_consumers(account: Account, meter: Meter, pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    yield from _of_containers(account, meter, pods, node)
    yield from _of_pods(account, meter, pods, node)
    jobs: Series = [
        (meter.about(kind, node, who.job, _state(account, key)), each)
        for key, who in account.who.items()
        if who.job
        for kind, each in account.by.get(key, {}).items()
    ]
    jobs += [
        (meter.about(kind, node, name, TERMINATED), Drawn(micro))
        for (_, name), kinds in account.gone.items()
        if name
        for kind, micro in kinds.items()
    ]
    yield from _pair(f"colocate_job_{meter.name}", "A batch job", meter.labels("job", "state"), _summed(jobs))


def _state(account: Account, key: str) -> str:
    return TERMINATED if key in account.ended else RUNNING


def _of_containers(account: Account, meter: Meter, pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    labelled: Series = []
    bounds: dict[tuple[str, ...], float] = {}
    for key, who in account.who.items():
        if not who.container_id:
            continue
        pod = pods.get(who.pod_uid)
        name = pod.containers.get(who.container_id, "") if pod is not None else ""
        known = (who.container_id, name, who.runtime, _state(account, key))
        for kind, each in account.by.get(key, {}).items():
            zone = (kind,) if meter.zones else ()
            labelled.append(((*known, *zone, who.pod_uid, node), each))
            for bound, value in (("low", each.low), ("high", each.high)):
                if value is not None:
                    of_bound = (who.container_id, name, kind, who.pod_uid, bound, node)
                    bounds[of_bound] = bounds.get(of_bound, 0.0) + value
    zone = ("zone",) if meter.zones else ()
    labels = ("container_id", "container_name", "runtime", "state", *zone, "pod_id", "node_name")
    yield from _pair(f"kepler_container_{meter.name}", "A container", labels, _summed(labelled))
    if not meter.zones:
        return
    family = GaugeMetricFamily(
        "colocate_container_cpu_watts_bound",
        "Between what a container's watts are, as the last and as the first who came to its node",
        labels=("container_id", "container_name", "zone", "pod_id", "bound", "node_name"),
    )
    for about, value in bounds.items():
        family.add_metric(about, value)
    yield family


def _of_pods(account: Account, meter: Meter, pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    """A pod's is its containers'; it is terminated once none of them runs."""
    alive = {who.pod_uid for key, who in account.who.items() if key not in account.ended}
    labelled: Series = []
    names: dict[str, tuple[str, ...]] = {}
    for key, who in account.who.items():
        if not who.pod_uid:
            continue
        pod = pods.get(who.pod_uid)
        name, namespace = (pod.name, pod.namespace) if pod is not None else ("", "")
        names[who.pod_uid] = (who.pod_uid, name, namespace, RUNNING if who.pod_uid in alive else TERMINATED)
        for kind, each in account.by.get(key, {}).items():
            labelled.append((meter.about(kind, node, *names[who.pod_uid]), each))
    for (uid, _), kinds in account.gone.items():
        if uid in names:
            labelled += [(meter.about(kind, node, *names[uid]), Drawn(micro)) for kind, micro in kinds.items()]
    labels = meter.labels("pod_id", "pod_name", "pod_namespace", "state")
    yield from _pair(f"kepler_pod_{meter.name}", "A pod", labels, _summed(labelled))


def _summed(labelled: Series) -> Series:
    """One series of those whose labels are the same: a name that was used again, a pod's containers."""
    found: dict[tuple[str, ...], Drawn] = {}
    for about, each in labelled:
        before = found.get(about, Drawn())
        found[about] = Drawn(before.microjoules + each.microjoules, before.watts + each.watts)
    return list(found.items())


def _pair(name: str, text: str, labels: tuple[str, ...], labelled: Series) -> Iterator[Metric]:
    """Joules as a counter, watts as a gauge."""
    joules = CounterMetricFamily(f"{name}_joules", f"Energy: {text}", labels=labels)
    watts = GaugeMetricFamily(f"{name}_watts", f"Power: {text}", labels=labels)
    for about, each in labelled:
        joules.add_metric(about, each.joules)
        watts.add_metric(about, each.watts)
    yield from (joules, watts)
