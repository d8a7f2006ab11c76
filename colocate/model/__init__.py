"""Snapshot to Forecast: pure functions over arrays of all workloads at once."""
