"""The greedy loop on a decoder that follows a script: where it stops, and what it passes on at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from gemvg_edge.decoding import Rope, decode, embed_prompt, prefill
from gemvg_edge.engines.protocol import Floats
from gemvg_edge.positions import RopeTable, mrope_table, text_positions

VOCAB, HIDDEN, STOP = 10, 4, 9
ROPE = Rope(head_dim=8, theta=100.0, sections=(1, 1, 2))


@dataclass
class ScriptedCache:
    """Counts tokens instead of holding keys and values."""

    capacity: int
    tokens: int = 0

    @property
    def bytes(self) -> int:
        """Nothing."""
        return 0


@dataclass
class ScriptedDecoder:
    """Says the tokens of a script one after the other and keeps what it was given."""

    script: list[int]
    calls: list[tuple[Floats, int, RopeTable]] = field(default_factory=list)

    def new_cache(self, capacity: int) -> ScriptedCache:
        """An empty cache."""
        return ScriptedCache(capacity)

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Rows that tell the ids apart."""
        return np.repeat(ids[:, None], HIDDEN, axis=1).astype(np.float32)

    def forward(self, embeddings: Floats, cache: ScriptedCache, past: int, table: RopeTable) -> Floats:
        """The script's next token has the highest logit."""
        assert past == cache.tokens, "every token is in the cache once"
        cache.tokens += len(embeddings)
        assert cache.tokens <= cache.capacity
        self.calls.append((embeddings, past, table))
        return self.logits()

    def next_token(self, embeddings: Floats, cache: ScriptedCache, past: int, table: RopeTable) -> int:
        """The script's next token."""
        return int(self.forward(embeddings, cache, past, table).argmax())

    def logits(self) -> Floats:
        """The next token's."""
        logits = np.linspace(-1, 0, VOCAB, dtype=np.float32)
        logits[self.script.pop(0)] = 1
        return logits


CASES = [
    # label, script, stop ids, max_tokens, tokens, forward passes
    ("stops at the stop token and keeps it", [3, 5, STOP, 7], [STOP], 8, [3, 5, STOP], 2),
    ("stops at the first token", [STOP, 7], [STOP], 8, [STOP], 0),
    ("stops at any of several", [3, 8, STOP], (8, STOP), 8, [3, 8], 1),
    ("is cut at max_tokens", [3, 5, 7, 1, 2], [STOP], 3, [3, 5, 7], 2),
    ("one token only", [3, 5], [STOP], 1, [3], 0),
    ("the stop token as the last that fits", [3, STOP, 5], [STOP], 2, [3, STOP], 1),
    ("repeats itself", [3] * 9, [STOP], 5, [3] * 5, 4),
]


@pytest.mark.parametrize(("label", "script", "stop_ids", "most", "tokens", "passes"), CASES, ids=lambda v: str(v))
def test_stops(label: str, script: list[int], stop_ids: list[int], most: int, tokens: list[int], passes: int) -> None:
    decoder, cache = ScriptedDecoder(script[1:]), ScriptedCache(100, tokens=20)
    assert decode(decoder, ROPE, script[0], cache, 20, 12, stop_ids, most) == tokens, label
    assert len(decoder.calls) == passes


def test_each_step_passes_its_token_past_and_position() -> None:
    decoder, cache = ScriptedDecoder([5, 7, STOP]), ScriptedCache(100, tokens=20)
    decode(decoder, ROPE, 3, cache, past=20, position=12, stop_ids=[STOP], max_tokens=8)
    assert [call[0].tolist() for call in decoder.calls] == [[[token] * HIDDEN] for token in (3, 5, 7)]
    assert [call[1] for call in decoder.calls] == [20, 21, 22]
    for step, (_, _, table) in enumerate(decoder.calls):
        expected = mrope_table(text_positions(12 + step, 1), ROPE.head_dim, ROPE.theta, ROPE.sections)
        assert np.array_equal(table.cos, expected.cos)
        assert np.array_equal(table.sin, expected.sin)


def test_prefill_passes_the_table_of_its_positions() -> None:
    decoder, cache = ScriptedDecoder([3]), ScriptedCache(100, tokens=2)
    positions = np.array([[5, 5, 6], [5, 6, 7], [5, 7, 7]])  # (3, tokens)
    logits = prefill(decoder, ROPE, decoder.embed(np.arange(3)), positions, cache, 2)
    assert logits.argmax() == 3
    embeddings, past, table = decoder.calls[0]
    assert (embeddings.shape, past, table.cos.shape, cache.tokens) == ((3, HIDDEN), 2, (3, 4), 5)
    streams = [0, 1, 2, 2]  # which stream each of the four frequencies follows
    frequencies = 100.0 ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(table.cos, np.cos(positions[streams].T * frequencies), atol=1e-6)
    np.testing.assert_allclose(table.sin, np.sin(positions[streams].T * frequencies), atol=1e-6)


def test_pictures_take_their_places_in_order() -> None:
    picture = 8
    ids = np.array([1, picture, picture, 2, picture, 3])
    first, second = np.full((2, HIDDEN), 0.25, np.float32), np.full((1, HIDDEN), 0.5, np.float32)
    embeddings = embed_prompt(ScriptedDecoder([]), ids, picture, [first, second])
    assert embeddings[:, 0].tolist() == [1, 0.25, 0.25, 2, 0.5, 3]
    assert embed_prompt(ScriptedDecoder([]), ids[:1], picture, []).tolist() == [[1] * HIDDEN]
