"""`legato models`."""

from __future__ import annotations

import dataclasses
import json

from rich.table import Table

from legato.command import options, terminal

HELP = """List the models that a cluster serves, and their adapters.

\b
  legato models
  legato models --json
"""


def models(
    address: options.Address = options.DEFAULT_ADDRESS,
    api_key: options.ApiKey = "",
    timeout_s: options.Timeout = 10.0,
    as_json: options.AsJson = False,
) -> None:
    with options.client(address, api_key, timeout_s) as client:
        found = client.models()
    if as_json:
        print(json.dumps([dataclasses.asdict(model) for model in found]))
        return
    table = Table("model", "revision", "context", "vocabulary", "chat", "adapters", box=None)
    for model in found:
        chat = "yes" if model.chat else "no template"
        sizes = str(model.max_context_tokens), str(model.vocab_size)
        adapters = ", ".join(f"{adapter.name}@{adapter.revision[:8]}" for adapter in model.adapters)
        table.add_row(model.id, model.revision[:12], *sizes, chat, adapters)
    terminal.out.print(table)
