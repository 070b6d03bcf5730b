"""`python -m chipset` is the command `chipset`."""

from .server.cli import main

if __name__ == "__main__":
    main()
