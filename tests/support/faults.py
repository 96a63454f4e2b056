"""The list of faults."""

FAULTS = 32
