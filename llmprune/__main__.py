"""Start of the program: the command `llmprune`, and `python -m llmprune`."""

from llmprune.cli import ending
from llmprune.machine.interrupts import INTERRUPTS


def main() -> None:
    """Run the command line. An error or an interrupt ends it with one line on stderr and an exit code."""
    ending.guarded(_run, debug=True)


def _run() -> None:
    # Imported only here, where `guarded` already handles signals: this import takes a while.
    from llmprune.cli import commands

    try:
        commands.main()
    except SystemExit as ended:
        # typer turns an interrupt into a silent exit, which must be reported after all. A command that
        # finished (exit code 0) although a signal came is done.
        if ended.code and INTERRUPTS.came and not INTERRUPTS.told:
            raise KeyboardInterrupt from None
        raise


if __name__ == "__main__":
    main()
