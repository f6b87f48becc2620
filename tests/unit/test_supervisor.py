"""The supervisor of a replica's processes."""

import subprocess
import sys

# In a separate interpreter, because it forks. Each child reports that it serves before the parent first checks.
ALL_AT_ONCE = """
import os, signal
from authbackend.service import supervisor

def start(process):
    read_end, write_end = os.pipe()
    process.process_id = os.fork()
    if process.process_id == 0:
        os.kill(os.getppid(), supervisor._READY)
        os.write(write_end, b"told")
        signal.alarm(60)
        signal.pause()
        os._exit(0)
    os.read(read_end, 4)

parent = object.__new__(supervisor.Supervisor)
parent._start = start
parent._urls = {}
parent._registry = supervisor._Process("registry", None)
parent._workers = [supervisor._Process(f"worker-{n}", None, n) for n in range(8)]
parent._answering = [supervisor._Process("health", None), *parent._workers]
signal.pthread_sigmask(signal.SIG_BLOCK, supervisor._SIGNALS)
signal.alarm(60)

def everybody_serves(where):
    for process in (parent._registry, *parent._answering):
        os.kill(process.process_id, signal.SIGKILL)
    print("everybody serves", flush=True)
    os._exit(0)

parent._watch(everybody_serves)
"""


def test_children_that_are_ready_at_the_same_moment_are_all_noticed():
    done = subprocess.run([sys.executable, "-c", ALL_AT_ONCE], capture_output=True, text=True, check=False)
    assert "everybody serves" in done.stdout, done.stderr
