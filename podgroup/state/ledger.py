"""The one ledger of who holds what on which node: arrays over all nodes, kept up to date pod by pod.

Every placement is decided on it, so groups can never hold each other's room. Nodes are rows, sorted by name, so that a
decision does not depend on the order in which the API server told of them. Label values and taints are codes, filters
are array operations; no loop is over pods x nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from colocate.objects import LabelSelector, Node, NodeSelector, NodeSelectorTerm, Taint, Toleration
from podgroup.policy import DEFAULT, Policy
from podgroup.state.allocation import Counted, Counts, Holding, selects
from podgroup.state.node_budgets import Left, NodeSetBudget
from podgroup.state.selectors import selector_keys, selector_text
from podgroup.state.shape import HostPort, Shape, Term, amounts
from podgroup.state.storage import Storage
from podgroup.state.volumes import ATTACHABLE

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

UNSCHEDULABLE = Taint(key="node.kubernetes.io/unschedulable", effect="NoSchedule")
NOT_READY = Taint(key="node.kubernetes.io/not-ready", effect="NoSchedule")
MAX_STANDING = 1024
UNLIMITED = 2**31
"""Attachments to a node that has no limit."""
REPELLING = ("NoSchedule", "NoExecute")


def tolerates(tolerations: Iterable[Toleration], taint: Taint) -> bool:
    """Whether any of them tolerates the taint (core/v1 helper ToleratesTaint)."""
    return any(
        (not t.effect or t.effect == taint.effect)
        and (not t.key or t.key == taint.key)
        and (t.operator == "Exists" or (bool(t.key) and t.value == taint.value))
        for t in tolerations
    )


_OF_NODES = (
    "names", "rows", "_nodes", "columns", "allocatable", "used", "ready", "_labels", "_static", "_selected", "_counts",
    "_taint_codes", "_taint_sets",
)  # fmt: skip
"""What of a ledger depends on which nodes there are."""


class Column:
    """One label of all nodes as codes: -1 where a node does not have it."""

    def __init__(self, values: Iterable[str | None]) -> None:
        self.code_of: dict[str, int] = {}
        self.codes: Ints = np.fromiter((self._code(v) for v in values), dtype=np.int64)
        self._ranks: Ints = np.zeros(0, dtype=np.int64)

    def _code(self, value: str | None) -> int:
        return -1 if value is None else self.code_of.setdefault(value, len(self.code_of))

    def set(self, row: int, value: str | None) -> None:
        """Another value of one node."""
        self.codes[row] = self._code(value)

    @property
    def ranks(self) -> Ints:
        """Code -> rank of its value: codes depend on the order in which values were seen, ranks do not."""
        if len(self._ranks) != len(self.code_of):
            values = list(self.code_of)
            self._ranks = np.empty(len(values), dtype=np.int64)
            self._ranks[sorted(range(len(values)), key=values.__getitem__)] = np.arange(len(values))
        return self._ranks

    def holds(self, operator: str, values: list[str]) -> Mask:
        """The nodes for which a requirement of this label holds."""
        if operator == "Exists":
            return self.codes >= 0
        if operator == "DoesNotExist":
            return self.codes < 0
        if operator in ("Gt", "Lt"):
            return self._compared(operator, values)
        wanted = [self.code_of[v] for v in values if v in self.code_of]
        found = np.isin(self.codes, wanted)
        return found if operator == "In" else ~found

    def _compared(self, operator: str, values: list[str]) -> Mask:
        try:
            bound = int(values[0])
        except (ValueError, IndexError):
            return np.zeros(len(self.codes), dtype=bool)
        good = []
        for value, code in self.code_of.items():
            if value.lstrip("-").isdigit() and (int(value) > bound if operator == "Gt" else int(value) < bound):
                good.append(code)
        return np.isin(self.codes, good)


class Ledger:
    """All nodes, and what is held on each."""

    def __init__(self, storage: Storage | None = None, policy: Policy = DEFAULT) -> None:
        self.storage, self.policy = storage or Storage(), policy
        self.names: list[str] = []
        self.rows: dict[str, int] = {}
        self.columns: dict[str, int] = {"cpu": 0, "memory": 1, "pods": 2}
        """Resource -> column of `allocatable` and `used`."""
        self.allocatable: Ints = np.zeros((0, 3), dtype=np.int64)
        self.used: Ints = np.zeros((0, 3), dtype=np.int64)
        self.ready: Mask = np.zeros(0, dtype=bool)
        self.holdings: dict[str, Holding] = {}
        self._nodes: dict[str, Node] = {}
        self._on: dict[str, set[str]] = {}
        self._labelled: dict[tuple[str, str], set[str]] = {}
        """(label, value) -> uids of the pods that carry it."""
        self._labels: dict[str, Column] = {}
        self._taint_codes: Ints | None = None
        self._taint_sets: list[tuple[Taint, ...]] = []
        self._static: dict[int, tuple[Shape, Mask]] = {}
        self._selected: dict[int, tuple[NodeSelector | LabelSelector, Mask]] = {}
        self._limits: dict[str, dict[str, int]] = {}
        """Node -> resource -> how many attachments its pods can have."""
        self._shared: dict[tuple[str, str], dict[str, int]] = {}
        """(resource, volume) -> node -> how many of its pods share it: it is attached there once."""
        self._counts = Counts()
        self._budgets: dict[str, tuple[NodeSetBudget, int]] = {}
        """Name -> budget, and its amount in whole units."""
        self._apart: dict[tuple[object, ...], tuple[Term, dict[str, int]]] = {}
        self._ports: dict[HostPort, dict[str, int]] = {}

    # nodes

    def set_node(self, node: Node) -> bool:
        """A node is there, or has changed; False if nothing changed that matters here."""
        name = node.metadata.name
        before = self._nodes.get(name)
        self._nodes[name] = node
        if before is None:
            self._insert(name)
            self._set_capacity(self.rows[name], node)
            return True
        relabelled = before.metadata.labels != node.metadata.labels
        if not relabelled and before.spec == node.spec and before.status == node.status:
            return False
        row = self.rows[name]
        if before.status != node.status:
            self._set_capacity(row, node)
        for key, column in self._labels.items() if relabelled else ():
            column.set(row, node.metadata.labels.get(key))
        if before.spec != node.spec:
            self._taint_codes = None
        self._static.clear()
        if relabelled:
            self._selected.clear()
        return True

    def remove_node(self, name: str) -> None:
        """A node has gone; what it held is forgotten as soon as its pods are."""
        if self._nodes.pop(name, None) is None:
            return
        row = self.rows[name]
        self.names.pop(row)
        self.allocatable, self.used = np.delete(self.allocatable, row, 0), np.delete(self.used, row, 0)
        self.ready = np.delete(self.ready, row)
        self._reindex()

    def node(self, name: str) -> Node | None:
        """The node of that name."""
        return self._nodes.get(name)

    def nodes(self) -> list[Node]:
        """All of them, by name."""
        return [self._nodes[name] for name in self.names]

    def _insert(self, name: str) -> None:
        row = bisect_left(self.names, name)
        self.names.insert(row, name)
        width = len(self.columns)
        self.allocatable = np.insert(self.allocatable, row, np.zeros(width, dtype=np.int64), 0)
        self.used = np.insert(self.used, row, np.zeros(width, dtype=np.int64), 0)
        self.ready = np.insert(self.ready, row, False)
        self._reindex()
        for uid in self._on.get(name, ()):
            self._account(self.used[row], self.holdings[uid].shape, 1)
        for (resource, _), nodes in self._shared.items():
            self.used[row, self.columns[resource]] += name in nodes

    def _reindex(self) -> None:
        self.rows = {name: row for row, name in enumerate(self.names)}
        self._labels.clear()
        self._counts.clear()
        self._static.clear()
        self._selected.clear()
        self._taint_codes = None

    def _set_capacity(self, row: int, node: Node) -> None:
        try:
            offered = amounts(node.status.allocatable)
        except ValueError:
            offered = {}
        for resource in offered:
            self.column(resource)
        self.allocatable[row] = 0
        for resource, amount in offered.items():
            self.allocatable[row, self.columns[resource]] = amount
        for resource, column in self.columns.items():
            if resource.startswith(ATTACHABLE):
                self.allocatable[row, column] = self._limits.get(node.metadata.name, {}).get(resource, UNLIMITED)
        readiness = [c.status for c in node.status.conditions if c.type == "Ready"]
        self.ready[row] = readiness in ([], ["True"])

    def column(self, resource: str) -> int:
        """The column of a resource, made if it is new."""
        if resource not in self.columns:
            self.columns[resource] = len(self.columns)
            nothing = np.zeros((len(self.names), 1), dtype=np.int64)
            offered = nothing
            if resource.startswith(ATTACHABLE):
                limits = [[self._limits.get(n, {}).get(resource, UNLIMITED)] for n in self.names]
                offered = np.array(limits, dtype=np.int64).reshape(-1, 1)
            self.allocatable, self.used = np.hstack([self.allocatable, offered]), np.hstack([self.used, nothing])
        return self.columns[resource]

    def set_limits(self, name: str, limits: dict[str, int]) -> bool:
        """How many attachments the pods of a node can have, by resource; False if nothing has changed."""
        if self._limits.get(name, {}) == limits:
            return False
        self._limits[name] = limits
        for resource in limits:
            self.column(resource)
        if name in self.rows:
            self._set_capacity(self.rows[name], self._nodes[name])
        return True

    # pods

    def hold(self, holding: Holding) -> None:
        """A pod holds its room on a node; held anew, what it held before is let go."""
        if self.holdings.get(holding.uid) == holding:
            return
        self.release(holding.uid)
        self.holdings[holding.uid] = holding
        self._on.setdefault(holding.node, set()).add(holding.uid)
        self._change(holding, 1)

    def release(self, uid: str) -> Holding | None:
        """A pod holds nothing any more."""
        holding = self.holdings.pop(uid, None)
        if holding is not None:
            self._on[holding.node].discard(uid)
            if not self._on[holding.node]:
                del self._on[holding.node]
            self._change(holding, -1)
        return holding

    @contextmanager
    def without(self, uids: Iterable[str]) -> Iterator[None]:
        """The ledger as if these held nothing; as before afterwards."""
        gone = [h for uid in uids if (h := self.release(uid)) is not None]
        try:
            yield
        finally:
            for holding in gone:
                self.hold(holding)

    @contextmanager
    def empty(self) -> Iterator[None]:
        """The ledger as if nothing were held anywhere; as before afterwards."""
        kept = self.used, self.holdings, self._on, self._labelled, self._counts, self._apart, self._ports, self._shared
        self.used, self.holdings, self._on = np.zeros_like(self.used), {}, {}
        self._labelled, self._counts, self._apart, self._ports, self._shared = {}, Counts(), {}, {}, {}
        try:
            yield
        finally:
            (
                self.used, self.holdings, self._on, self._labelled,
                self._counts, self._apart, self._ports, self._shared,
            ) = kept  # fmt: skip

    @contextmanager
    def as_if(self, *nodes: Node) -> Iterator[None]:
        """The ledger as if these nodes were so, or there; as before afterwards, with all that it had worked out."""
        kept = {name: getattr(self, name) for name in _OF_NODES}
        self.names, self._nodes, self.columns = list(self.names), dict(self._nodes), dict(self.columns)
        self.allocatable, self.used, self.ready = self.allocatable.copy(), self.used.copy(), self.ready.copy()
        self._labels, self._static, self._selected, self._counts = {}, {}, {}, Counts()
        self._taint_codes = None
        try:
            new = [node for node in nodes if node.metadata.name not in self._nodes]
            self.names += [node.metadata.name for node in new]
            more = np.zeros((len(new), len(self.columns)), dtype=np.int64)
            self.allocatable, self.used = np.vstack([self.allocatable, more]), np.vstack([self.used, more])
            self.ready = np.append(self.ready, np.ones(len(new), dtype=bool))
            self.rows = {name: row for row, name in enumerate(self.names)}
            for node in nodes:
                self._nodes[node.metadata.name] = node
                self._set_capacity(self.rows[node.metadata.name], node)
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    @contextmanager
    def using(self, used: Ints) -> Iterator[None]:
        """The ledger as if so much were used on each node, by whomever; as before afterwards."""
        kept, self.used = self.used, used
        try:
            yield
        finally:
            self.used = kept

    @contextmanager
    def with_also(self, holdings: Iterable[Holding]) -> Iterator[None]:
        """The ledger as if these were held too; as before afterwards."""
        more = [h for h in holdings if h.uid not in self.holdings]
        for holding in more:
            self.hold(holding)
        try:
            yield
        finally:
            for holding in more:
                self.release(holding.uid)

    @contextmanager
    def as_if_budget(self, name: str, amount: int) -> Iterator[None]:
        """The ledger as if a budget were so large; as before afterwards."""
        kept = self._budgets[name]
        self._budgets[name] = (kept[0], amount)
        try:
            yield
        finally:
            self._budgets[name] = kept

    def on(self, node: str) -> list[Holding]:
        """What is held on a node, by uid."""
        return [self.holdings[uid] for uid in sorted(self._on.get(node, ()))]

    def _change(self, holding: Holding, sign: int) -> None:
        row = self.rows.get(holding.node)
        for item in holding.labels.items():
            labelled = self._labelled.setdefault(item, set())
            labelled.add(holding.uid) if sign > 0 else labelled.discard(holding.uid)
            if not labelled:
                del self._labelled[item]
        for resource, _ in holding.shape.requests:
            self.column(resource)
        if row is not None:
            self._account(self.used[row], holding.shape, sign)
            for counted, selector, counts in self._counts.concerning(holding.labels):
                if selects(counted, selector, holding):
                    counts[row] += sign
        for volume in holding.shape.shared_volumes:
            nodes = self._shared.setdefault(volume, {})
            before = holding.node in nodes
            _tally(nodes, holding.node, sign)
            if row is not None:
                self.used[row, self.column(volume[0])] += (holding.node in nodes) - before
            if not nodes:
                del self._shared[volume]
        for term in holding.shape.anti_affinity:
            nodes = self._apart.setdefault(term.key, (term, {}))[1]
            _tally(nodes, holding.node, sign)
            if not nodes:
                del self._apart[term.key]
        for port in holding.shape.host_ports:
            nodes = self._ports.setdefault(port, {})
            _tally(nodes, holding.node, sign)
            if not nodes:
                del self._ports[port]

    def _account(self, row: Ints, shape: Shape, sign: int) -> None:
        for resource, amount in shape.requests:
            row[self.columns[resource]] += sign * amount

    # what filters look at

    def label(self, key: str) -> Column:
        """One label of all nodes."""
        if key not in self._labels:
            self._labels[key] = Column(self._nodes[name].metadata.labels.get(key) for name in self.names)
        return self._labels[key]

    def tolerated(self, tolerations: Iterable[Toleration]) -> Mask:
        """The nodes whose every repelling taint is tolerated; `unschedulable` is one of them."""
        if self._taint_codes is None:
            sets: dict[tuple[Taint, ...], int] = {}
            codes = []
            for name in self.names:
                spec = self._nodes[name].spec
                taints = [t for t in spec.taints if t.effect in REPELLING]
                if spec.unschedulable:
                    taints.append(UNSCHEDULABLE)
                codes.append(sets.setdefault(tuple(taints), len(sets)))
            self._taint_codes, self._taint_sets = np.array(codes, dtype=np.int64), list(sets)
        wanted = tuple(tolerations)
        good = [i for i, taints in enumerate(self._taint_sets) if all(tolerates(wanted, t) for t in taints)]
        return np.isin(self._taint_codes, good)

    def awake(self, tolerations: Iterable[Toleration]) -> Mask:
        """The nodes that are ready; all, for a pod that tolerates the taint of those that are not."""
        if tolerates(tolerations, NOT_READY):
            return np.ones(len(self.names), dtype=bool)
        return self.ready

    def selected(self, selector: NodeSelector) -> Mask:
        """The nodes that a node selector selects: any of its terms. Kept: copy before changing it."""
        cached = self._selected.get(id(selector))
        if cached is not None and cached[0] is selector:
            return cached[1]
        found = np.zeros(len(self.names), dtype=bool)
        for term in selector.node_selector_terms:
            if term.match_expressions or term.match_fields:
                found |= self._term_holds(term)
        if len(self._selected) >= MAX_STANDING * 8:
            self._selected.clear()
        self._selected[id(selector)] = (selector, found)
        return found

    def _term_holds(self, term: NodeSelectorTerm) -> Mask:
        found = np.ones(len(self.names), dtype=bool)
        for requirement in term.match_expressions:
            found &= self.label(requirement.key).holds(requirement.operator, requirement.values)
        for field in term.match_fields:
            named = np.isin(np.arange(len(self.names)), [self.rows[v] for v in field.values if v in self.rows])
            found &= named if field.operator == "In" else ~named
        return found

    def chosen(self, shape: Shape) -> Mask:
        """The nodes that a pod's node selector and required node affinity choose."""
        found = np.ones(len(self.names), dtype=bool)
        for key, value in shape.node_selector.items():
            found &= self.label(key).holds("In", [value])
        return found if shape.node_affinity is None else found & self.selected(shape.node_affinity)

    def standing(self, shape: Shape) -> Mask:
        """The nodes that pass the filters that no pod changes: readiness, taints, selectors, affinity, volumes."""
        cached = self._static.get(id(shape))
        if cached is not None and cached[0] is shape:
            return cached[1]
        found = self.awake(shape.tolerations) & self.tolerated(shape.tolerations) & self.chosen(shape)
        for selector in shape.volume_affinity:
            found &= self.selected(selector)
        if len(self._static) >= MAX_STANDING:
            self._static.clear()
        self._static[id(shape)] = (shape, found)
        return found

    def counts(self, term: Term, leaving: bool = True) -> Ints:
        """How many pods a term selects on each node. The array is the ledger's own: copy before changing it."""
        if term.selector is None:
            return np.zeros(len(self.names), dtype=np.int64)
        counted = Counted(selector_text(term.selector), term.namespaces, leaving)
        found = self._counts.get(counted)
        if found is None:
            counts = np.zeros(len(self.names), dtype=np.int64)
            for holding in self._candidates(term.selector):
                if holding.node in self.rows and selects(counted, term.selector, holding):
                    counts[self.rows[holding.node]] += 1
            self._counts.add(counted, term.selector, counts)
            return counts
        return found

    def _candidates(self, selector: LabelSelector) -> Iterable[Holding]:
        """The pods that a selector may select: those with the rarest of the labels that it asks for."""
        if not selector.match_labels:
            return self.holdings.values()
        uids = min((self._labelled.get(item, set()) for item in selector.match_labels.items()), key=len)
        return [self.holdings[uid] for uid in uids]

    def repelling_terms(self, namespace: str, labels: Mapping[str, str]) -> list[tuple[Term, list[str]]]:
        """Anti-affinity terms of pods that are there and select these labels, with the nodes of those pods."""
        return [(term, sorted(nodes)) for term, nodes in self._apart.values() if term.selects(namespace, labels)]

    @property
    def repelling_keys(self) -> frozenset[str]:
        """The label keys that anti-affinity terms of pods that are there look at."""
        return frozenset(
            key for term, _ in self._apart.values() if term.selector for key in selector_keys(term.selector)
        )

    def sharing(self, volume: tuple[str, str]) -> Iterable[str]:
        """The nodes to which a volume that pods share is attached."""
        return self._shared.get(volume, ())

    def ports_taken(self, ports: Iterable[HostPort]) -> Mask:
        """The nodes on which one of these ports is taken."""
        taken = np.zeros(len(self.names), dtype=bool)
        for port in ports:
            for held, nodes in self._ports.items():
                if port.conflicts(held):
                    taken[[self.rows[n] for n in nodes if n in self.rows]] = True
        return taken

    # sets of nodes

    def set_budget(self, budget: NodeSetBudget) -> None:
        """A budget of a set of nodes as it is now. Raises ValueError for an amount that is none."""
        self.column(budget.resource)
        self._budgets[budget.name] = (budget, amounts({budget.resource: budget.amount})[budget.resource])

    def remove_budget(self, name: str) -> None:
        """A budget that is gone."""
        self._budgets.pop(name, None)

    def budgets(self) -> list[NodeSetBudget]:
        """All of them, by name."""
        return [self._budgets[name][0] for name in sorted(self._budgets)]

    def budgeted(self, shape: Shape) -> bool:
        """Whether a pod of this shape counts for a budget."""
        asked = {resource for resource, _ in shape.requests}
        return any(budget.resource in asked for budget, _ in self._budgets.values())

    def left_of(self, resources: Container[str], used: Ints | None = None) -> list[Left]:
        """What is left of the budgets of these resources, by name; `used` as of a trial."""
        found = []
        for name in sorted(self._budgets):
            budget, amount = self._budgets[name]
            if budget.resource in resources:
                nodes, column = self._in_budget(budget), self.columns[budget.resource]
                spent = int((self.used if used is None else used)[nodes, column].sum())
                spent += budget.each_node * int(nodes.sum())
                found.append(Left(name, budget.resource, nodes, amount, amount - spent))
        return found

    def _in_budget(self, budget: NodeSetBudget) -> Mask:
        selector = budget.node_selector
        cached = self._selected.get(id(selector))
        if cached is not None and cached[0] is selector:
            return cached[1]
        found = np.ones(len(self.names), dtype=bool)
        for key, value in selector.match_labels.items():
            found &= self.label(key).holds("In", [value])
        for requirement in selector.match_expressions:
            found &= self.label(requirement.key).holds(requirement.operator, requirement.values)
        self._selected[id(selector)] = (selector, found)
        return found

    @property
    def free(self) -> Ints:
        """What is left, nodes x resources; below 0 where a node shrank under its pods."""
        return self.allocatable - self.used


def _tally(nodes: dict[str, int], node: str, sign: int) -> None:
    nodes[node] = nodes.get(node, 0) + sign
    if not nodes[node]:
        del nodes[node]
