"""Mounts in the tests' own namespace, and safe removal of directories that contain mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .processes import HarnessError


def mount(*arguments: str | Path) -> None:
    """
    Mount something in this mount namespace, which must not be the machine's.

    Raises:
        HarnessError: The mount failed, or this is the machine's namespace.
    """
    outside = os.environ.get("AUTHBACKEND_TEST_OUTSIDE", "")
    if not outside or outside == str(Path("/proc/self/ns/mnt").readlink()):
        raise HarnessError("not in a mount namespace of its own: run tools/test-broker")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HarnessError(f"{done.stderr.strip()} (the broker tests run under tools/test-broker, as root)")


def mounts_below(directory: Path) -> list[Path]:
    """Return the mount points on or below a directory, the last mounted first."""
    base = directory.resolve()
    points = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if point == base or point.is_relative_to(base)]


def remove_tree(directory: Path) -> None:
    """
    Unmount everything below a directory, then remove it.

    Raises:
        HarnessError: Something is still mounted there. Nothing is removed then, because files would be deleted from
            the mounted file system, wherever it is.
    """
    for point in mounts_below(directory):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
    left = mounts_below(directory)
    if left:
        raise HarnessError(f"not removed, still mounted: {', '.join(map(str, left))}")
    shutil.rmtree(directory, ignore_errors=True)
