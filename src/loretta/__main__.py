"""``loretta`` and ``python -m loretta``: the command line."""

import signal


def main() -> None:
    """Import the command line, which takes longer than a second thought, and start it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        # nothing has begun that an interrupt would have to end well: it ends the process, without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from loretta.cli.main import main as command_line

    signal.signal(signal.SIGINT, before)
    command_line()


if __name__ == "__main__":
    main()
