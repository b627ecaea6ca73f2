"""`legato generate PROMPT`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from legato.command import options, terminal
from legato.command.waterfall import facts, waterfall

HELP = """Complete a prompt; the text is streamed to standard output.

\b
  legato generate "Once upon a time" --max-tokens 64 --temperature 0
  legato generate "Once upon a time" --trace          where the time went
  legato generate "1, 2, 3," --seed 7 --json | jq .text
  echo "a long prompt" | legato generate -            from standard input
  legato generate "A person as JSON: " --json-schema person.json
"""


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    address: options.Address = options.DEFAULT_ADDRESS,
    model: options.Model = "",
    adapter: options.Adapter = "",
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    logprobs: options.Logprobs = None,
    speculation: options.Speculation = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    grammar: options.Grammar = None,
    timeout_s: options.Timeout = 120.0,
    api_key: options.ApiKey = "",
    as_json: options.AsJson = False,
    trace: Annotated[bool, typer.Option("--trace", help="Draw where the time went.")] = False,
) -> None:
    if [prompt, json_schema, grammar].count("-") > 1:
        raise typer.BadParameter("standard input can be read once: one of PROMPT, --json-schema and --grammar is -")
    with options.client(address, api_key, timeout_s) as client:
        stream = client.stream(
            sys.stdin.read() if prompt == "-" else prompt,
            model=model,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=stop or (),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            speculation=speculation,
            json_schema=options.file_or_stdin("--json-schema", json_schema),
            regex=regex,
            choice=choice or None,
            grammar=options.file_or_stdin("--grammar", grammar),
        )
        for piece in stream:
            if not as_json:
                terminal.out.out(terminal.printable(piece.text), end="")
                sys.stdout.flush()
        answer = stream.answer
    if as_json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False))
    else:
        terminal.out.out("")
    if trace:
        terminal.err.print(f"\n{answer.request_id}: {facts(answer)}", markup=False)
        if answer.ledger is not None:
            terminal.err.print(waterfall(answer.ledger))
