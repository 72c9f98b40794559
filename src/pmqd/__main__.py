"""`python -m pmqd` is the command `pmqd`."""

import sys

from pmqd.cli import main

if __name__ == "__main__":
    sys.exit(main())
