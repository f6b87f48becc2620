"""The registry in shared memory, opened by several processes."""

import contextlib
import subprocess
import sys

from authbackend.registry.position import FeedPosition
from authbackend.registry.store import Store

OPENS = """
import sys
from pathlib import Path
from authbackend.registry.store import Store
store = Store(Path(sys.argv[1]), readonly=sys.argv[2] == "reader")
print(store.state().synced_at, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another(folder, role):
    """Run another process that has opened and read the store, for the duration of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", OPENS, str(folder), role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()


def test_who_opens_the_store_later_leaves_alone_who_reads_it_already(tmp_path):
    """LMDB clears the reader table for the first process that opens the store; those that have it open hold a lock."""
    with contextlib.closing(Store(tmp_path)) as writer:
        with writer.loading(FeedPosition("epoch", "incarnation", "10:10:"), 7.0):
            pass
        assert writer.state().synced_at == 7.0
        with another(tmp_path, "reader") as read, another(tmp_path, "reader") as read_too:
            assert (read, read_too) == ("7.0", "7.0")
            assert writer.state().synced_at == 7.0
