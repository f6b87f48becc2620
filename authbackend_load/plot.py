"""Draws the result of a load test as a PNG; needs matplotlib, which is optional."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from authbackend_load.plan import LoadError
from authbackend_load.record import LATENCIES


def require() -> None:
    """
    Check for matplotlib, before a long run and not after it.

    Raises:
        LoadError: It is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LoadError("--plot needs matplotlib: install it with pip install 'authbackend[load]', or omit --plot")


def plot(result: dict[str, Any], file: Path) -> None:
    """
    Draw connected devices over time and the distribution of the latencies.

    Raises:
        LoadError: The file cannot be written.
    """
    require()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subplots(2, 1)
    _connected(above, result)
    _latencies(below, result)
    try:
        figure.savefig(file, dpi=110)
    except OSError as error:
        raise LoadError(f"{file}: {error.strerror}") from error


def _connected(axes: Any, result: dict[str, Any]) -> None:
    line = result["timeline"]
    axes.plot(line["at_s"], line["connected"], label="connected")
    axes.plot(line["at_s"], line["failures"], label="failures so far", color="tab:red")
    for storm in result["storms"]:
        end = storm["begin_s"] + storm["duration_s"]
        axes.axvspan(storm["begin_s"], end, alpha=0.1)
        axes.annotate(f"{storm['duration_s']:.1f} s", (end, storm["complete"]), fontsize=9)
    storms = ", ".join(f"{one['name']} {one['cycles_per_s']:g}/s" for one in result["storms"])
    axes.set_title(f"{result['devices']} devices: {storms}")
    axes.set_xlabel("s")
    axes.set_ylabel("devices")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _latencies(axes: Any, result: dict[str, Any]) -> None:
    for name, points in result["distributions_ms"].items():
        summary = result["latency_ms"][name]
        label = f"{LATENCIES[name]}: p50 {summary['p50']:g}, p99 {summary['p99']:g} ms"
        axes.step([x for x, _ in points], [y for _, y in points], where="post", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.set_ylabel("cumulative fraction")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3, which="both")
    if result["distributions_ms"]:
        axes.legend(fontsize=8)
