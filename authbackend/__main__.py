"""``authbackend`` and ``python -m authbackend``."""

import signal
import sys


def main() -> None:
    """Run the command line; a service survives SIGHUP while everything is still being imported, and to its end."""
    serves = "serve" in sys.argv[1:]
    if serves:
        signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        from authbackend.cli import main as command

        command(prog_name="authbackend")
    finally:
        if serves:  # handlers are taken away before the interpreter has ended, this is not
            signal.signal(signal.SIGHUP, signal.SIG_IGN)


if __name__ == "__main__":
    main()
