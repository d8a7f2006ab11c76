"""Energy by who drew it, as Prometheus metrics under Kepler's names and labels (docs/user/metrics.md), so that
dashboards and chargeback made for Kepler work: and beside them what Kepler does not tell, the bounds of each figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from colocate.observe.energy import Account, Drawn
from colocate.observe.pods import Pod

OF_NODE = ("zone", "path", "node_name")
OF_CONTAINER = ("container_id", "container_name", "runtime", "state", "zone", "pod_id", "node_name")
OF_POD = ("pod_id", "pod_name", "pod_namespace", "state", "zone", "node_name")
RUNNING, TERMINATED = "running", "terminated"
Series = list[tuple[tuple[str, ...], Drawn]]
"""Values of labels, and what they are of."""


def energy_families(account: Account, pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    """All families; none before anything was counted."""
    if not account.node:
        return
    yield GaugeMetricFamily("kepler_node_cpu_usage_ratio", "Share of all CPU time that was used", account.used)
    for name, text, drawn in (
        ("kepler_node_cpu", "CPUs of the node", account.node),
        ("kepler_node_cpu_idle", "CPUs of the node, doing nothing", account.idle),
        ("kepler_node_cpu_active", "CPUs of the node, by their work", account.active),
        ("colocate_node_cpu_others", "CPUs of the node, by work that is no container's nor job's", account.others),
    ):
        labelled: Series = [((kind, account.paths.get(kind, ""), node), each) for kind, each in drawn.items()]
        yield from _pair(name, text, OF_NODE, labelled)
    yield from _of_containers(account, pods, node)
    yield from _of_pods(account, pods, node)
    jobs: Series = [
        ((who.job, _state(account, key), kind, node), each)
        for key, who in account.who.items()
        if who.job
        for kind, each in account.by.get(key, {}).items()
    ]
    jobs += [
        ((name, TERMINATED, kind, node), Drawn(micro))
        for (_, name), kinds in account.gone.items()
        if name
        for kind, micro in kinds.items()
    ]
    yield from _pair("colocate_job_cpu", "A batch job", ("job", "state", "zone", "node_name"), _summed(jobs))


def _state(account: Account, key: str) -> str:
    return TERMINATED if key in account.ended else RUNNING


def _of_containers(account: Account, pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    labelled: Series = []
    bounds: dict[tuple[str, ...], float] = {}
    for key, who in account.who.items():
        if not who.container_id:
            continue
        pod = pods.get(who.pod_uid)
        name = pod.containers.get(who.container_id, "") if pod is not None else ""
        for kind, each in account.by.get(key, {}).items():
            state = _state(account, key)
            labelled.append(((who.container_id, name, who.runtime, state, kind, who.pod_uid, node), each))
            for bound, value in (("low", each.low), ("high", each.high)):
                if value is not None:
                    of_bound = (who.container_id, name, kind, who.pod_uid, bound, node)
                    bounds[of_bound] = bounds.get(of_bound, 0.0) + value
    yield from _pair("kepler_container_cpu", "A container", OF_CONTAINER, _summed(labelled))
    family = GaugeMetricFamily(
        "colocate_container_cpu_watts_bound",
        "Between what a container's watts are, as the last and as the first who came to its node",
        labels=("container_id", "container_name", "zone", "pod_id", "bound", "node_name"),
    )
    for about, value in bounds.items():
        family.add_metric(about, value)
    yield family


def _of_pods(account: Account, pods: Mapping[str, Pod], node: str) -> Iterator[Metric]:
    """A pod's is its containers'; it is terminated once none of them runs."""
    alive = {who.pod_uid for key, who in account.who.items() if key not in account.ended}
    labelled: Series = []
    for key, who in account.who.items():
        if not who.pod_uid:
            continue
        pod = pods.get(who.pod_uid)
        name, namespace = (pod.name, pod.namespace) if pod is not None else ("", "")
        state = RUNNING if who.pod_uid in alive else TERMINATED
        for kind, each in account.by.get(key, {}).items():
            labelled.append(((who.pod_uid, name, namespace, state, kind, node), each))
    names = {labels[0]: labels for labels, _ in labelled}
    for (uid, _), kinds in account.gone.items():
        if uid in names:
            pod_id, pod_name, namespace, state = names[uid][:4]
            labelled += [
                ((pod_id, pod_name, namespace, state, kind, node), Drawn(micro)) for kind, micro in kinds.items()
            ]
    yield from _pair("kepler_pod_cpu", "A pod", OF_POD, _summed(labelled))


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
