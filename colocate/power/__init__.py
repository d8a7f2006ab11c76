"""Watts of jobs: sweeps of caps from files, and what the models of `model/power.py` make of them."""
