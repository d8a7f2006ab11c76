"""Gang scheduling: groups of pods that start all or none.

Data flows through the folders in this order:
controller/watches -> state -> queue -> solve -> commit -> controller/writes.
All but `controller`, `commands` and `demo` is pure. What users write and read is `dialects`' business, in which order
gangs and nodes are taken `policy`'s.
"""
