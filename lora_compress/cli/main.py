"""Choose the verb, run it, and turn errors into one line and an exit status."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ..errors import LoraCompressError, SettingsError
from .arguments import UsageError
from .console import print_json, say
from .process import EXIT_BROKEN_PIPE, OutputError, Terminated, drop_output, exit_status, sound_streams, stoppable, written

__all__ = ["EXIT_REFUSED", "EXIT_USAGE", "VERBS", "main"]

EXIT_REFUSED, EXIT_USAGE = 1, 2
# each a module here with run(argv) -> exit status
VERBS = ("compress", "expand", "inspect", "compare", "check", "evaluate", "gui", "run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; without a verb it is compress.

    Returns:
        0, 1 where an input was refused or a file could not be written, 2 for wrong usage; the reason goes to stderr, and with
        --json also to stdout as {"status": "refused" | "wrong_usage", "error": ...}. After a signal 128 + its number:
        130 for Ctrl+C, 143 for SIGTERM, 141 where nobody reads stdout any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "compress"
    with sound_streams(), stoppable():
        try:
            return _run(verb, arguments)
        except BrokenPipeError:
            drop_output()
            return EXIT_BROKEN_PIPE
        except KeyboardInterrupt as interrupt:
            name = "interrupted" if not isinstance(interrupt, Terminated) else f"ended by {interrupt}"
            say(f"{name}: no unfinished file stands under its final name; run the same command again to go on")
            return exit_status(interrupt)


def _run(verb: str, arguments: list[str]) -> int:
    try:
        if verb == "compress" and arguments and (close := difflib.get_close_matches(arguments[0], VERBS, n=1)):
            raise UsageError(f"{arguments[0]}: unknown command, did you mean {close[0]}?")
        try:
            return importlib.import_module(f".{verb}", __package__).run(arguments)
        finally:  # the text of --help too
            with written():
                pass
    except OutputError as error:
        drop_output()
        say(f"error: {error}")
        return EXIT_REFUSED
    except LoraCompressError as error:
        wrong_usage = isinstance(error, (UsageError, SettingsError))
        first, *more = error.args if isinstance(error, UsageError) else (str(error),)
        say(f"error: {first}", *more)
        if "--json" in arguments:
            print_json({"status": "wrong_usage" if wrong_usage else "refused", "error": str(error)})
        return EXIT_USAGE if wrong_usage else EXIT_REFUSED
