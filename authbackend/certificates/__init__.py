"""What people do with certificates, over ``pki`` and ``postgres``: enroll, import, publish revocation lists."""
