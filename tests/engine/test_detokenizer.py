"""Tokens to text and stop strings: whatever the borders of tokens, the text is that of all tokens at once."""

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import decoders
from tokenizers.decoders import DecodeStream

from kvjax.engine.text.detokenizer import Detokenizer, StopStrings
from kvjax.engine.text.tokenizer import REPLACEMENT, Tokenizer
from tests.engine import tiny, vocabularies
from tests.engine.vocabularies import TEXT


@pytest.fixture(scope="module")
def of_name():
    return {name: vocabularies.make(name) for name in vocabularies.NAMES}


NAMES = pytest.mark.parametrize("name", vocabularies.NAMES)


def detokenize(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each push shows, and what is left at the end."""
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push([token]) for token in tokens), detokenizer.flush()]


@NAMES
@hypothesis.given(text=TEXT)
@hypothesis.example("😀😀😀😀")
@hypothesis.example("你好你好你好")
@hypothesis.example(f"a{REPLACEMENT}")
def test_steps_join_to_the_text(of_name, name, text):
    tokenizer = of_name[name]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    steps = detokenize(tokenizer, tokens)
    assert "".join(steps) == tokenizer.decode(tokens) == text
    assert steps[-1] == ""  # whole characters never wait for the end
    for step in steps:
        step.encode()  # no half of a surrogate pair
    assert sum(step.count(REPLACEMENT) for step in steps) == text.count(REPLACEMENT)


@NAMES
@hypothesis.given(text=TEXT, cut=st.integers(0, 200))
def test_an_unfinished_character_at_the_end_is_left_out(of_name, name, text, cut):
    tokenizer = of_name[name]
    tokens = tokenizer.encode(text, add_special_tokens=False)[:cut]
    whole = b"".join(tokenizer.token_bytes(token) for token in tokens)
    assert "".join(detokenize(tokenizer, tokens)) == whole.decode(errors="ignore")


@NAMES
@hypothesis.given(st.data())
def test_tokens_that_are_no_text_lose_nothing_that_is(of_name, name, data):
    """Between random tokens stands text, which must come out whole and soon."""
    tokenizer = of_name[name]
    random = st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=12)  # and tokens it does not have
    noise, more = data.draw(random), data.draw(random)
    text = "x" + data.draw(TEXT) + "ab"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    steps = detokenize(tokenizer, [*noise, *tokens, *more])
    assert text in "".join(steps)
    assert text in "".join(steps[: len(noise) + len(tokens)])
    "".join(steps).encode()


@NAMES
@hypothesis.given(st.data())
def test_nothing_is_held_back_for_long(of_name, name, data):
    """Bytes that could begin a character, over and over: something shows at least every few tokens."""
    tokenizer = of_name[name]
    parts = [token for token in range(tokenizer.vocab_size) if REPLACEMENT in tokenizer.decode([token])]
    steps = detokenize(tokenizer, data.draw(st.lists(st.sampled_from(parts), min_size=6, max_size=60)))
    silent = 0
    for step in steps[:-1]:
        silent = 0 if step else silent + 1
        assert silent < 4


def decode_stream(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The steps of the library's own incremental decoder, which has no flush."""
    stream, raw = DecodeStream(skip_special_tokens=True), tokenizer._tokenizer.backend_tokenizer
    return [stream.step(raw, token) or "" for token in tokens]


@NAMES
def test_the_decode_stream_of_tokenizers_fails_where_ours_does_not(of_name, name):
    """Where one of these no longer fails, `Detokenizer` may be that: it is the same on whole characters."""
    tokenizer = of_name[name]
    whole = tokenizer.encode("hello 😀 你好 world", add_special_tokens=False)
    assert "".join(decode_stream(tokenizer, whole)) == "".join(detokenize(tokenizer, whole))
    at_the_end = tokenizer.encode(f"a{REPLACEMENT}", add_special_tokens=False)
    assert "".join(decode_stream(tokenizer, at_the_end)) == "a", "the last character is lost"
    assert "".join(detokenize(tokenizer, at_the_end)) == f"a{REPLACEMENT}"
    [part, *_] = [token for token in range(tokenizer.vocab_size) if REPLACEMENT in tokenizer.decode([token])]
    assert not any(decode_stream(tokenizer, [part] * 60)), "nothing is shown however long it lasts"
    assert any(detokenize(tokenizer, [part] * 60)[:6])


def test_many_tokens_without_text_cost_nothing(of_name):
    """Special tokens are not shown; what is kept of them must not grow."""
    tokenizer = of_name["byte level"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([tiny.EOS] * 500) == ""
    assert len(detokenizer._tokens) < 50
    assert detokenizer.push(tokenizer.encode(" the end")) + detokenizer.flush() == " the end"


@pytest.fixture(scope="module")
def stripping():
    """The tokenizer of a SentencePiece model, whose decoder takes away the first space of what it is given."""
    raw = tiny.byte_fallback()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return vocabularies.wrap(raw)


def test_a_space_behind_the_prompt_stays(stripping):
    prompt, answer = (stripping.encode(text, add_special_tokens=False) for text in ("The answer is", " a bc"))
    for cut in range(len(prompt)):
        detokenizer = Detokenizer(stripping, prompt[cut:])
        assert detokenizer.push(answer) + detokenizer.flush() == " a bc"
    assert Detokenizer(stripping).push(answer) == "a bc"  # at the very beginning of a text there is none


@hypothesis.given(text=TEXT)
def test_a_prompt_that_ends_inside_a_character_harms_nothing(stripping, text):
    half = stripping.encode("😀", add_special_tokens=False)[:-2]
    tokens = stripping.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(stripping, half)
    assert detokenizer.push(tokens) + detokenizer.flush() == stripping.decode(tokens).rstrip("\ufffd")


def test_a_token_that_begins_a_word_shows_its_space(stripping):
    [token] = [i for i in range(stripping.vocab_size) if stripping._tokenizer.convert_ids_to_tokens(i) == "▁"]
    assert stripping.token_text(token) == " "
    assert stripping.token_bytes(token) == b" "


def test_a_space_between_words_of_a_sentencepiece_model_stays(stripping):
    """A word alone has none."""
    tokenizer = stripping
    tokens = tokenizer.encode(" a bc 😀 d", add_special_tokens=False)
    assert tokenizer.decode(tokens) == "a bc 😀 d"
    for insert in ([], [tiny.EOS], [tiny.EOS] * 40):
        assert "".join(detokenize(tokenizer, [*tokens[:3], *insert, *tokens[3:]])) == "a bc 😀 d"


def naive(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Reads the text by character: the first stop string that is complete ends it, the longest of several."""
    for end in range(len(text) + 1):
        met = [word for word in stop if text[:end].endswith(word)]
        if met:
            word = max(met, key=len)
            return text[: end - len(word)], word
    return text, None


def run_stops(chunks: list[str], stop: tuple[str, ...]) -> tuple[str, str | None]:
    stops, shown = StopStrings(stop), ""
    for chunk in chunks:
        text, met = stops.push(chunk)
        shown += text
        if met is not None:
            return shown, met
    return shown + stops.flush(), None


LETTERS = st.text("abc", max_size=12)
STOP = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(tuple)


@hypothesis.given(chunks=st.lists(LETTERS, max_size=8), stop=STOP)
@hypothesis.settings(max_examples=500)
@hypothesis.example(["abc"], ("ab", "abc"))
@hypothesis.example(["a", "bc"], ("ab", "abc"))
@hypothesis.example(["abcd"], ("bcd", "c"))
@hypothesis.example(["aab"], ("ab",))
def test_stop_strings_do_not_see_the_borders(chunks, stop):
    assert run_stops(chunks, stop) == naive("".join(chunks), stop)


@hypothesis.given(text=LETTERS, stop=STOP)
def test_only_what_may_begin_a_stop_string_is_held_back(text, stop):
    stops, shown = StopStrings(stop), ""
    for character in text:
        new, met = stops.push(character)
        if met is not None:
            return
        shown += new
        held = (text[: len(shown) + len(stops._held)])[len(shown) :]
        assert not held or any(word.startswith(held) for word in stop)
