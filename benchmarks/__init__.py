"""Benchmarks: rounds fixed beforehand, arms interleaved, every run kept, paired ratios with 95 % intervals."""
