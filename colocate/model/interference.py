"""Effective machine utilization: how much of a machine's worth the services and the batch work got together.

Heracles (ISCA 2015): the service's load as a share of its peak plus the batch work as a share of what it does alone.
It may exceed 1 where the two complement each other.
"""

from __future__ import annotations


def effective_machine_utilization(
    service_rate: float, service_peak_rate: float, batch_rate: float, batch_alone_rate: float
) -> float | None:
    """service_rate / service_peak_rate + batch_rate / batch_alone_rate; None if either peak is unknown (<= 0)."""
    if service_peak_rate <= 0 or batch_alone_rate <= 0:
        return None
    return service_rate / service_peak_rate + batch_rate / batch_alone_rate


def machines_saved(machines: float, utilization_before: float, utilization_after: float) -> float | None:
    """N * (R2 - R1) / R2: machines that the same work no longer needs (Alibaba's co-location gain); None if R2 <= 0."""
    if utilization_after <= 0:
        return None
    return machines * (utilization_after - utilization_before) / utilization_after
