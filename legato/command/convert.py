"""`legato convert FILE.gguf DIR`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from legato.command import terminal

HELP = """Write a GGUF file as a Hugging Face folder, which transformers and every server loads.

\b
  legato convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2/
  legato convert model.gguf folder/ --dtype float32
"""


class WrittenDtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="The file to read.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; it must not exist or be empty.")],
    dtype: Annotated[WrittenDtype, typer.Option("--dtype", help="Of the weights written.")] = WrittenDtype.bfloat16,
) -> None:
    from engine.convert import convert_gguf
    from service.tokenizer import load_tokenizer
    from spec.dtype import Dtype

    columns = (TextColumn("writing weights"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=terminal.err, disable=not terminal.err.is_terminal) as progress:
        task = progress.add_task("weights", total=1.0)
        convert_gguf(
            file,
            folder,
            lambda fraction: progress.update(task, completed=fraction),
            write_tokenizer=lambda target: load_tokenizer(file).save(target),
            dtype=Dtype.parse(dtype.value),
        )
    terminal.err.print(f"{folder} is written", markup=False)
