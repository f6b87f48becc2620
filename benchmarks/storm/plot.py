"""Draws the result of a storm benchmark as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"authbackend": "tab:blue", "always-allow": "tab:green", "internal": "tab:orange"}


def plot(result: dict[str, Any], directory: Path) -> list[Path]:
    """Draw the parts of the result as PNG files in ``directory``, and return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (("rounds", _rounds), ("steps", _steps), ("faults", _faults)):
        if result.get(name):
            file = directory / f"storm-{name}.png"
            draw(result, file)
            drawn.append(file)
    return drawn


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _rounds(result: dict[str, Any], file: Path) -> None:
    figure, ((progress, cycles), (rates, cpu)) = _figure(2, 2)
    for run in result["rounds"]["runs"]:
        colour, label = COLOURS[run["backend"]], run["backend"] if run["round"] == 1 else None
        line = run["timeline"]
        begin = run["begin_s"]
        progress.plot([t - begin for t in line["at_s"]], line["completed"], color=colour, label=label)
        points = run["distributions_ms"].get("cycle", [])
        cycles.step([x for x, _ in points], [y for _, y in points], color=colour, label=label, where="post")
    _label(progress, f"{result['options']['devices']} devices reconnect", "s", "devices that have finished")
    _label(cycles, "one device: connect, subscribe, publish", "ms", "cumulative fraction")
    summary = result["rounds"]["summary"]
    names = list(summary)
    heights = [summary[name]["cycles_per_s"]["median"] for name in names]
    errors = [
        [h - summary[n]["cycles_per_s"]["lowest"] for n, h in zip(names, heights, strict=True)],
        [summary[n]["cycles_per_s"]["highest"] - h for n, h in zip(names, heights, strict=True)],
    ]
    rates.bar(names, heights, yerr=errors, color=[COLOURS[name] for name in names], capsize=4)
    _label(rates, "devices per second: median, lowest and highest", "", "1/s", legend=False)
    _stack(cpu, names, [summary[name]["cpu_ms_per_device"] for name in names])
    _label(cpu, "CPU time", "", "ms per device")
    figure.savefig(file, dpi=110)


def _steps(result: dict[str, Any], file: Path) -> None:
    storms = result["steps"]["storms"]
    figure, (row,) = _figure(1, len(storms))
    for axes, (backend, entries) in zip(row, storms.items(), strict=True):
        _stack(axes, [entry["until"] for entry in entries], [entry["cpu_ms_per_device"] for entry in entries])
        _label(axes, f"{backend}: CPU time up to each step", "", "ms per device")
    figure.savefig(file, dpi=110)


def _faults(result: dict[str, Any], file: Path) -> None:
    faults = result["faults"]
    figure, rows = _figure(len(faults), 1)
    for (axes,), (name, scenario) in zip(rows, faults.items(), strict=True):
        line = scenario["timeline"]
        axes.plot(line["at_s"], line["connected"], label="connected")
        axes.plot(line["at_s"], line["failures"], label="failures so far", color="tab:red")
        _label(axes, f"{name}: {'; '.join(dict.fromkeys(scenario['events']))[:90]}", "s", "devices")
    figure.savefig(file, dpi=110)


def _stack(axes: Any, names: list[str], values: list[dict[str, float]]) -> None:
    bottoms = [0.0] * len(names)
    for part in values[0]:
        heights = [value[part] for value in values]
        if any(height > 0.005 for height in heights):
            axes.bar(names, heights, bottom=bottoms, label=part)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]


def _label(axes: Any, title: str, x: str, y: str, *, legend: bool = True) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=8)
