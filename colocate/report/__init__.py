"""Outcomes to people: records, explanations, metrics, and the utilization evaluation report."""
