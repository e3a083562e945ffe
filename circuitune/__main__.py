"""``python -m circuitune``."""

from circuitune.cli import main

main()
