"""An answer handed on while it is written, in pieces that together are its text. Knows tokens; no grammar, no boxes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from tokenizers import Tokenizer

OnText = Callable[[str], Any]


class Writer:
    """Hands an answer on as it grows, in pieces that together are its text."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], on_text: OnText) -> None:
        self._tokenizer, self._stop_ids, self._on_text = tokenizer, stop_ids, on_text
        self._written = 0

    def __call__(self, tokens: list[int]) -> None:
        """All tokens so far."""
        if tokens[-1] in self._stop_ids:
            return
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
            self.rest(text)

    def rest(self, text: str) -> None:
        """What of the text was not handed on yet."""
        if piece := text[self._written :]:
            self._written = len(text)
            self._on_text(piece)
