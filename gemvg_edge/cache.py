"""What earlier looks left: visual tokens of pictures, and keys and values of sequences of them; bounded in bytes.

Pictures are known by a digest of what the vision tower is given. Knows neither prompts nor how an engine keeps its
keys and values: only what they take.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemvg_edge.engines.protocol import Floats, KeyValueCache
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Preprocessing
from gemvg_edge.json_object import short

# Four pictures of 448 x 448 pixels take Qwen2-VL-2B 64 MB in float32, and the 7B in float16 as much: some scenes of a
# robot find room in this, and it is little beside the weights of either.
CACHE_BYTES = 256 * 2**20
MOST_BYTES = 2**50

Digest = bytes  # of a picture
SequenceKey = tuple[Digest, ...]  # the pictures of a scene, or its first ones


class Prefix(NamedTuple):
    """Keys and values of pictures that stand at the start of a scene."""

    cache: Any  # an engine's, never written again
    pictures: int  # how many of the scene's it holds, counted from the first


class SceneCache:
    """Visual tokens and prefixes, the least recently used leaving first; used from any thread.

    `limit` bounds the bytes of both together; what is larger by itself is not kept, and 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        if isinstance(limit, np.integer):
            limit = int(limit)
        if type(limit) is not int or not 0 <= limit <= MOST_BYTES:
            raise GemvgError(f"cache_bytes={short(limit)}; give a whole number of bytes, or 0 to keep nothing")
        self.limit = limit
        self._bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Digest | SequenceKey, tuple[Any, int]] = OrderedDict()  # the next to leave first
        self._sequences: set[SequenceKey] = set()  # those of its keys that are prefixes

    @property
    def bytes(self) -> int:
        """What all that is kept takes."""
        return self._bytes

    def tokens(self, picture: Digest) -> Floats | None:
        """A picture's visual tokens (tokens, width), which must not be written; None where they are not kept."""
        with self._lock:
            if (entry := self._entries.get(picture)) is None:
                return None
            self._entries.move_to_end(picture)
            found: Floats = entry[0]
            return found

    def keep_tokens(self, picture: Digest, tokens: Floats) -> None:
        """Keep a copy of a picture's visual tokens: a view would hold all pictures of its batch."""
        if self.holds(tokens.nbytes):
            kept = tokens.copy()
            kept.flags.writeable = False
            self._keep(picture, kept, kept.nbytes)

    def prefix(self, pictures: Sequence[Digest]) -> Prefix | None:
        """The longest start of these pictures that is kept."""
        wanted = tuple(pictures)
        with self._lock:
            best = max(self._sequences, key=lambda sequence: _common(sequence, wanted), default=())
            if not (common := _common(best, wanted)):
                return None
            self._entries.move_to_end(best)
            for picture in wanted[:common]:  # needed no more now, but again once the prefix has left
                if picture in self._entries:
                    self._entries.move_to_end(picture)
            return Prefix(self._entries[best][0], common)

    def holds(self, size: int) -> bool:
        """Whether something of this size may be kept."""
        return 0 < size <= self.limit

    def keep_prefix(self, pictures: Sequence[Digest], cache: KeyValueCache) -> None:
        """Keep the keys and values of these pictures, in a cache that nothing writes any more."""
        sequence = tuple(pictures)
        if self.holds(cache.bytes):
            with self._lock:
                for shorter in [one for one in self._sequences if one == sequence[: len(one)]]:
                    self._drop(shorter)  # it is the start of this one
            self._keep(sequence, cache, cache.bytes)

    def close(self) -> None:
        """Let all of it go and keep nothing more."""
        with self._lock:
            self.limit = self._bytes = 0
            self._entries.clear()
            self._sequences.clear()

    def _keep(self, key: Digest | SequenceKey, value: Any, size: int) -> None:
        with self._lock:
            if key in self._entries:
                self._drop(key)
            while self._entries and self._bytes + size > self.limit:
                self._drop(next(iter(self._entries)))
            if self._bytes + size <= self.limit:  # it may have been closed meanwhile
                self._entries[key] = value, size
                self._bytes += size
                if isinstance(key, tuple):
                    self._sequences.add(key)

    def _drop(self, key: Digest | SequenceKey) -> None:
        _, size = self._entries.pop(key)
        self._bytes -= size
        if isinstance(key, tuple):
            self._sequences.discard(key)


def picture_key(pixels: npt.NDArray[np.uint8], numbers: Preprocessing) -> Digest:
    """A digest of a resized picture (height, width, 3) and of what makes patches of it.

    Pixel budgets and the resize's filter are not part of it: the pixels are what came of them.
    """
    how = (numbers.patch_size, numbers.temporal_patch_size, numbers.merge_size, numbers.rescale_factor)
    told = repr((pixels.shape, how, numbers.image_mean, numbers.image_std))
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, key=hashlib.sha256(told.encode()).digest()).digest()


def _common(one: SequenceKey, other: SequenceKey) -> int:
    """How many pictures two sequences have in common at their start."""
    for k, (a, b) in enumerate(zip(one, other)):  # noqa: B905  # of unequal lengths
        if a != b:
            return k
    return min(len(one), len(other))
