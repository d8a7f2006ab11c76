"""What the solver needs to know of a pod, so that equal pods are decided once: its shape.

Sources: KEP-753 (how sidecars and init containers add up), KEP-2837 (resources of the pod as a whole), KEP-688
(overhead), KEP-1287 (in-place resize), the scheduler's NodePorts, NodeAffinity, TaintToleration, InterPodAffinity,
PodTopologySpread and VolumeBinding plugins for what counts as a constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from colocate.objects import (
    Container,
    ContainerStatus,
    LabelRequirement,
    LabelSelector,
    NodeSelector,
    Pod,
    PodAffinityTerm,
    Quantities,
    Toleration,
    TopologySpreadConstraint,
)
from colocate.units import parse_quantity
from podgroup.state.selectors import matches, selector_keys, selector_text
from podgroup.state.volumes import Needs, Unbound

ALWAYS = "Always"
NO_KEYS: frozenset[str] = frozenset()
MOST = 2**53
"""No amount is larger: sums over all nodes must stay within 64 bits."""
MOST_OF_A_POD = 2**50
KNOWN_OPERATORS = frozenset({"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"})
Namespaces = Callable[[LabelSelector], "tuple[str, ...]"]
"""A selector of namespaces -> those whose labels it selects."""


class HostPort(NamedTuple):
    """A port of the node itself."""

    protocol: str
    ip: str
    port: int

    def conflicts(self, other: HostPort) -> bool:
        """Whether both cannot be on one node: the wildcard address takes the port on all."""
        same = self.protocol == other.protocol and self.port == other.port
        return same and (self.ip == other.ip or "0.0.0.0" in (self.ip, other.ip))


class Term(NamedTuple):
    """A required (anti-)affinity term, with the namespaces it looks at; None for all of them."""

    topology_key: str
    selector: LabelSelector | None
    namespaces: tuple[str, ...] | None

    @property
    def key(self) -> tuple[str, str, tuple[str, ...] | None]:
        """What two equal terms have in common, hashable."""
        return self.topology_key, selector_text(self.selector), self.namespaces

    def selects(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Whether a pod with these labels is one of those it looks at."""
        return (self.namespaces is None or namespace in self.namespaces) and matches(self.selector, labels)


def all_of(terms: Sequence[Term]) -> Term:
    """A term that selects the pods which every one of these selects: only such a pod satisfies affinity to several."""
    if len(terms) == 1:
        return terms[0]
    requirements: list[LabelRequirement] = []
    namespaces: tuple[str, ...] | None = None
    for term in terms:
        if term.selector is None:
            return term
        labels = sorted(term.selector.match_labels.items())
        requirements += [LabelRequirement(key=k, operator="In", values=[v]) for k, v in labels]
        requirements += term.selector.match_expressions
        if term.namespaces is not None:
            namespaces = term.namespaces if namespaces is None else tuple(n for n in namespaces if n in term.namespaces)
    return Term(terms[0].topology_key, LabelSelector(match_expressions=requirements), namespaces)


class Shape(msgspec.Struct, frozen=True, weakref=True):
    """Everything of a pod that decides where it can go, but its labels."""

    requests: tuple[tuple[str, int], ...]
    """(resource, amount), sorted; cpu in millicores, all others in units, rounded up; `pods` is 1."""
    node_selector: dict[str, str] = {}
    node_affinity: NodeSelector | None = None
    volume_affinity: tuple[NodeSelector, ...] = ()
    unbound: tuple[Unbound, ...] = ()
    """Claims whose volumes are found or made once it has a node."""
    shared_volumes: tuple[tuple[str, str], ...] = ()
    """(resource, volume) of attachments that other pods of its node may have made already."""
    alone: tuple[str, ...] = ()
    """Claims that only one of those that wait with them can have."""
    tolerations: tuple[Toleration, ...] = ()
    host_ports: tuple[HostPort, ...] = ()
    affinity: tuple[Term, ...] = ()
    anti_affinity: tuple[Term, ...] = ()
    spread: tuple[TopologySpreadConstraint, ...] = ()
    unsupported: str = ""
    """The constraint that we do not know: such a pod is never placed."""

    @property
    def selector_keys(self) -> frozenset[str]:
        """Label keys that its own terms look at."""
        if not (self.affinity or self.anti_affinity or self.spread):
            return NO_KEYS
        selectors = [t.selector for t in (*self.affinity, *self.anti_affinity)] + [
            s.label_selector for s in self.spread
        ]
        found = {key for s in self.spread for key in s.match_label_keys}
        for selector in filter(None, selectors):
            found |= selector_keys(selector)
        return frozenset(found)


@lru_cache(maxsize=4096)  # a cluster's pods ask for the same few amounts, and exact fractions are slow
def _amount(resource: str, text: str | float) -> int:
    value = parse_quantity(text)
    if not 0 <= value <= MOST:
        raise ValueError(f"{resource} {text!r} is not an amount that a node could have")
    return math.ceil(value * 1000) if resource == "cpu" else math.ceil(value)


def resized(pod: Pod) -> tuple[object, ...]:
    """What of a pod's status decides what it is accounted for while it is resized in place."""
    statuses = (*pod.status.container_statuses, *pod.status.init_container_statuses)
    told = tuple((s.name, s.allocated_resources, s.resources) for s in statuses if s.allocated_resources or _told(s))
    return (told, _infeasible(pod)) if told else ()


def _told(status: ContainerStatus) -> bool:
    return bool(status.resources.requests or status.resources.limits)


def _infeasible(pod: Pod) -> bool:
    """Whether a resize was refused for good: what it asks for will never be in force."""
    return any(c.type == "PodResizePending" and c.reason == "Infeasible" for c in pod.status.conditions)


def _asked(container: Container, pod: Pod, statuses: Mapping[str, ContainerStatus]) -> dict[str, int]:
    """What one container asks for, or while it is resized the most of that, of what is set aside and in force."""
    asked = amounts({**container.resources.limits, **container.resources.requests})
    status = statuses.get(container.name)
    if status is None:
        return asked
    if _told(status) and _infeasible(pod):
        asked = {}
    for more in (status.allocated_resources, status.resources.requests):
        for name, amount in amounts(more).items():
            asked[name] = max(asked.get(name, 0), amount)
    return asked


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, 0) + amount


def amounts(quantities: Quantities) -> dict[str, int]:
    """Resource -> whole units (millicores for cpu), rounded up. Raises ValueError."""
    return {name: _amount(name, text) for name, text in quantities.items()}


def requests_of(pod: Pod) -> dict[str, int]:
    """What the scheduler accounts for a pod: resource -> units (millicores for cpu), with `pods: 1`.

    The larger of all containers and sidecars together, and of each init container with the sidecars started before it;
    the pod's own resources replace the sum for what they name; overhead is added. Raises ValueError.
    """
    running: dict[str, int] = {}
    statuses = {s.name: s for s in pod.status.container_statuses}
    for container in pod.spec.containers:
        _add(running, _asked(container, pod, statuses))
    sidecars: dict[str, int] = {}
    starting: dict[str, int] = {}
    statuses = {s.name: s for s in pod.status.init_container_statuses}
    for container in pod.spec.init_containers:
        sidecar = container.restart_policy == ALWAYS
        asked = _asked(container, pod, statuses if sidecar else {})
        if sidecar:
            _add(sidecars, asked)
        else:
            _add(asked, {name: sidecars[name] for name in sidecars})
            starting = {name: max(asked.get(name, 0), starting.get(name, 0)) for name in {**asked, **starting}}
    _add(running, sidecars)
    total = {name: max(running.get(name, 0), starting.get(name, 0)) for name in {**running, **starting}}
    whole = pod.spec.resources
    total.update({name: _amount(name, text) for name, text in {**whole.limits, **whole.requests}.items()})
    _add(total, amounts(pod.spec.overhead))
    for name, amount in total.items():
        if amount > MOST_OF_A_POD:
            raise ValueError(f"{amount} of {name} in all its containers is not an amount that a node could have")
    return {**{name: amount for name, amount in total.items() if amount}, "pods": 1}


def _terms(terms: Iterable[PodAffinityTerm], namespace: str, selected: Namespaces) -> tuple[Term, ...]:
    """Source: framework.newAffinityTerm; of no namespaces and no selector the pod's own is meant."""
    found = []
    for term in terms:
        namespaces: tuple[str, ...] | None = tuple(sorted(term.namespaces))
        if term.namespace_selector is not None:
            everywhere = not (term.namespace_selector.match_labels or term.namespace_selector.match_expressions)
            more = () if everywhere else selected(term.namespace_selector)
            namespaces = None if everywhere else tuple(sorted({*term.namespaces, *more}))
        elif not namespaces:
            namespaces = (namespace,)
        found.append(Term(term.topology_key, term.label_selector, namespaces))
    return tuple(found)


def selects_namespaces(pod: Pod) -> bool:
    """Whether what its terms look at depends on labels of namespaces."""
    return any(t.namespace_selector is not None for t in _pod_terms(pod))


def _pod_terms(pod: Pod) -> list[PodAffinityTerm]:
    affinity = pod.spec.affinity
    if affinity is None:
        return []
    kinds = (affinity.pod_affinity, affinity.pod_anti_affinity)
    return [term for kind in kinds if kind is not None for term in kind.required]


def _unsupported(pod: Pod) -> str:
    affinity = pod.spec.affinity
    if pod.spec.resource_claims:
        return "resourceClaims (dynamic resource allocation)"
    required = affinity.node_affinity.required if affinity and affinity.node_affinity else None
    for node_term in required.node_selector_terms if required else []:
        for requirement in (*node_term.match_expressions, *node_term.match_fields):
            if requirement.operator not in KNOWN_OPERATORS:
                return f"nodeAffinity operator {requirement.operator}"
        if any(field.key != "metadata.name" for field in node_term.match_fields):
            return "nodeAffinity matchFields other than metadata.name"
    for toleration in pod.spec.tolerations:
        if toleration.operator not in ("", "Equal", "Exists"):
            return f"toleration operator {toleration.operator}"
    return ""


def _hosts(pod: Pod) -> tuple[HostPort, ...]:
    containers = [*pod.spec.containers, *(c for c in pod.spec.init_containers if c.restart_policy == ALWAYS)]
    found = {
        HostPort(port.protocol or "TCP", port.host_ip or "0.0.0.0", port.host_port)
        for container in containers
        for port in container.ports
        if port.host_port
    }
    return tuple(sorted(found))


def shape_of(pod: Pod, needs: Needs | None = None, namespaces: Namespaces = lambda _selector: ()) -> Shape:
    """The shape of a pod. An impossible quantity makes it unsupported; it never raises.

    `needs` is what its claims ask for; without it no claims are known.
    """
    if needs is None:
        claim = next(filter(None, (v.claim(pod.metadata.name) for v in pod.spec.volumes)), "")
        needs = Needs(refused=f"volume claim {claim}: no claims are known here" if claim else "")
    try:
        amounts_of_it = requests_of(pod)
        unsupported = _unsupported(pod) or needs.refused
    except ValueError as error:
        amounts_of_it, unsupported = {"pods": 1}, str(error)
    affinity = pod.spec.affinity
    node = affinity.node_affinity if affinity else None
    beside = affinity.pod_affinity if affinity else None
    apart = affinity.pod_anti_affinity if affinity else None
    return Shape(
        requests=tuple(sorted({**amounts_of_it, **dict(needs.attached)}.items())),
        node_selector=pod.spec.node_selector,
        node_affinity=node.required if node else None,
        volume_affinity=needs.reach,
        unbound=needs.unbound,
        shared_volumes=needs.shared,
        alone=needs.alone,
        tolerations=tuple(pod.spec.tolerations),
        host_ports=_hosts(pod),
        affinity=_terms(beside.required if beside else (), pod.metadata.namespace, namespaces),
        anti_affinity=_terms(apart.required if apart else (), pod.metadata.namespace, namespaces),
        spread=tuple(s for s in pod.spec.topology_spread_constraints if s.when_unsatisfiable == "DoNotSchedule"),
        unsupported=unsupported,
    )
