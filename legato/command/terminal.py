"""What a person reads: answers and data on standard output, everything else on standard error; errors as one line.

exit code   0    done
            1    a defect, or something that `doctor` found missing
            2    the command line or the request is wrong: change it
            3    the cluster could not do it: a retry can help
            4    set-up: configuration, model files, port, Redis
            130  Ctrl-C
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

EXIT_DEFECT, EXIT_REQUEST, EXIT_CLUSTER, EXIT_SETUP, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

# A file or a pipe has no width of its own: tables are not cropped there.
PLAIN_WIDTH = 160
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH)

_ADVICE = {
    "INVALID_PARAMETER": "change it",
    "CONTEXT_TOO_LONG": "shorten the prompt",
    "UNKNOWN_MODEL": "`legato models` lists what is served",
    "UNAUTHENTICATED": "give a key by --api-key or LEGATO_API_KEY",
    "CANCELLED": "nothing to do",
    "DEADLINE_EXCEEDED": "raise --timeout or ask for fewer tokens",
    "OVERLOADED": "try again later or add workers",
    "OUT_OF_BLOCKS": "try again later or give the decode pool more kv_memory",
    "WORKER_LOST": "try again; `legato top` shows who is left",
    "DRAINING": "try again in some seconds",
    "NO_WORKERS": "`legato top` shows who is there; workers may still be loading",
    "UNREACHABLE": "start a cluster with `legato up`, or name one by --address",
    "INTERNAL": "please report it with the logs",
    "INVALID_MODEL": "correct the files or choose another model",
    "UNSUPPORTED_MODEL": "choose another model",
    "INVALID_CONFIGURATION": "correct the configuration",
    "TRANSPORT_UNAVAILABLE": "`legato doctor` says what this machine has",
}


def exit_code_of(error: Any) -> int:
    """Of a LegatoError, of the client's tree or of spec's; both have the same names."""
    tree = {kind.__name__ for kind in type(error).__mro__}
    if "RequestError" in tree:
        return EXIT_REQUEST
    if "SetupError" in tree:
        return EXIT_SETUP
    return EXIT_DEFECT if error.reason == "INTERNAL" else EXIT_CLUSTER


def error_line(error: Any) -> str:
    """What happened (whose fault; what to do), on one line."""
    whose = {EXIT_REQUEST: "the request's fault", EXIT_SETUP: "set-up", EXIT_CLUSTER: "the cluster's fault"}
    fault = whose.get(exit_code_of(error), "a defect of Legato")
    if error.reason == "DEADLINE_EXCEEDED":
        fault = "out of time"
    message = " ".join(str(error).split())
    advice = _ADVICE.get(error.reason, "see `legato doctor`")
    return f"legato: {message} ({fault}; {advice})"


def print_error(error: Any) -> int:
    err.print(error_line(error), style="red" if err.is_terminal else None, markup=False)
    return exit_code_of(error)


def printable(text: str) -> str:
    """Without control characters: what a model writes must not steer the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
