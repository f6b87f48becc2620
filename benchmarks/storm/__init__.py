"""
Measures connection storms: a whole fleet reconnects to a real RabbitMQ 4.3, with different authorization backends.

Run ``python -m benchmarks.storm --help``, or call :func:`run`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.namespaces import run_inside
from benchmarks.storm.options import Options

__all__ = ["Options", "run"]


def run(options: Options | None = None) -> dict[str, Any]:
    """
    Run the benchmark and return its result for JSON.

    Raises:
        CannotRun: It could not run; what failed is on standard error.
    """
    return run_inside("benchmarks.storm.run", (options or Options()).as_dict())
