"""How many tokens a prompt or an answer has: one number, or a distribution.

    128                   always
    32-256                uniform, both ends included
    normal:128,32         mean, standard deviation
    lognormal:128,0.6     median, standard deviation of the logarithm; what chat traffic looks like

A draw is rounded, and is at least 1.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re

from legato.errors import InvalidParameter

FORMS = "N, LOW-HIGH, normal:MEAN,SD or lognormal:MEDIAN,SIGMA"
_NUMBER = r"(\d+(?:\.\d+)?)"


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """`first` and `second` are the two parameters of `kind` in the order of the module's table."""

    kind: str
    first: float
    second: float
    written: str

    def __str__(self) -> str:
        return self.written

    def draw(self, uniform: random.Random) -> int:
        if self.kind == "uniform":
            return uniform.randint(int(self.first), int(self.second))
        if self.kind == "normal":
            return max(1, round(uniform.gauss(self.first, self.second)))
        return max(1, round(uniform.lognormvariate(math.log(self.first), self.second)))


def parse_lengths(written: str, field: str) -> Lengths:
    """Raises InvalidParameter, with `field` as the name of what is wrong."""
    text = written.strip()
    if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        low = int(found[1])
        lengths = Lengths("uniform", low, int(found[2] or low), text)
        is_sound = 1 <= lengths.first <= lengths.second
    elif found := re.fullmatch(rf"(normal|lognormal):{_NUMBER},{_NUMBER}", text):
        lengths = Lengths(found[1], float(found[2]), float(found[3]), text)
        is_sound = lengths.first >= 1
    else:
        raise InvalidParameter(f"{field} must be {FORMS}, is {written!r}", details={"field": field})
    if not is_sound:
        raise InvalidParameter(
            f"{field} must be at least 1 token and not end before it begins, is {written!r}", details={"field": field}
        )
    return lengths
