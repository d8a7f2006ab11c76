"""A graphics card that is not there: processes share it, and its queues run on when a process is frozen."""
