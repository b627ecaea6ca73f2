"""Options that several subcommands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

# Variables of the client; `legato up` leaves them out of the cluster's configuration, which reads LEGATO_* too.
ADDRESS_VARIABLE, API_KEY_VARIABLE = "LEGATO_ADDRESS", "LEGATO_API_KEY"

Address = Annotated[
    str, typer.Option("--address", "-a", envvar=ADDRESS_VARIABLE, help="HOST:PORT of a router, or several with commas.")
]
ApiKey = Annotated[
    str, typer.Option("--api-key", envvar=API_KEY_VARIABLE, help="For a cluster that asks for one.", show_default=False)
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds from sending to the last token.")]
Model = Annotated[str, typer.Option("--model", "-m", help="The model's id; empty: the only one served.")]
Adapter = Annotated[
    str, typer.Option("--adapter", help="Name of a LoRA adapter, as `legato models` lists them.", show_default="none")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="At most; cut to what the context leaves.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw among the k likeliest; 0 is off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw among the likeliest that hold this probability; 1 is off.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Drop what is less likely than this times the likeliest; 0 is off.")
]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="Over prompt and output; 1 is off.")]
PresencePenalty = Annotated[float, typer.Option("--presence-penalty", help="Over the output; 0 is off.")]
FrequencyPenalty = Annotated[float, typer.Option("--frequency-penalty", help="Over the output; 0 is off.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same tokens.", show_default="drawn")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this string; may be given several times.")]
Speculation = Annotated[
    str | None,
    typer.Option(
        "--speculation",
        help="Who guesses tokens for one step to verify: prompt_lookup or draft_model. The answer stays the same.",
        show_default="nobody",
    ),
]
JsonSchema = Annotated[
    str | None,
    typer.Option("--json-schema", help="FILE with a JSON schema that the answer keeps to; - reads standard input."),
]
Regex = Annotated[str | None, typer.Option("--regex", help="A regular expression that the whole answer matches.")]
Choice = Annotated[list[str] | None, typer.Option("--choice", help="An answer to choose; give it for each of them.")]
Grammar = Annotated[
    str | None,
    typer.Option("--grammar", help="FILE with a grammar in Lark's notation for the answer; - reads standard input."),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the end-of-sequence token.")]
Logprobs = Annotated[int | None, typer.Option("--logprobs", help="0: of the tokens; k: also of the k likeliest.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]

DEFAULT_ADDRESS = "localhost:50051"


def file_or_stdin(option: str, name: str | None) -> str | None:
    """The content of a FILE option."""
    if name is None:
        return None
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {name}: {error}", param_hint=option) from None


def client(address: str, api_key: str, timeout_s: float) -> Any:
    """A legato.Client."""
    import legato

    # A person who named the wrong address learns it in about a second.
    return legato.Client(address, api_key=api_key or None, timeout_s=timeout_s, retries=legato.Retries(attempts=5))
