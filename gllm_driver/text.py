"""Token ids to text as they arrive: nothing is shown that a later token could change."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

from .errors import RequestError
from .loaders.tokenizer import Tokenizer


class StreamDecoder:
    """The text of a growing sequence of tokens, in pieces.

    `push(token_id)` returns what is final now: it holds back the bytes of an unfinished character and any end of the
    text that may be the beginning of a stop string. `finish()` returns the rest. All pieces together are
    `tokenizer.decode(ids)` cut before a stop string. That is the one whose last character comes first, so the result
    depends on the text alone and not on how it is cut into tokens; of those that end together, the longest.
    `stopped_by` names it; from then on every piece is empty. Special tokens have no text.

    prompt_ids: what stands before the first token. It decides whether SentencePiece's leading space is dropped, and
    completes a character that the prompt broke off.

    Cost: constant per character, whatever came before. Raises RequestError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop) if stop else None
        self._at_start = tokenizer.strips_leading_space
        self.stopped_by: str | None = None
        tail = self._prompt_tail(prompt_ids)
        if tail:
            self._at_start = False
            self._utf8.decode(tail)

    def push(self, token_id: int) -> str:
        """The text that is final once this token has come; often empty."""
        if self.stopped_by is not None or token_id in self._special:
            return ""
        return self._emit(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """What was held back. Bytes of an unfinished character become U+FFFD."""
        if self.stopped_by is not None:
            return ""
        text = self._emit(self._utf8.decode(b"", final=True))
        if self._matcher is not None and self.stopped_by is None:
            text += self._matcher.flush()
        return text

    def _emit(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            text = text[1:] if text[0] == " " else text
        if self._matcher is None or not text:
            return text
        shown, self.stopped_by = self._matcher.feed(text)
        return shown

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> bytes:
        """The last bytes of the prompt, at least three if it has them: an unfinished character has no more."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id not in self._special:
                tail = self._tokenizer.token_bytes(token_id) + tail
                if len(tail) >= 3:
                    break
        return tail


class StopMatcher:
    """Finds stop strings in a text that comes in parts (Aho and Corasick 1975).

    A state is the longest end of the text that is the beginning of a stop string, which is exactly what must be held
    back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise RequestError("a stop string must not be empty")
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]  # the longest stop string that ends here
        self._fallback = [0]
        for string in stop:
            self._insert(string)
        self._link()
        self._state = 0
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string that was found, if one was."""
        window = self._held + text
        state = self._state
        following = self._next
        for n, char in enumerate(text, len(self._held) + 1):
            while state and char not in following[state]:
                state = self._fallback[state]
            state = following[state].get(char, 0)
            match = self._match[state]
            if match is not None:
                self._state, self._held = 0, ""
                return window[: n - len(match)], match
        self._state = state
        cut = len(window) - self._depth[state]
        self._held = window[cut:]
        return window[:cut], None

    def flush(self) -> str:
        """What is held back, once nothing more comes."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
                self._fallback.append(0)
            state = self._next[state][char]
        self._match[state] = string

    def _link(self) -> None:
        """Breadth first, so that the fallback of a state is ready before those of longer ones."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                fallback = self._fallback[state]
                while fallback and char not in self._next[fallback]:
                    fallback = self._fallback[fallback]
                self._fallback[child] = self._next[fallback].get(char, 0)
                self._match[child] = self._match[child] or self._match[self._fallback[child]]
                queue.append(child)
