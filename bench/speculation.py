"""Prompt lookup against plain decoding with our engine under our scheduler, and how often a draft model is right.

Speed: greedy answers to a text that repeats itself and to prose, plain and with guesses looked up, in turn in one run;
that the answers are equal is checked. The repeating text shows what there is to gain, prose what wrong guesses cost.

Acceptance: model p and draft model q read the same text; for each of its positions

    drawn         the share of equal draws, as the engine makes them, over SEEDS seeds (kernels/sampling.py)
    race          what that share is of, sum_x 1 / sum_y max(p(y) / p(x), q(y) / q(x)): both take the token whose
                  exponential, a number per token, is least when divided by its probability (Daliri et al. 2024,
                  arXiv:2408.07978)
    min(p, q)     sum_x min(p(x), q(x)), the rule of Leviathan et al. 2023, the most that any rule can reach

the last two computed. Without --draft the draft model is the model itself with the weights of its
layers rounded to --draft-bits: right often, as a good draft model is, and no faster, so that no speed is shown for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench.record import append_line
from bench.timed_loop import TimedLoop
from engine.convert import convert_gguf
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from kernels.sampling import options_of, sample, stream_of
from scheduler.batch import Tokens
from scheduler.plan import Slice, StepPlan
from service.model_source import resolve_model
from service.tokenizer import Tokenizer, load_tokenizer
from spec.sampling import Speculation

SEEDS = 100  # of the draws that are compared
ROUNDING_GROUP = 32  # weights of a row that share a scale
ROWS_AT_ONCE = 16  # positions whose whole distributions are asked for in one step
TEMPERATURES = (0.0, 0.7, 1.0)
PROSE = Path(__file__).parent.parent / "docs" / "life-of-a-request.md"
EXAMPLES = """examples:
  python -m bench.speculation                              SmolLM2, about five minutes
  python -m bench.speculation --model big --draft small    two folders or .gguf files of one vocabulary
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    num_tokens: int
    num_steps: int
    proposed_tokens: int
    accepted_tokens: int


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    path = resolve_model(options.model)
    engine_options = EngineOptions(dtype=options.dtype, device="cpu", threads=options.threads)
    tokenizer = load_tokenizer(path)
    runs = measure(path, engine_options, prompts(tokenizer), options)
    with tempfile.TemporaryDirectory() as scratch:
        draft = resolve_model(options.draft) if options.draft else rounded(path, Path(scratch), options.draft_bits)
        text = tokenizer.encode(PROSE.read_text(encoding="utf-8"))[: options.acceptance_tokens]
        accepted = acceptance(
            distributions(path, engine_options, text), distributions(draft, engine_options, text), TEMPERATURES
        )
    report(runs, accepted, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speculation",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or smollm2 (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="requests at once (default: 1 4)")
    parser.add_argument("--num-draft-tokens", type=int, default=6, help="guesses a step (default: %(default)s)")
    parser.add_argument("--ngram", type=int, default=3, help="tokens looked up (default: %(default)s)")
    parser.add_argument("--draft", help="a draft model; without it, the model itself with rounded weights")
    parser.add_argument("--draft-bits", type=int, default=4, help="of rounded weights (default: %(default)s)")
    parser.add_argument("--acceptance-tokens", type=int, default=200, help="of text (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/speculation.jsonl"), help="gets a JSON line more")
    return parser.parse_args()


# ---- speed -----------------------------------------------------------------------------------------------------------


def prompts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Four lines again and again, and prose."""
    lines = [
        f'{{"station": "{name}", "state": "ready", "owner": "nobody"}},\n' for name in ("west", "north", "east", "mill")
    ]
    return {
        "repeating": tokenizer.encode("[\n" + "".join(lines * 4)),
        "prose": tokenizer.encode(PROSE.read_text(encoding="utf-8"))[:200],
    }


def measure(
    path: Path, engine_options: EngineOptions, texts: dict[str, list[int]], options: argparse.Namespace
) -> dict[tuple[str, int], list[tuple[Run, Run]]]:
    """(plain, with guesses) of every round, by text and batch. Raises RuntimeError where the answers differ."""
    longest = max(map(len, texts.values())) + options.tokens + 1
    loop = TimedLoop(
        open_model(path),
        engine_options,
        max_sequences=max(options.batches),
        max_tokens=longest + options.num_draft_tokens,
        max_step_tokens=512,
    )
    looked_up = Speculation("prompt_lookup", options.num_draft_tokens, options.ngram)
    runs: dict[tuple[str, int], list[tuple[Run, Run]]] = {}
    for number in range(options.rounds):
        for name, prompt in texts.items():
            for batch in options.batches:
                print(
                    f"\rround {number + 1}/{options.rounds}, {name}, {batch}    ", end="", file=sys.stderr, flush=True
                )
                (plain, answers), (guessed, same) = (
                    run(loop, prompt, batch, options.tokens, speculation) for speculation in (None, looked_up)
                )
                if answers != same:
                    raise RuntimeError(f"the answers to {name!r} differ with guesses")
                runs.setdefault((name, batch), []).append((plain, guessed))
    print(file=sys.stderr)
    return runs


def run(
    loop: TimedLoop, prompt: Sequence[int], batch: int, num_tokens: int, speculation: Speculation | None
) -> tuple[Run, list[list[int]]]:
    """The time is that of decoding alone: from the first token of the last request to the end. Prompts differ in their
    first token, so that no two sequences are one."""
    answers: dict[str, list[int]] = {}
    for row in range(batch):
        answers[loop.add([3 + row, *prompt], num_tokens, speculation)] = []
    started_s, steps, proposed, accepted, counted = 0.0, 0, 0, 0, 0
    while (step := loop.step()) is not None:
        for event in step.events:
            if isinstance(event, Tokens):
                answers[event.sequence_id] += [drawn.token_id for drawn in event.drawn]
                proposed, accepted = proposed + event.proposed_tokens, accepted + event.accepted_tokens
        if started_s:
            steps += 1
        elif all(answers.values()):
            started_s, counted = time.perf_counter(), sum(map(len, answers.values()))
    seconds = time.perf_counter() - started_s
    generated = sum(map(len, answers.values())) - counted
    return Run(seconds, generated, steps, proposed, accepted), list(answers.values())


# ---- acceptance ------------------------------------------------------------------------------------------------------


def rounded(path: Path, folder: Path, bits: int) -> Path:
    """A copy of the model in `folder`, its layers' matrices rounded to `bits`, a scale for 32 weights each."""
    copy = folder / "draft"
    if path.suffix == ".gguf":
        convert_gguf(path, copy)
    else:
        shutil.copytree(path, copy)
    most = 2 ** (bits - 1) - 1
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.dim() == 2 and tensor.shape[1] % ROUNDING_GROUP == 0:
                groups = tensor.float().view(tensor.shape[0], -1, ROUNDING_GROUP)
                scale = groups.abs().amax(dim=2, keepdim=True).clamp_min(1e-12) / most
                tensors[name] = ((groups / scale).round() * scale).view(tensor.shape).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return copy


def distributions(path: Path, options: EngineOptions, token_ids: Sequence[int]) -> NDArray[np.float64]:
    """[len(token_ids) - 1, vocab]: log-probabilities of what follows each token but the last."""
    engine = Engine(open_model(path), options, -(-len(token_ids) // options.block_tokens))
    table = tuple(range(engine.kv.num_blocks))
    rows = np.empty((len(token_ids) - 1, engine.spec.vocab_size))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        piece = tuple(token_ids[start : min(start + ROWS_AT_ONCE, len(rows))])
        targets = tuple(token_ids[start + 1 : start + 1 + len(piece)])
        asked = Slice("text", piece, start, table, None, engine.spec.vocab_size, targets)
        for row, scored in enumerate(engine.execute(StepPlan(0, (asked,))).prompt_logprobs[0], start):
            ids, values = zip(*scored.top, strict=True)
            rows[row, list(ids)] = values
    return rows


def acceptance(
    model: NDArray[np.float64], draft: NDArray[np.float64], temperatures: Sequence[float]
) -> dict[float, dict[str, float]]:
    """Means over [positions, vocab] log-probabilities; at temperature 0 all rules ask for the same likeliest token."""
    found = {}
    for temperature in temperatures:
        if temperature == 0.0:
            same = float((model.argmax(axis=1) == draft.argmax(axis=1)).mean())
            found[temperature] = {"drawn": same, "race": same, "min(p, q)": same}
            continue
        race, least = [], []
        for logits, draft_logits in zip(model, draft, strict=True):
            p, q = (softmax(each / temperature) for each in (logits, draft_logits))
            race.append(race_agreement(p, q))
            least.append(np.minimum(p, q).sum())
        found[temperature] = {
            "drawn": equal_draws(model, draft, temperature),
            "race": float(np.mean(race)),
            "min(p, q)": float(np.mean(least)),
        }
    return found


def equal_draws(model: NDArray[np.float64], draft: NDArray[np.float64], temperature: float) -> float:
    """[positions, vocab] log-probabilities each. Over SEEDS seeds, at each position both with the same numbers."""
    options = torch.tensor([options_of(temperature, 0, 1.0, 0.0)] * len(model), dtype=torch.float64)
    sides, equal = [torch.from_numpy(side).float() for side in (model, draft)], 0
    for seed in range(SEEDS):
        streams = torch.tensor([stream_of(seed, position) for position in range(len(model))])
        one, other = (sample(side, options, streams)[0] for side in sides)
        equal += int((one == other).sum())
    return equal / (SEEDS * len(model))


def race_agreement(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """sum_x 1 / sum_y max(p(y) / p(x), q(y) / q(x)), of positive probabilities. In order of q / p, the first of the two
    is the greater for all y before x, the second from x on."""
    order = np.argsort(q / p)
    p, q = p[order], q[order]
    before, behind = np.cumsum(p) - p, np.cumsum(q[::-1])[::-1]
    return float((1.0 / (before / p + behind / q)).sum())


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.exp(logits - logits.max())
    return weights / weights.sum()


# ---- what came of it -------------------------------------------------------------------------------------------------


def report(
    runs: dict[tuple[str, int], list[tuple[Run, Run]]],
    accepted: dict[float, dict[str, float]],
    options: argparse.Namespace,
) -> None:
    title = f"{options.model}: prompt lookup, {options.num_draft_tokens} guesses behind {options.ngram} tokens"
    table = Table("text", "batch", "plain, tokens/s", "guessed", "faster", "rounds", "steps", "right", title=title)
    speed = []
    for (name, batch), pairs in runs.items():
        plain, guessed = (
            statistics.median(one.num_tokens / one.seconds for one in side) for side in zip(*pairs, strict=True)
        )
        ratios = [one.seconds / other.seconds for one, other in pairs]
        last = pairs[-1]
        right = last[1].accepted_tokens / max(last[1].proposed_tokens, 1)
        table.add_row(
            *(name, str(batch), f"{plain:.0f}", f"{guessed:.0f}", f"× {statistics.median(ratios):.2f}"),
            *(f"{min(ratios):.2f} to {max(ratios):.2f}", f"{last[0].num_steps} → {last[1].num_steps}", f"{right:.0%}"),
        )
        rounds = [[dataclasses.asdict(side) for side in pair] for pair in pairs]
        speed.append({"text": name, "batch": batch, "ratio": statistics.median(ratios), "rounds": rounds})
    console = Console()
    console.print(table)
    drafted = options.draft or f"{options.model} with {options.draft_bits}-bit weights"
    rules = Table("temperature", *accepted[TEMPERATURES[0]], title=f"guesses accepted, draft model {drafted}")
    for temperature, rates in accepted.items():
        rules.add_row(str(temperature), *(f"{rate:.1%}" for rate in rates.values()))
    console.print(rules)
    results = {"speed": speed, "acceptance": {str(key): value for key, value in accepted.items()}}
    append_line(options.results, "speculation", options, results)


if __name__ == "__main__":
    main()
