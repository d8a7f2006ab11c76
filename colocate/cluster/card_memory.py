"""What a pod says that it will use of a GPU's memory, in its own or others' words.

Ours is the annotation `colocate.io/gpu-memory`, a quantity in bytes. HAMi's `nvidia.com/gpumem` and KAI's annotation
`gpu-memory` are numbers of MiB; Koordinator's `koordinator.sh/gpu-memory` is a quantity in bytes. Sources: HAMi
docs/config.md; KAI-Scheduler docs/gpu-sharing; Koordinator docs, fine-grained device scheduling. Shares of a card
(`gpumem-percentage`, `gpu-fraction`, `gpu-memory-ratio`) say nothing without knowing which card, and are not read.
"""

from __future__ import annotations

from collections.abc import Mapping

from colocate.objects import Pod
from colocate.units import MOST_BYTES, parse_quantity

ANNOTATION = "colocate.io/gpu-memory"
KAI_ANNOTATION = "gpu-memory"
HAMI, KOORDINATOR = "nvidia.com/gpumem", "koordinator.sh/gpu-memory"
MIB = 1 << 20


def declared_bytes(pod: Pod) -> int | None:
    """Bytes; None of a pod that says nothing. Raises ValueError naming what cannot be read."""
    annotations = pod.metadata.annotations
    for key, unit in ((ANNOTATION, 1), (KAI_ANNOTATION, MIB)):
        if key in annotations:
            return _bytes(f"the annotation {key}", annotations[key], unit)
    total = 0
    for container in pod.spec.containers:
        found = _of(container.resources.limits) or _of(container.resources.requests)
        total += found or 0
    return total or None


def _of(quantities: Mapping[str, str | float | int]) -> int | None:
    for key, unit in ((HAMI, MIB), (KOORDINATOR, 1)):
        if key in quantities:
            return _bytes(key, quantities[key], unit)
    return None


def _bytes(what: str, quantity: str | float, unit: int) -> int:
    try:
        found = int(parse_quantity(quantity)) * unit
    except ValueError as error:
        raise ValueError(f"{what}: {error}: write a quantity, e.g. {12288 if unit == MIB else '12Gi'}") from error
    if found <= 0:
        raise ValueError(f"{what}: {quantity} is no memory: write a quantity above 0")
    return min(found, MOST_BYTES)
