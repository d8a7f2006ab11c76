"""The same decisions without an API server: snapshots, what-if, what would change the answer."""
