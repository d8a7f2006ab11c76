"""Which CPU lever serves this kernel: measure, judge, and the probe that is run."""
