"""Certificate use cases on top of ``pki`` and ``postgres``: enroll, import, publish revocation lists."""
