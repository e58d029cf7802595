"""How sure a model was of a box: the probabilities of the tokens that wrote it, and what they turned out to mean.

Knows tokens and characters; no logits, no pictures. `bench.calibration` measures what a bundle's probabilities mean.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

from gemvg_edge.answer_pieces import Span
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import short

LARGEST = 1e6  # of both numbers, far past what any fit gives


@dataclass(frozen=True)
class Calibration:
    """What share of boxes of a probability p was right, as held-out questions showed: 1 / (1 + exp(-a log(p) - b))."""

    a: float = 1.0  # rises with p
    b: float = 0.0

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Calibration:
        """Read the two numbers."""
        calibration = Calibration(**config)
        for name, value, low in (("a", calibration.a, 0), ("b", calibration.b, -LARGEST)):
            if type(value) not in (int, float) or not low <= value <= LARGEST:
                raise GemvgError(f"{name} is {short(value)}, not a number of {low:g} to {LARGEST:g}")
        return Calibration(float(calibration.a), float(calibration.b))

    def to_config(self) -> dict[str, Any]:
        """The same fields as plain JSON values."""
        return asdict(self)

    def score(self, log_prob: float) -> float:
        """0..1, of the logarithm of a probability."""
        return 1 / (1 + math.exp(min(700.0, -self.a * log_prob - self.b)))


def box_scores(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    log_probs: Sequence[float],
    text: str,
    calibration: Calibration | None,
) -> Callable[[Sequence[Span]], float]:
    """For `answer.read_answer`: the spans of a text that say a box -> its score, 0..1.

    The score is the product of its tokens' probabilities, or what share of boxes of that was right in `calibration`.
    """
    ends = token_ends(tokenizer, tokens, text)

    def score(spans: Sequence[Span]) -> float:
        log_prob = box_log_prob(ends, log_probs, spans)
        return math.exp(log_prob) if calibration is None else calibration.score(log_prob)

    return score


def box_log_prob(ends: Sequence[int], log_probs: Sequence[float], spans: Sequence[Span]) -> float:
    """The sum over the tokens that write a character of the spans; `ends`: up to which character each token writes."""
    tokens: set[int] = set()
    for start, stop in spans:
        tokens.update(range(bisect_right(ends, start), min(bisect_right(ends, stop - 1) + 1, len(ends))))
    return math.fsum(log_probs[k] for k in tokens)


def token_ends(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[int]:
    """How many characters of their `text` are written once each of the tokens is there."""
    ends, end = [], 0
    for token in tokens:
        end += len(tokenizer.decode([token], skip_special_tokens=False))
        ends.append(end)
    if end != len(text):  # a character of several tokens
        ends = [len(tokenizer.decode(list(tokens[: k + 1]), skip_special_tokens=False)) for k in range(len(tokens))]
    return ends
