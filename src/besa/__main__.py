"""`python -m besa`, which is also how torchrun starts it: `torchrun -m besa`."""

from besa.cli import main

if __name__ == "__main__":
    main()
