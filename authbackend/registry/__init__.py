"""
The copy of the registry that decisions are made from, in memory and on disk, and the follower that keeps it up to date.

The database is behind protocols that ``postgres`` implements; of the other packages, only ``policy`` may be imported.
"""
