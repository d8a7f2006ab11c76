"""The demonstration of gang scheduling: a real API server, simulated nodes."""
