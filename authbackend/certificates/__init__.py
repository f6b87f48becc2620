"""
What people and replicas do with certificates: issue them to devices, and sign and serve CRLs.

May import ``pki`` and ``postgres``, which may not import each other, and the packages below them.
"""
