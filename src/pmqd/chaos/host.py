"""One host of the run: `python -m pmqd.chaos.host --config FILE [--mutant NAME]` is `pmqd run`, perhaps broken on purpose.

A mutant's patches are made before the first fork, so all children have them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pmqd import config, master
from pmqd.errors import PmqdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the master of one host until it is told to stop; the exit code of `pmqd run`."""
    parser = argparse.ArgumentParser(prog="python -m pmqd.chaos.host")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--mutant")
    given = parser.parse_args(arguments)
    try:
        settings = config.load(given.config)
        if given.mutant:
            from pmqd.chaos import mutants  # noqa: PLC0415 - it loads the stores, which a master must not have

            mutants.apply(given.mutant)
        return master.run(settings, given.config)
    except PmqdError as error:
        sys.stderr.write(f"pmqd.chaos.host: {error}\n")
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
