"""``python -m authbackend``."""

from authbackend.cli import main

main(prog_name="authbackend")
