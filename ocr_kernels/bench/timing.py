"""What repeated measurements of a time come to, and when two of them differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def duration(text: str) -> float:
    """Seconds, of an option; argparse tells of a ValueError."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the interquartile range as a share of it."""

    median: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4)
        return cls(median, (high - low) / median)

    def __str__(self) -> str:
        """In milliseconds."""
        milliseconds = 1e3 * self.median
        number = f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
        return f"{number} ±{self.spread:.0%}"

    def differs(self, other: Timing) -> bool:
        """Whether the two do not overlap, each with its ± as it is printed."""
        return abs(self.median - other.median) > self.median * self.spread + other.median * other.spread
