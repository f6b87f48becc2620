"""The entry point of ``python -m authbackend_load``."""

from authbackend_load.cli import main

if __name__ == "__main__":
    main(prog_name="authbackend-load")
