"""`python -m besa.cli` is `besa`."""

from besa.cli import main

main()
