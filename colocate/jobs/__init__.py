"""`colocate run` and the agent's socket: batch jobs that are children of their own caller."""
