"""An Event as it is written (core/v1): what `kubectl describe` shows below an object."""

from __future__ import annotations

import time
from typing import Any

from colocate.objects import ObjectMeta
from colocate.units import time_text

MESSAGE_CHARACTERS = 1024
"""The API server takes no more."""


def event_about(
    api: str, kind: str, meta: ObjectMeta, reason: str, message: str, component: str, *, warning: bool
) -> dict[str, Any]:
    """The body of one Event, of now, about an object of this kind."""
    now = time_text(time.time())
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{meta.name[:200]}.", "namespace": meta.namespace},
        "involvedObject": {
            "apiVersion": api,
            "kind": kind,
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
        },
        "reason": reason,
        "message": message[:MESSAGE_CHARACTERS],
        "type": "Warning" if warning else "Normal",
        "source": {"component": component},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
