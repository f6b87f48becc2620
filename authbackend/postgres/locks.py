"""
The advisory locks of this project, so that none is used for two things.

724002 (one session prunes the change feed) is taken by ``change_prune`` in ``sql/``; 724003 is that of enforcement,
alone in :mod:`authbackend.postgres.enforcement`, and as the first of two numbers where revocation lists are signed.
"""

MIGRATE = 724001
APPLY = 724004
