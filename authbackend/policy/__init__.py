"""
What is allowed, and why: pure functions over values that are already in memory.

No I/O, no clock, no framework; only the standard library is imported.
"""
