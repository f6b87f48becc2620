"""Benchmarks of authbackend against its references; not installed with it. Start with ``python -m benchmarks``."""
