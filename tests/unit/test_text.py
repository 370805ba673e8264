"""StreamDecoder against decoding everything at once."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_goldens import HARD_STRINGS, all_metadata

from gllm_driver.errors import RequestError
from gllm_driver.loaders.tokenizer import Tokenizer
from gllm_driver.text import StopMatcher, StreamDecoder

NAMES = ["gpt-2", "spm", "spm-no-prefix"]


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_gguf(all_metadata()[name])


def stream(tok: Tokenizer, ids: list[int], stop: list[str], prompt: list[int]) -> tuple[list[str], str | None]:
    decoder = StreamDecoder(tok, stop, prompt)
    pieces = [decoder.push(token_id) for token_id in ids]
    return [*pieces, decoder.finish()], decoder.stopped_by


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Before the stop string that ends first; of those that end together, the longest."""
    ends = [(text.index(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, found = min(ends)
    return text[: end - len(found)], found


# Ids that make bytes, specials and words about equally likely, and stop strings that such texts contain.
token_ids = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 1450)), max_size=30)
stops = st.lists(st.text(st.sampled_from("a es\n\ufffd\xe9"), min_size=1, max_size=4), max_size=4)


@pytest.mark.parametrize("name", NAMES)
@given(ids=token_ids, stop=stops)
def test_pieces_add_up_to_the_cut_text(name: str, ids: list[int], stop: list[str]) -> None:
    tok = tokenizer(name)
    pieces, stopped_by = stream(tok, ids, stop, [])
    want, found = cut(tok.decode(ids), stop)
    assert ("".join(pieces), stopped_by) == (want, found)


@pytest.mark.parametrize("name", NAMES)
@given(prompt=token_ids, ids=token_ids)
def test_a_prompt_before_it_changes_nothing_but_the_start(name: str, prompt: list[int], ids: list[int]) -> None:
    """Where the prompt is whole characters, prompt and pieces make the whole text."""
    tok = tokenizer(name)
    before = tok.decode(prompt)
    if not before.endswith("\ufffd"):
        assert before + "".join(stream(tok, ids, [], prompt)[0]) == tok.decode(prompt + ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", HARD_STRINGS)
def test_hard_strings_stream_whole(name: str, text: str) -> None:
    tok = tokenizer(name)
    ids = tok.encode(text)
    pieces, _ = stream(tok, ids, [], [])
    assert "".join(pieces) == tok.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_is_shown_once_it_is_whole() -> None:
    tok = tokenizer("spm")
    assert stream(tok, [3 + byte for byte in "é😀".encode()], [], [5])[0] == ["", "é", "", "", "", "😀", ""]


def test_a_broken_off_character_is_shown_at_the_end() -> None:
    assert stream(tokenizer("spm"), [3 + 0xF0, 3 + 0x9F], [], [])[0] == ["", "", "\ufffd"]


def test_a_prompt_may_end_inside_a_character() -> None:
    euro = [3 + byte for byte in "€".encode()]
    assert "".join(stream(tokenizer("spm"), euro[2:], [], euro[:2])[0]) == "€"


def test_the_leading_space_is_dropped_only_at_the_start() -> None:
    tok = tokenizer("spm")
    ids = tok.encode("a b", add_special=False)
    assert "".join(stream(tok, ids, [], [])[0]) == "a b"
    assert "".join(stream(tok, ids, [], [1])[0]) == "a b"  # after BOS alone
    assert "".join(stream(tok, ids, [], [1, ids[0]])[0]) == " a b"


def feed_all(stop: list[str], parts: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stop)
    shown = []
    for part in parts:
        text, found = matcher.feed(part)
        shown.append(text)
        if found is not None:
            return shown, found
    return [*shown, matcher.flush()], None


def test_only_a_possible_beginning_is_held_back() -> None:
    assert feed_all(["</end>"], ["a <", "/en", "x b<", "/"]) == (["a ", "", "</enx b", "", "</"], None)
    assert feed_all(["END"], ["E", "N", "D more"]) == (["", "", ""], "END")
    assert feed_all(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], "aab")


def test_which_of_several_stop_strings_wins() -> None:
    assert feed_all(["abc", "b"], ["abc"]) == (["a"], "b")  # ends first
    assert feed_all(["b", "ab"], ["xab"]) == (["x"], "ab")  # end together: the longest
    assert feed_all(["ab", "abc"], ["a", "bc"]) == (["", ""], "ab")


@given(stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1), parts=st.lists(st.text("abc", max_size=4)))
def test_stop_strings_are_found_however_the_text_is_cut(stop: list[str], parts: list[str]) -> None:
    shown, found = feed_all(stop, parts)
    assert ("".join(shown), found) == cut("".join(parts), stop)


def test_nothing_comes_after_a_stop() -> None:
    tok = tokenizer("gpt-2")
    decoder = StreamDecoder(tok, ["b"])
    assert "".join(decoder.push(n) for n in tok.encode("abc")) == "a"
    assert decoder.stopped_by == "b"
    assert decoder.push(tok.encode("x")[0]) == ""
    assert decoder.finish() == ""


def test_special_tokens_have_no_text() -> None:
    tok = tokenizer("gpt-2")
    ids = [*tok.encode("a"), *tok.eos_token_ids, *tok.encode("b")]
    assert "".join(stream(tok, ids, [], [])[0]) == "ab"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="must not be empty"):
        StreamDecoder(tokenizer("gpt-2"), ["a", ""])


def test_cost_does_not_grow_with_the_text() -> None:
    tok = tokenizer("gpt-2")
    ids = tok.encode("def f(x):\n    return x + 1\n") * 40
    decoder = StreamDecoder(tok, ["\n\n\n", "</s>"])

    def seconds_per_token() -> float:
        start = time.process_time()
        for token_id in ids:
            decoder.push(token_id)
        return (time.process_time() - start) / len(ids)

    early = min(seconds_per_token() for _ in range(5))
    for _ in range(100):
        seconds_per_token()
    assert min(seconds_per_token() for _ in range(5)) < 5 * early + 1e-6
