"""Entry of the command `legato`: the list of subcommands, and what becomes of an error."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import traceback
from typing import Annotated, Any

import typer

from legato.command import bench, chat, convert, demo, doctor, generate, models, top, up
from legato.command.terminal import EXIT_DEFECT, EXIT_INTERRUPTED, EXIT_REQUEST, EXIT_SETUP, err, print_error

EPILOG = """Exit codes: 0 done, 1 a defect or something missing (doctor), 2 command line or request wrong, 3 the cluster
could not do it and a retry can help, 4 set-up (configuration, model, port, Redis), 130 Ctrl-C."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"legato {importlib.metadata.version('legato')}")
        raise typer.Exit


app = typer.Typer(
    name="legato",
    help="Serve large language models with prefill and decode on separate pools, and talk to them.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def legato(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and end.")
    ] = False,
) -> None:
    """What is common to all subcommands."""


app.command("up", help=up.HELP)(up.up)
app.command("demo", help=demo.HELP)(demo.demo)
app.command("generate", help=generate.HELP)(generate.generate)
app.command("chat", help=chat.HELP)(chat.chat)
app.command("bench", help=bench.HELP)(bench.bench)
app.command("models", help=models.HELP)(models.models)
app.command("top", help=top.HELP)(top.top)
app.command("doctor", help=doctor.HELP)(doctor.doctor)
app.command("convert", help=convert.HELP)(convert.convert)

# ClickException; newer versions of typer bring a click of their own.
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


def run(arguments: list[str] | None = None) -> int:
    """The exit code; see terminal.py for what each means."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own log is not for the reader of an answer
    try:
        code = app(args=arguments, prog_name="legato", standalone_mode=False)
    except USAGE_ERROR as error:
        error.show()
        return EXIT_REQUEST
    except (KeyboardInterrupt, typer.Abort):
        err.print("")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `legato generate ... | head`
        sys.stdout = None
        return 0
    except ModuleNotFoundError as error:
        err.print(
            f"legato: {error.name} is not installed here (set-up; pip install -e '.[serve]' in a checkout)",
            markup=False,
        )
        return EXIT_SETUP
    except Exception as error:
        if hasattr(error, "reason") and hasattr(error, "retryable"):  # a LegatoError, the client's or spec's
            return print_error(error)
        traceback.print_exc()
        err.print(
            f"legato: {type(error).__name__}: {error} (a defect of Legato; please report the lines above)", markup=False
        )
        return EXIT_DEFECT
    return code if isinstance(code, int) else 0


def main() -> None:
    sys.exit(run())


if __name__ == "__main__":
    main()
