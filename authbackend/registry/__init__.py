"""The copy of the registry that decisions are made from, in memory and on disk, and its follower."""
