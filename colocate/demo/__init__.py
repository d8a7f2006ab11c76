"""The demonstration: a real service, an open-loop load, a real training job, and four ways to run them together."""
