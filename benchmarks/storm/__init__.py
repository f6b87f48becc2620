"""
The connection storm: a whole fleet reconnects to a real RabbitMQ 4.3 at once, with several authorization backends.

``python -m benchmarks.storm --help``; from a program: :func:`run`.
"""

from benchmarks.storm.options import Options
from benchmarks.storm.outside import run

__all__ = ["Options", "run"]
