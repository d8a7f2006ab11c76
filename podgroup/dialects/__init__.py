"""How pods say that they belong together."""
