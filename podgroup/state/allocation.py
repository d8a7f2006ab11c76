"""A pod that holds room on a node, and how many such pods each selector counts there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from colocate.objects import LabelSelector
from podgroup.state.selectors import matches
from podgroup.state.shape import Shape

MAX_COUNTED = 64


class Holding(NamedTuple):
    """A pod that holds capacity on a node."""

    uid: str
    name: str
    namespace: str
    node: str
    shape: Shape
    labels: Mapping[str, str]
    leaving: bool = False
    """Being deleted: it holds its room, but spreads no more."""
    kept: bool = False
    """Room that is kept for a pod that is not there: nobody has taken it."""


class Counted(NamedTuple):
    """Which pods a selector counts: those that it selects in these namespaces (None: all)."""

    selector: str
    namespaces: tuple[str, ...] | None
    leaving: bool
    """Whether pods that are being deleted count."""


class Counts:
    """How many pods each selector counts on each node, and which of them a pod with certain labels may concern."""

    def __init__(self) -> None:
        self._known: dict[Counted, tuple[LabelSelector, npt.NDArray[np.int64]]] = {}
        self._by_label: dict[tuple[str, str] | None, list[Counted]] = {}
        """A label that a selector asks for -> what it counts; None for selectors that ask for none by name."""

    def get(self, counted: Counted) -> npt.NDArray[np.int64] | None:
        """The counts, if they are known."""
        known = self._known.get(counted)
        return None if known is None else known[1]

    def add(self, counted: Counted, selector: LabelSelector, counts: npt.NDArray[np.int64]) -> None:
        """Keep these; of too many the one that was asked for first goes, and is counted anew if need be."""
        if len(self._known) >= MAX_COUNTED:
            oldest = next(iter(self._known))
            label = _label_asked_for(self._known.pop(oldest)[0])
            self._by_label[label].remove(oldest)
            if not self._by_label[label]:
                del self._by_label[label]
        self._known[counted] = (selector, counts)
        self._by_label.setdefault(_label_asked_for(selector), []).append(counted)

    def concerning(self, labels: Mapping[str, str]) -> Iterator[tuple[Counted, LabelSelector, npt.NDArray[np.int64]]]:
        """What may count a pod with these labels."""
        for label in (None, *labels.items()):
            for counted in self._by_label.get(label, ()):
                yield counted, *self._known[counted]

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
        self._by_label.clear()


def _label_asked_for(selector: LabelSelector) -> tuple[str, str] | None:
    return next(iter(selector.match_labels.items()), None)


def selects(counted: Counted, selector: LabelSelector, holding: Holding) -> bool:
    """Whether a counter counts this pod."""
    if holding.leaving and not counted.leaving:
        return False
    if counted.namespaces is not None and holding.namespace not in counted.namespaces:
        return False
    return matches(selector, holding.labels)
