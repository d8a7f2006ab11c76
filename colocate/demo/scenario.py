"""What both forms of the demonstration share, the real and the simulated one: the node, its pods, and the policy."""

from __future__ import annotations

from colocate.policy.schema import CpuPolicy, MemoryPolicy, PolicySpec

MIB = 1 << 20
NODE_BYTES = 1 << 30
JOB_GROWTH_BYTES = 72 * MIB
"""Of a training job's memory in a second, if it has its CPU for itself."""
JOB_MOST_BYTES = 560 * MIB
"""If nothing stops it: two of them do not fit beside the service."""
CHECKPOINT_SECONDS = 10.0
"""How often a job saves its state unasked."""
RESTART_SECONDS = 1.0
"""How long a job controller takes to start what has died again; the same in every arm."""
BURSTABLE_SCORE, BESTEFFORT_SCORE = 600, 1000
"""oom_score_adj as kubelet sets it (pkg/kubelet/qos/policy.go): of a pod that requests 40 % of the memory; of none."""
WATCH_SECONDS = 0.25
SPEC = PolicySpec(
    tick=0.5,
    cpu=CpuPolicy(hold_down=2.0),
    memory=MemoryPolicy(crawl=1.0, calm=3.0, checkpoint_deadline=3.0, termination_grace=2.0),
)
"""Faster than the defaults, for an arm is a quarter of a minute; the report names what differs."""
