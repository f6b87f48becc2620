"""
X.509: authorities, certificates and CRLs, and ``crl sync``.

The only package that imports ``cryptography``; it uses neither the database nor the settings.
"""
