"""BPE-dropout (Provilkov et al., 2020): texts cut into pieces anew each time.

A model that sees a word in many cuts learns what its parts mean. SentencePiece can leave out merges
too, but differently in each process; what is left out here is a function of the seed and the text.
"""

import heapq
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, repeat

import sentencepiece

from jaxlm.tokenizer_base import SPACE_MARK

# No piece reaches over the end of such a stretch: spaces and what follows them up to the next.
WORDS = re.compile(f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+")


class DropoutBPE:
    """The pieces of a SentencePiece BPE model, with merges left out at random."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, rate: float, seed: int):
        """Each merge is left out with probability `rate`; with 0 the model's own pieces come."""
        self.rate, self.seed = rate, seed
        special = processor.is_control, processor.is_unknown, processor.is_byte
        pieces = {
            processor.id_to_piece(i): i
            for i in range(len(processor))
            if not any(kind(i) for kind in special)
        }
        self._ids = pieces
        self._scores = {piece: processor.get_score(i) for piece, i in pieces.items()}
        self._bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._whole = lru_cache(1 << 16)(lambda word: self._merged(word, repeat(False)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text without U+2581."""
        draw = random.Random(f"{self.seed}:{text}").random
        drops = iter(lambda: draw() < self.rate, None)
        ids = []
        for word in WORDS.findall(text.replace(" ", SPACE_MARK)):
            whole, merges = self._whole(word)
            drawn = [next(drops) for _ in range(merges)]
            ids += self._merged(word, chain(drawn, drops))[0] if any(drawn) else whole
        return ids

    def _merged(self, word: str, drops: Iterator[bool]) -> tuple[list[int], int]:
        """The ids of a word, and how many merges there were; `drops` says which are left out.

        As in SentencePiece the best pair is merged first, of equals the leftmost, and what is left
        out once is not tried again.
        """
        parts, end = list(word), len(word)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        pairs: list[tuple[float, int, str]] = []

        def offer(at: int) -> None:
            """Note the pair that begins at a part, if it is a piece."""
            if at >= 0 and after[at] < end:
                pair = parts[at] + parts[after[at]]
                if (score := self._scores.get(pair)) is not None:
                    heapq.heappush(pairs, (-score, at, pair))

        for at in range(end):
            offer(at)
        while pairs:
            _, at, pair = heapq.heappop(pairs)
            right = after[at]
            # One of its parts may have been merged into another since.
            is_there = parts[at] and right < end and parts[at] + parts[right] == pair
            if not is_there or next(drops):
                continue
            parts[at], parts[right] = pair, ""
            after[at] = after[right]
            if after[at] < end:
                before[after[at]] = at
            offer(before[at])
            offer(at)
        found = [part for part in parts if part]
        return [i for part in found for i in self._spelt(part)], end - len(found)

    def _spelt(self, part: str) -> list[int]:
        """A piece's id or, of a character that has none, its bytes'."""
        i = self._ids.get(part)
        return [self._bytes[byte] for byte in part.encode()] if i is None else [i]
