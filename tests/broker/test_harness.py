"""The test harness itself, where a mistake could damage the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mounts import mount, mounts_below, remove_tree
from .node import Broker
from .processes import HarnessError


def test_removing_a_directory_spares_what_is_mounted_in_it(tmp_path: Path) -> None:
    """Mounts are unmounted first, including nested and stacked ones; the files behind them stay."""
    precious, workplace = tmp_path / "precious", tmp_path / "workplace"
    (precious / "inner").mkdir(parents=True)
    (precious / "file").write_text("kept")
    (workplace / "tree").mkdir(parents=True)
    mount("--bind", precious, workplace / "tree")
    mount("-t", "tmpfs", "test", workplace / "tree/inner")
    mount("--bind", precious, workplace / "tree/inner")
    remove_tree(workplace)
    assert not workplace.exists()
    assert (precious / "file").read_text() == "kept"
    assert (precious / "inner").is_dir()


def test_nothing_is_mounted_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the runner, these tests fail with an error and mount nothing."""
    monkeypatch.setenv("AUTHBACKEND_TEST_OUTSIDE", str(Path("/proc/self/ns/mnt").readlink()))
    with pytest.raises(HarnessError, match="tools/test-broker"):
        mount("-t", "tmpfs", "test", tmp_path)
    assert mounts_below(tmp_path) == []


def test_a_node_has_nothing_of_the_machine_mounted_writable(broker: Broker) -> None:
    """Only the read-only root and the tests' own file systems are mounted; /dev is not the machine's."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    inside = [fields for fields in lines if Path(fields[4]).is_relative_to(broker.state)]
    assert {Path(fields[4]) for fields in inside} == set(mounts_below(broker.state))
    kinds = {Path(fields[4]): (fields[5].split(",")[0], fields[fields.index("-") + 1]) for fields in inside}
    assert kinds.pop(broker.chroot)[0] == "ro"
    assert {kind for _, kind in kinds.values()} <= {"tmpfs", "proc"}
