"""Run batch and AI jobs on the nodes of latency-sensitive services, without the services noticing."""

__version__ = "0.1.0"
