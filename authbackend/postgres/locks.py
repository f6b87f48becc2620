"""
The numbers of the advisory locks of this project, in one place so that none is used twice.

Not listed here: 724002, which ``change_prune`` in ``sql/`` takes so that one session prunes the change feed. 724003 is
also the first key of the two-key lock under which a revocation list is signed.
"""

MIGRATE = 724001
ENFORCE = 724003
APPLY = 724004
REPLICA = 724005
"""The first of two keys; the second stands for a replica that follows the database but cannot write its row."""
