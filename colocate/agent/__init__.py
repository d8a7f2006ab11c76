"""The node manager as a program: the loop, the daemon around it, its socket, and what it knows of its jobs."""
