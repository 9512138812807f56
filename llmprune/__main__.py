"""The program: `llmprune`, and `python -m llmprune`. Signals are watched before anything that takes time is imported."""

from llmprune.cli import ending
from llmprune.machine.interrupts import INTERRUPTS


def main() -> None:
    """Run the command line; its errors and interrupts end in one line and an exit code."""
    with INTERRUPTS.watched():
        ending.guarded(_run, debug=True)


def _run() -> None:
    from llmprune.cli import commands as cli

    try:
        cli.main()
    except SystemExit as ended:
        # The command line library ends on an interrupt without a word. A command that came to its end all the same is done.
        if ended.code and INTERRUPTS.came and not INTERRUPTS.told:
            raise KeyboardInterrupt from None
        raise


if __name__ == "__main__":
    main()
