"""Where a gang can go, and why not."""
