"""The lines of bench.gpu, and its figures beside what was aimed at."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Met from `least` on; `stretch` is what would be better still."""

    key: str
    what: str
    least: float
    stretch: float | None
    is_share: bool


TARGETS = (
    Target("8B decode", "8B, decode at batch 1, share of the copy's bandwidth", 0.70, 0.80, True),
    Target("1B decode", "1B, decode at batch 1, share of the copy's bandwidth", 0.55, 0.75, True),
    Target("graphs", "1B, decode at batch 1, graphs against eager", 2.0, None, False),
    Target("prefill", "8B, prefill of 8k tokens, share of 989 TFLOP/s", 0.60, 0.70, True),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    what: str
    value: float | None
    unit: str
    share: float | None = None
    of: str = ""
    error: str = ""


class Report:
    """Lines in the order in which they came; a part that fails leaves one too. `figures` are what targets ask for."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.figures: dict[str, float] = {}

    def add(self, what: str, value: float, unit: str, share: float | None = None, of: str = "") -> None:
        self.lines.append(Line(what, value, unit, share, of))
        print(f"{what}: {value:.4g} {unit}", file=sys.stderr, flush=True)

    def attempt(self, what: str, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:
            self.lines.append(
                Line(what, None, "", error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            )
            print(f"{what} failed: {self.lines[-1].error}", file=sys.stderr, flush=True)

    def print(self, title: str) -> None:
        table = Table("", "value", "", "share", "of", title=title)
        for line in self.lines:
            value = f"[bold]{line.error}[/bold]" if line.value is None else f"{line.value:.4g}"
            table.add_row(line.what, value, line.unit, "" if line.share is None else f"{line.share:.1%}", line.of)
        Console().print(table)
        verdicts = Table("target", "least", "stretch", "figure", "met", title="what was aimed at")
        for verdict in self.verdicts():
            shown = [_shown(verdict[key], bool(verdict["is_share"])) for key in ("least", "stretch", "figure")]
            verdicts.add_row(str(verdict["what"]), *shown, str(verdict["met"]))
        Console(width=140).print(verdicts)

    def verdicts(self) -> list[dict[str, object]]:
        """One for each target; `met` is "no figure" where its part failed or did not run."""
        found: list[dict[str, object]] = []
        for target in TARGETS:
            figure = self.figures.get(target.key)
            verdict = "no figure" if figure is None else met(figure, target.least, target.stretch)
            found.append(dataclasses.asdict(target) | {"figure": figure, "met": verdict})
        return found


def met(figure: float, least: float, stretch: float | None) -> str:
    if stretch is not None and figure >= stretch:
        return "stretch"
    return "yes" if figure >= least else "no"


def _shown(value: object, is_share: bool) -> str:
    if not isinstance(value, float):
        return ""
    return f"{value:.1%}" if is_share else f"{value:.2f} ×"
