"""The entry point of ``authbackend`` and ``python -m authbackend``."""

import signal
import sys


def main() -> None:
    """Run the command line; ``serve`` survives SIGHUP from before the imports until the process has ended."""
    serves = "serve" in sys.argv[1:]
    if serves:
        signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        from authbackend.cli import main as command

        command(prog_name="authbackend")
    finally:
        if serves:  # Python removes its handlers before the interpreter exits; SIG_IGN stays
            signal.signal(signal.SIGHUP, signal.SIG_IGN)


if __name__ == "__main__":
    main()
