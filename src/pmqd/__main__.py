"""The command `pmqd`, and `python -m pmqd`."""

import signal
import sys


def main() -> int:
    """See `pmqd.cli`."""
    if "run" in sys.argv[1:5]:  # after `--debug` and `--config FILE`, where they are given
        # Before anything slow: whoever asks for a reload while the daemon still starts must not end it. The master hears it later.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from pmqd.cli import main as command  # noqa: PLC0415 - see above

    return command()


if __name__ == "__main__":
    sys.exit(main())
