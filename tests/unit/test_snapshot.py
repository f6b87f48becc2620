"""The copy on disk: it is restored completely, and a damaged copy is never used in part."""

import json
import os
import shutil
import time

import pytest

from authbackend import clocks
from authbackend.clocks import Instant
from authbackend.errors import ConfigurationError
from authbackend.registry.position import FeedPosition
from authbackend.registry.records import DeviceRow, Patch
from authbackend.registry.snapshot import HEADER_BYTES, MANIFEST, JournalEntry, SnapshotFolder, SnapshotRefused
from tests.support.registry import contents, new_store

MARK = FeedPosition("epoch", "incarnation", "10:10:")


def row(name, status="a", other=None):
    return DeviceRow(name.encode(), f"{status}T\t{other or ''}\t\t\t".encode(), other and other.encode())


def store_of(*names):
    store = new_store()
    store.apply(Patch({"T": b'{"name": "T"}'}, {name: row(name) for name in names}, {}), MARK, 1.0)
    return store


def feed_read(position=MARK, patch=None):
    """Return a refresh from the database now, with a correct clock."""
    return JournalEntry(Instant.now(), position, patch or Patch(), time.time())


def snapshot_folder(tmp_path, **kwargs):
    return SnapshotFolder(tmp_path / "disk", kwargs.get("registry", "here/db"), kwargs.get("limit", 900.0))


def restored(tmp_path, **kwargs):
    """Return what a new start restores, as (store contents, RestoredSnapshot)."""
    copy = snapshot_folder(tmp_path, **kwargs)
    target = new_store()
    target.close()
    try:
        snapshot = copy.restore(target.folder)
    finally:
        copy.close()
    if snapshot is None:
        return None, None
    from authbackend.registry.store import Store

    opened = Store(target.folder)
    for entry in snapshot.entries:
        opened.apply(entry.patch, entry.position, 0.0)
    result = contents(opened)
    opened.close()
    return result, snapshot


@pytest.fixture
def written(tmp_path):
    """Write an image of two devices, and a journal in which one is suspended and one renamed; return the folder."""
    store = store_of("d1", "d2")
    copy = snapshot_folder(tmp_path)
    copy.save(store, feed_read())
    for number, patch in enumerate(
        (
            Patch(devices={"d1": row("d1", "s")}),
            Patch(devices={"d2": row("other", "a", "d2")}),
            Patch(device_types={"T": None}, accounts={"ops": b"{}"}),
        )
    ):
        position = FeedPosition("epoch", "incarnation", f"{11 + number}:{11 + number}:")
        store.apply(patch, position, 2.0)
        copy.append(feed_read(position, patch))
    copy.close()
    return tmp_path / "disk", contents(store)


def file_of(folder, kind):
    return folder / json.loads((folder / MANIFEST).read_text())[kind]


def entries_begin(data):
    """Return the offset of each entry of a journal."""
    offsets = [0]
    while (end := offsets[-1] + HEADER_BYTES + int.from_bytes(data[offsets[-1] : offsets[-1] + 4], "big")) < len(data):
        offsets.append(end)
    return offsets


def test_image_and_journal_come_back(tmp_path, written):
    _, expected = written
    content, snapshot = restored(tmp_path)
    assert content == expected
    assert snapshot.entries[-1].position.snapshot == "13:13:"
    assert snapshot.longest_staleness_s == 900.0


def test_the_next_start_goes_by_the_limit_that_the_others_were_told(tmp_path, written):
    assert restored(tmp_path, limit=99_999.0)[1].longest_staleness_s == 900.0


def test_an_empty_folder_is_nothing(tmp_path):
    assert restored(tmp_path) == (None, None)


def test_every_file_is_for_its_owner_only(written):
    folder, _ = written
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o600"}
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("cut", [1, 20, 60, 100])
def test_a_last_entry_that_was_being_written_is_dropped(tmp_path, written, cut):
    folder, _ = written
    journal = file_of(folder, "journal")
    data = journal.read_bytes()
    journal.write_bytes(data[:-cut])
    _, snapshot = restored(tmp_path)
    assert [entry.position.snapshot for entry in snapshot.entries] == ["10:10:", "11:11:", "12:12:"]


def test_every_place_at_which_a_last_entry_can_be_cut_short_drops_that_entry_only(tmp_path, written):
    folder, _ = written
    journal = file_of(folder, "journal")
    data = journal.read_bytes()
    begin = entries_begin(data)[-1]
    for end in range(begin, len(data)):
        journal.write_bytes(data[:end])
        assert restored(tmp_path)[1].entries[-1].position.snapshot == "12:12:", end


def test_no_flipped_bit_in_a_header_makes_an_entry_vanish(tmp_path, written):
    folder, _ = written
    journal = file_of(folder, "journal")
    data = journal.read_bytes()
    for begin in entries_begin(data):
        for bit in range(8 * HEADER_BYTES):
            flipped = bytearray(data)
            flipped[begin + bit // 8] ^= 1 << bit % 8
            journal.write_bytes(flipped)
            with pytest.raises(SnapshotRefused, match=f"journal-.* is damaged at byte {begin}.*It is not used"):
                restored(tmp_path)


def test_a_flipped_bit_in_a_header_before_one_that_is_cut_short_is_no_second_torn_entry(tmp_path, written):
    folder, _ = written
    journal = file_of(folder, "journal")
    data = journal.read_bytes()
    for bit in range(8 * HEADER_BYTES):
        flipped = bytearray(data[:-1])
        flipped[entries_begin(data)[1] + bit // 8] ^= 1 << bit % 8
        journal.write_bytes(flipped)
        with pytest.raises(SnapshotRefused, match="damaged"):
            restored(tmp_path)


@pytest.mark.parametrize("kind", ["image", "journal"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_flipped_bit_refuses_everything(tmp_path, written, kind, fraction):
    folder, _ = written
    file = file_of(folder, kind)
    data = bytearray(file.read_bytes())
    position = max(40, int(len(data) * fraction))
    data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(SnapshotRefused, match="damaged"):
        restored(tmp_path)


@pytest.mark.parametrize("field", ["image", "journal", "sha256", "position", "at", "registry", "longest_staleness_s"])
def test_a_changed_manifest_is_refused(tmp_path, written, field):
    folder, _ = written
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[field] = {"epoch": "x"} if field == "position" else 1e9
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SnapshotRefused, match="damaged"):
        restored(tmp_path)


@pytest.mark.parametrize("kind", ["image", "journal"])
def test_a_missing_file_is_refused(tmp_path, written, kind):
    folder, _ = written
    file_of(folder, kind).unlink()
    with pytest.raises(SnapshotRefused, match="cannot be read"):
        restored(tmp_path)


def test_a_copy_of_another_database_is_refused(tmp_path, written):
    with pytest.raises(SnapshotRefused, match="another database"):
        restored(tmp_path, registry="elsewhere/db")


def started_anew(monkeypatch, *, synchronised=True, up_s=20.0):
    """Simulate a reboot of the machine."""
    monkeypatch.setattr(clocks, "boot", lambda: "another")
    monkeypatch.setattr(clocks, "uptime", lambda: up_s)
    monkeypatch.setattr(clocks, "synchronised", lambda: synchronised)


def set_clock(monkeypatch, by_s):
    """Set the machine's clock."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + by_s)


@pytest.mark.parametrize("by_s", [-3600, 3600])
def test_setting_the_clock_makes_a_copy_neither_younger_nor_older(tmp_path, written, monkeypatch, by_s):
    boottime = clocks.uptime
    monkeypatch.setattr(clocks, "uptime", lambda: boottime() + 600)
    set_clock(monkeypatch, by_s)
    assert restored(tmp_path)[1].age_s == pytest.approx(600, abs=60)


def test_after_a_start_of_the_machine_a_copy_is_as_old_as_the_time_of_day_says(tmp_path, written, monkeypatch):
    started_anew(monkeypatch)
    set_clock(monkeypatch, 600)
    assert restored(tmp_path)[1].age_s == pytest.approx(600, abs=60)


def test_a_start_with_a_wrong_clock_refuses_the_copy(tmp_path, written, monkeypatch):
    started_anew(monkeypatch, synchronised=False)
    with pytest.raises(
        SnapshotRefused, match=r"the age of .* is unknown: .* its clock is not synchronised \(see: timedatectl\)"
    ):
        restored(tmp_path)


def test_a_copy_is_not_younger_than_the_machine_has_been_up(tmp_path, written, monkeypatch):
    started_anew(monkeypatch, up_s=3000.0)
    assert restored(tmp_path)[1].age_s == 3000.0


def test_a_copy_that_was_written_while_the_clock_was_ahead_is_as_old_as_the_database_says(tmp_path, monkeypatch):
    copy = snapshot_folder(tmp_path)
    ahead = Instant(time.time() + 3000, clocks.uptime(), clocks.boot())
    copy.save(store_of("d1"), JournalEntry(ahead, MARK, Patch(), time.time()))
    copy.close()
    started_anew(monkeypatch)
    set_clock(monkeypatch, 3600)  # an hour later, with a correct clock
    assert restored(tmp_path)[1].age_s == pytest.approx(3600, abs=60)


def test_a_copy_that_was_written_while_the_databases_clock_was_ahead_is_as_old_as_this_machine_says(
    tmp_path, monkeypatch
):
    copy = snapshot_folder(tmp_path)
    copy.save(store_of("d1"), JournalEntry(Instant.now(), MARK, Patch(), time.time() + 86400))
    copy.close()
    started_anew(monkeypatch)
    set_clock(monkeypatch, 3600)
    assert restored(tmp_path)[1].age_s == pytest.approx(3600, abs=60)


def test_a_copy_from_the_future_is_refused(tmp_path, written, monkeypatch):
    started_anew(monkeypatch)
    set_clock(monkeypatch, -3600)
    with pytest.raises(SnapshotRefused, match="from the future"):
        restored(tmp_path)


@pytest.mark.parametrize("item", ["folder", "image", "journal"])
def test_what_others_may_write_is_refused(tmp_path, written, item):
    folder, _ = written
    (folder if item == "folder" else file_of(folder, item)).chmod(0o777)
    with pytest.raises(SnapshotRefused, match="writable by others"):
        restored(tmp_path)


def test_what_was_refused_is_put_nowhere(tmp_path, written):
    folder, _ = written
    file_of(folder, "journal").write_bytes(b"\x00" * 500)
    copy = snapshot_folder(tmp_path)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(SnapshotRefused):
        copy.restore(target)
    assert list(target.iterdir()) == []
    copy.close()


def test_two_replicas_cannot_share_a_folder(tmp_path):
    first = snapshot_folder(tmp_path)
    with pytest.raises(ConfigurationError, match="in use by another replica"):
        snapshot_folder(tmp_path)
    first.close()
    snapshot_folder(tmp_path).close()


def boot(path):
    """Start a replica in a folder, stop it, and return its boot."""
    copy = SnapshotFolder(path, "here/db", 900.0)
    try:
        return copy.begin_boot()
    finally:
        copy.close()


def test_a_restart_knows_which_boots_have_ended(tmp_path):
    first, second, third = (boot(tmp_path / "disk") for _ in range(3))
    assert first.folder == second.folder == third.folder
    assert len({first.id, second.id, third.id}) == 3
    assert third.former == (first.id, second.id)
    assert third.former_ended


@pytest.mark.parametrize("record", ["", "nonsense", "[]", '{"lock": {}}', '{"lock": {"kernel": "x"}, "boots": ["y"]}'])
def test_a_record_of_boots_that_cannot_be_read_proves_nothing(tmp_path, record):
    folder = boot(tmp_path / "disk").folder
    (tmp_path / "disk/boots").write_text(record)
    second = boot(tmp_path / "disk")
    assert (second.folder, second.former, second.former_ended) == (folder, (), False)


def test_the_record_of_boots_does_not_grow_without_end(tmp_path):
    for _ in range(103):
        last = boot(tmp_path / "disk")
    assert len(last.former) == 100


def test_a_copied_folder_proves_nothing_and_its_image_is_not_used(tmp_path, written):
    first = boot(tmp_path / "disk")
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "disk", copied)
    second = boot(copied)
    assert (second.folder, second.former, second.former_ended) == (first.folder, (), False)
    copy = SnapshotFolder(copied, "here/db", 900.0)
    with pytest.raises(SnapshotRefused, match="was copied from another replica's"):
        copy.restore(new_store().folder)
    copy.save(store_of("d9"), feed_read())  # a copy that it writes itself belongs to it
    copy.close()
    copy = SnapshotFolder(copied, "here/db", 900.0)
    assert copy.restore(new_store().folder) is not None
    copy.close()
    assert restored(tmp_path)[1] is not None


def test_a_new_image_leaves_nothing_of_the_old_one(tmp_path, written):
    folder, _ = written
    copy = snapshot_folder(tmp_path)
    assert copy.wants_image
    copy.save(store_of("d9"), feed_read())
    copy.close()
    assert len(list(folder.glob("image-*"))) == len(list(folder.glob("journal-*"))) == 1
    content, _ = restored(tmp_path)
    assert set(content[0]) == {b"d9"}


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_a_manifest(tmp_path, monkeypatch):
    write = os.write
    copy = snapshot_folder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))
        copy.save(store_of("d1"), feed_read())
    copy.close()
    assert set(restored(tmp_path)[0][0]) == {b"d1"}


def test_when_the_disk_is_full_the_old_copy_stays_and_a_new_image_is_wanted(tmp_path, written, monkeypatch):
    _, expected = written
    copy = snapshot_folder(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        copy.save(store_of("d9"), feed_read())
    copy.close()
    assert restored(tmp_path)[0] == expected
