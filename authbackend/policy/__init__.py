"""
Authorization decisions and their reasons: pure functions over values in memory.

No I/O, no clock, no framework; only the standard library is imported.
"""
