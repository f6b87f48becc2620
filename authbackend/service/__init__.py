"""The processes of a replica: builds, starts, watches and stops them. May import every package but ``cli``."""
