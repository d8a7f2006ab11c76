"""A real, small Kubernetes cluster on this machine: for demonstrations, tests and benchmarks."""
