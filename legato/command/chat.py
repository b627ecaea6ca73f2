"""`legato chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from legato.command import options, terminal
from legato.command.waterfall import facts, waterfall
from legato.types import Message

HELP = """Talk to the model, under its own chat template.

\b
  legato chat                                          a conversation; Ctrl-D or /quit ends it, /new forgets it
  legato chat --say "What is the capital of France?"   one question, one answer
  legato chat --system "You answer in rhymes."
"""


def chat(
    say: Annotated[
        str | None, typer.Option("--say", "-s", help="One message instead of a conversation.", show_default=False)
    ] = None,
    system: Annotated[str, typer.Option("--system", help="The system message.", show_default=False)] = "",
    address: options.Address = options.DEFAULT_ADDRESS,
    model: options.Model = "",
    adapter: options.Adapter = "",
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    timeout_s: options.Timeout = 120.0,
    api_key: options.ApiKey = "",
    trace: Annotated[bool, typer.Option("--trace", help="Draw where the time went.")] = False,
) -> None:
    if say is not None and not say.strip():
        raise typer.BadParameter("holds no message", param_hint="--say")
    sampling = {
        "model": model,
        "adapter": adapter,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
    }
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    with options.client(address, api_key, timeout_s) as client:
        if say is not None:
            _turn(client, history, say, sampling, trace)
            return
        if sys.stdin.isatty():
            terminal.err.print("Ctrl-D or /quit ends the conversation, /new forgets it, Ctrl-C stops an answer.")
        _converse(client, history, sampling, trace)


def _converse(client: Any, history: list[Message], sampling: dict[str, Any], trace: bool) -> None:
    import legato

    kept = len(history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            del history[kept:]
        elif line:
            before = len(history)
            try:
                _turn(client, history, line, sampling, trace)
            except legato.LegatoError as error:
                if not sys.stdin.isatty():
                    raise
                terminal.print_error(error)
                del history[before:]


def _turn(client: Any, history: list[Message], line: str, sampling: dict[str, Any], trace: bool) -> None:
    """One question and its answer. In a conversation Ctrl-C stops the answer, of which the history keeps what came."""
    history.append({"role": "user", "content": line})
    with client.stream_chat(history, **sampling) as stream:
        try:
            for piece in stream:
                terminal.out.out(terminal.printable(piece.text), end="")
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not sys.stdin.isatty() or not stream.answer.token_ids:
                raise
        answer = stream.answer
    terminal.out.out("")
    history.append({"role": "assistant", "content": answer.text})
    if trace and answer.ledger is not None:
        terminal.err.print(f"\n{answer.request_id}: {facts(answer)}", markup=False)
        terminal.err.print(waterfall(answer.ledger))
