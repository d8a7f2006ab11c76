"""Queues, fleets and other people's tables in simulated time: nothing here touches a node."""
