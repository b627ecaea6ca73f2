"""Which tiles, warps and stages a kernel is launched with: tables by operation and architecture, as data.

`kernels/tuned/<operation>.sm_<architecture>.toml` has rows, of which the first that a shape meets is taken:

    [[row]]
    when = { dim = [65, 128], only_decodes = true }   # a range with both its ends, or the one value
    tiles = { rows = 16, kv_tokens = 32 }             # named as the launcher asks for them
    num_warps = 4
    num_stages = 2

An operation without a table for an architecture takes that of the nearest lower one. Nothing is timed or tried when a
request is served: `python -m kernels.tune` writes the tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("tuned")
# Shared memory that every table of an architecture leaves a block within. sm_80 itself has 163 KiB, but its tables are
# also those of sm_86, sm_89 and sm_120, which have 99.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

Shape = Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    when: Mapping[str, tuple[float, float]]  # from, to; both belong to it
    config: Config

    def meets(self, shape: Shape) -> bool:
        return all(low <= shape[name] <= high for name, (low, high) in self.when.items())


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    operation: str
    architecture: int  # that it was written for
    measured: str  # on what and when; "" for one that no GPU has timed
    rows: tuple[Row, ...]

    def index(self, shape: Shape) -> int:
        """Of the row that a shape takes; the last one takes all."""
        return next(index for index, row in enumerate(self.rows) if row.meets(shape))


def operations() -> list[str]:
    return sorted({path.name.split(".")[0] for path in FOLDER.glob("*.toml")})


@functools.cache
def table(operation: str, architecture: int) -> Table:
    """Raises ValueError for a file that is no table."""
    for written_for in sorted(SHARED_BYTES, reverse=True):
        path = FOLDER / f"{operation}.sm_{written_for}.toml"
        if written_for <= architecture and path.exists():
            return read(path.read_text(encoding="utf-8"), operation, written_for)
    raise ValueError(f"{operation} has no table for sm_{architecture} or lower")


def read(text: str, operation: str, architecture: int) -> Table:
    try:
        content = tomllib.loads(text)
        rows = tuple(map(_row, content.pop("row")))
        measured = content.pop("measured")
        if content or not isinstance(measured, str) or rows[-1].when:
            raise ValueError(f"{sorted(content) or 'the last row'} has no place there")
        if len({frozenset(row.config.tiles) for row in rows}) > 1:
            raise ValueError("rows name different tiles")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"table {operation}.sm_{architecture}: {error}") from error
    return Table(operation, architecture, measured, rows)


def _row(entry: dict[str, Any]) -> Row:
    when = {name: _range(value) for name, value in entry.pop("when", {}).items()}
    config = Config(entry.pop("tiles"), entry.pop("num_warps"), entry.pop("num_stages"))
    for name, value in (*config.tiles.items(), *config.options.items()):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}")
    if entry:
        raise ValueError(f"{sorted(entry)} is not known")
    return Row(when, config)


def _range(value: Any) -> tuple[float, float]:
    low, high = value if isinstance(value, list) else (value, value)
    if not low <= high:
        raise ValueError(f"{value} is no range")
    return low, high


def write(table: Table) -> str:
    """The text of a table, as `read` takes it."""
    lines = [f'measured = "{table.measured}"']
    for row in table.rows:
        when = {name: low if low == high else [low, high] for name, (low, high) in row.when.items()}
        lines += ["", "[[row]]"] + ([f"when = {_inline(when)}"] if when else [])
        lines += [f"tiles = {_inline(row.config.tiles)}"]
        lines += [f"{name} = {value}" for name, value in row.config.options.items()]
    return "\n".join(lines) + "\n"


def _inline(values: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{name} = {str(value).lower()}" for name, value in values.items()) + " }"


def architecture_of(capability: int, shared_bytes: int) -> int:
    """capability: 89 for 8.9; shared_bytes: the most that a block of the device can have. The highest architecture that
    the device has, and whose tables fit it; the lowest where none is."""
    fitting = [name for name, most in SHARED_BYTES.items() if name <= capability and most <= shared_bytes]
    return max(fitting, default=min(SHARED_BYTES))


@functools.cache
def architecture_on(device: torch.device) -> int:
    """Of a CPU, where kernels are interpreted, the lowest."""
    if device.type != "cuda":
        return min(SHARED_BYTES)
    major, minor = torch.cuda.get_device_capability(device)
    properties: Any = torch.cuda.get_device_properties(device)
    return architecture_of(10 * major + minor, properties.shared_memory_per_block_optin)


Chooser = Callable[[str, Shape], Config]
_chooser: Chooser | None = None


def choose(operation: str, device: torch.device, **shape: int) -> Config:
    """shape: every number that a row of the operation's tables names, and no other."""
    if _chooser is not None:
        return _chooser(operation, shape)
    return _chosen(operation, architecture_on(device), tuple(shape.items()))


@functools.lru_cache(maxsize=8192)
def _chosen(operation: str, architecture: int, shape: tuple[tuple[str, int], ...]) -> Config:
    found = table(operation, architecture)
    return found.rows[found.index(dict(shape))].config


@contextlib.contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Within, `chooser` answers every `choose` of this process: for the tuner, and where what a device would launch is
    compiled without one. Never while requests are served."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before
