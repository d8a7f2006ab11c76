"""Gang scheduling: groups of pods that start all or none. Pure, but for `controller`, the shell."""
