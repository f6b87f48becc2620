"""Mounting in a namespace of the tests' own, and removing directories without what is mounted in them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .processes import HarnessError


def mount(*arguments: str | Path) -> None:
    """
    Mount something in this mount namespace, which must be the tests' own.

    Raises:
        HarnessError: it failed, or would have been done to the machine.
    """
    outside = os.environ.get("AUTHBACKEND_TEST_OUTSIDE", "")
    if not outside or outside == str(Path("/proc/self/ns/mnt").readlink()):
        raise HarnessError("not in a mount namespace of its own: run tools/test-broker")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HarnessError(f"{done.stderr.strip()} (the broker tests run under tools/test-broker, as root)")


def mounts_below(directory: Path) -> list[Path]:
    """What is mounted on or below a directory, the innermost last-mounted first."""
    base = directory.resolve()
    points = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if point == base or point.is_relative_to(base)]


def remove_tree(directory: Path) -> None:
    """
    Remove a directory, after unmounting everything below it.

    Raises:
        HarnessError: something is still mounted there. Then nothing is removed, because it would be removed
            from what is mounted, wherever that is.
    """
    for point in mounts_below(directory):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
    left = mounts_below(directory)
    if left:
        raise HarnessError(f"not removed, still mounted: {', '.join(map(str, left))}")
    shutil.rmtree(directory, ignore_errors=True)
