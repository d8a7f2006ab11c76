"""Controllers above nodes."""
