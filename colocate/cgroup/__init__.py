"""The kernel's facts: the file port, the hierarchies, walking them, and v1's names; knows nothing of laws."""
