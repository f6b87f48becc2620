"""
The advisory locks of this project, so that none is used for two things.

724002 (one session prunes the change feed) is taken by ``change_prune`` in ``sql/``; 724003 is also the first of two
numbers where revocation lists are signed.
"""

MIGRATE = 724001
ENFORCE = 724003
APPLY = 724004
REPLICA = 724005
"""The first of two numbers; the second is that of a replica which follows and cannot announce itself."""
