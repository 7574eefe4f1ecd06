"""Choose the verb, run it, and turn errors into one line and an exit status."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ..errors import LoraCompressError, SettingsError
from .arguments import UsageError
from .console import print_json

__all__ = ["EXIT_REFUSED", "EXIT_USAGE", "VERBS", "main"]

EXIT_REFUSED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
# each a module here with run(argv) -> exit status
VERBS = ("compress", "expand", "inspect", "compare", "check", "evaluate", "gui", "run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; without a verb it is compress.

    Returns:
        0, 1 where an input was refused or a file could not be written, 2 for wrong usage; the reason goes to stderr, and with
        --json also to stdout as {"status": "refused" | "wrong_usage", "error": ...}.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "compress"
    try:
        if verb == "compress" and arguments and (close := difflib.get_close_matches(arguments[0], VERBS, n=1)):
            raise UsageError(f"{arguments[0]}: unknown command, did you mean {close[0]}?")
        return importlib.import_module(f".{verb}", __package__).run(arguments)
    except LoraCompressError as error:
        wrong_usage = isinstance(error, (UsageError, SettingsError))
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            print_json({"status": "wrong_usage" if wrong_usage else "refused", "error": str(error)})
        return EXIT_USAGE if wrong_usage else EXIT_REFUSED
    except KeyboardInterrupt:
        print("interrupted: no unfinished file stands under its final name; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
