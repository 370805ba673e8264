"""SentencePiece BPE with scores (Kudo and Richardson 2018), as GGUF's tokenizer model `llama` stores it.

At each step the adjacent pair whose concatenation is the token with the highest score is merged, the leftmost of
equals. That is not a list of merges: pairs that give the same token rank equally, and scores may be equal; so it is
done here from the scores themselves. Texts are cut into words that no token can span, and words are remembered.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Mapping, Sequence

from .codecs import fallback_byte

SPACE = "▁"  # U+2581 stands for a space
_MAX_CACHED_WORDS = 1 << 16
_MAX_CACHED_LENGTH = 64


class SpmCodec:
    """pieces: the vocabulary. scores: by piece, for those that merging may give. user_defined: found in the text before
    anything else. byte_ids: [256], or None where bytes have no tokens; then unknown_id stands for unknown text."""

    has_text = True

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Mapping[str, float],
        ids: Mapping[str, int],
        *,
        user_defined: Collection[str],
        byte_ids: Sequence[int] | None,
        unknown_id: int | None,
        add_space_prefix: bool,
    ) -> None:
        self._pieces = pieces
        self._scores = scores
        self._ids = ids
        self._bytes_of_id = {} if byte_ids is None else {token_id: bytes((n,)) for n, token_id in enumerate(byte_ids)}
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        self._raw = frozenset(ids[piece] for piece in user_defined)
        longest_first = sorted((p for p in user_defined if p), key=len, reverse=True)
        self._user_defined = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._words = _word_pattern([piece for piece in scores if len(piece) > 1])
        self._cache: dict[str, tuple[int, ...]] = {}
        self._add_space_prefix = self.strips_leading_space = add_space_prefix

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, *, continues: bool) -> list[int]:
        """Every text begins with the dummy space, whatever came before (as llama.cpp does after a special token), and
        so does text that follows a user-defined token."""
        ids: list[int] = []
        # The pattern has one group, so odd places hold the user-defined tokens.
        for n, part in enumerate(self._user_defined.split(text) if self._user_defined else [text]):
            if n % 2:
                ids.append(self._ids[part])
            elif part:
                self._encode_part((" " + part if self._add_space_prefix else part).replace(" ", SPACE), ids)
        if self._byte_ids is None:  # one unknown token for a run of unknown text
            ids = [i for n, i in enumerate(ids) if i != self._unknown_id or n == 0 or ids[n - 1] != i]
        return ids

    def piece(self, token_id: int) -> str:
        return self._pieces[token_id]

    def piece_bytes(self, token_id: int) -> bytes:
        byte = self._bytes_of_id.get(token_id)
        if byte is not None:
            return byte
        piece = self._pieces[token_id]
        return (piece if token_id in self._raw else piece.replace(SPACE, " ")).encode("utf-8", "surrogateescape")

    def id_of(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def _encode_part(self, text: str, ids: list[int]) -> None:
        cache = self._cache
        for word in self._words.findall(text):
            word_ids = cache.get(word)
            if word_ids is None:
                word_ids = tuple(self._encode_word(word))
                if len(word) <= _MAX_CACHED_LENGTH:
                    if len(cache) >= _MAX_CACHED_WORDS:
                        cache.clear()
                    cache[word] = word_ids
            ids += word_ids

    def _encode_word(self, word: str) -> list[int]:
        scores = self._scores
        symbols = list(word)  # a merged symbol stands at its first character's place, "" at the others
        before = list(range(-1, len(word) - 1))
        after = list(range(1, len(word) + 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                pair = symbols[left] + symbols[right]
                score = scores.get(pair)
                if score is not None:
                    heapq.heappush(queue, (-score, left, right, pair))

        for n in range(1, len(symbols)):
            offer(n - 1, n)
        while queue:
            _, left, right, pair = heapq.heappop(queue)
            # An entry is stale once a side of it has merged with something else.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(pair):
                continue
            symbols[left], symbols[right] = pair, ""
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        ids: list[int] = []
        for symbol in filter(None, symbols):
            self._append(symbol, ids)
        return ids

    def _append(self, symbol: str, ids: list[int]) -> None:
        if symbol in self._scores:
            ids.append(self._ids[symbol])
        elif self._byte_ids is not None:
            ids += [self._byte_ids[byte] for byte in symbol.encode()]
        elif self._unknown_id is not None:
            ids.append(self._unknown_id)


def byte_ids_of(ids: Mapping[str, int]) -> list[int] | None:
    """Ids [256] of the byte tokens `<0x00>` … `<0xFF>`; None unless all are there."""
    by_byte = {byte: token_id for piece, token_id in ids.items() if (byte := fallback_byte(piece)) is not None}
    return [by_byte[n] for n in range(256)] if len(by_byte) == 256 else None


def _word_pattern(merged: Sequence[str]) -> re.Pattern[str]:
    """Cuts a text where no token of several characters reaches across: around characters that occur in none of them,
    and, if spaces only begin tokens, before each run of spaces."""
    chars = "".join(map(re.escape, sorted(set().union(*merged) - {SPACE})))
    letters = f"[{chars}]" if chars else "(?!)"
    inner_space = any(SPACE in piece.lstrip(SPACE) for piece in merged)
    words = f"(?:{SPACE}|{letters})+" if inner_space else f"{SPACE}*{letters}+|{SPACE}+"
    return re.compile(f"{words}|.", re.DOTALL)
