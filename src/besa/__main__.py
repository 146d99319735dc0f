"""`besa` and `python -m besa`, which is also how torchrun starts it: `torchrun -m besa`."""

import sys


def main() -> None:
    """Run the command line; imports take a moment, in which Ctrl-C may come."""
    try:
        from besa.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
