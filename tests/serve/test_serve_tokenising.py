"""Tokenising: no text waits for a longer one, what cannot fit is refused at once, what no client wants is not begun."""

import threading
import time

import httpx
import pytest
from fake_engine import FakeEngine
from live_server import wait_until

from kvjax.engine.text.tokenizer import Tokenizer, keeps_all_characters
from kvjax.serve.limits import Limits
from kvjax.serve.tokenising import SHORT_CHARACTERS, TRIAL_FACTOR

LONG = "x" * (SHORT_CHARACTERS + 1)
PATHS = {
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 2},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 2},
    "/tokenize": lambda text: {"prompt": text},
}


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_fit_is_refused_before_it_is_tokenised(serve, path):
    engine = FakeEngine(max_model_len=512)
    engine.tokenizer.max_token_characters = 10
    server = serve(engine)
    answer = server.post(path, PATHS[path]("x" * 6000))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "at least 600 tokens" in error["message"] or path == "/v1/chat/completions"
    assert engine.tokenizer.encoded == 0


def test_a_long_text_is_tried_by_its_beginning(serve):
    engine = FakeEngine(max_model_len=512)
    sizes = []
    encode = engine.tokenizer.encode
    engine.tokenizer.encode = lambda text, **options: sizes.append(len(text)) or encode(text, **options)
    answer = serve(engine).post("/v1/completions", {"prompt": "x" * 1_000_000})
    assert answer.status_code == 400
    assert sizes == [TRIAL_FACTOR * 512]


@pytest.mark.parametrize("path", PATHS)
def test_short_texts_do_not_wait_for_long_ones(serve, path):
    engine = FakeEngine(max_model_len=100_000)
    held = threading.Event()
    encode = engine.tokenizer.encode

    def slow(text, **options):
        if len(text) > SHORT_CHARACTERS:
            held.wait(10)
        return encode(text, **options)

    engine.tokenizer.encode = slow
    server = serve(engine)
    threads = [threading.Thread(target=server.post, args=(path, PATHS[path](LONG))) for _ in range(6)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    assert server.post("/v1/completions", {"prompt": "hi", "max_tokens": 1}).status_code == 200
    assert server.post("/tokenize", {"prompt": "hi"}).json()["count"] == 3
    assert time.monotonic() - began < 3
    held.set()
    for thread in threads:
        thread.join(20)


@pytest.mark.parametrize("path", PATHS)
def test_what_a_client_left_is_not_begun(serve, path):
    engine = FakeEngine(max_model_len=100_000)
    held, begun = threading.Event(), []
    encode = engine.tokenizer.encode

    def slow(text, **options):
        begun.append(len(text))
        held.wait(10)
        return encode(text, **options)

    engine.tokenizer.encode = slow
    server = serve(engine)
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + path, json=PATHS[path](LONG), timeout=0.3)
    held.set()
    wait_until(lambda: not engine.reserved)
    time.sleep(0.3)
    assert len(begun) == 1


def test_places_are_bounded(serve):
    engine = FakeEngine(max_model_len=100_000)
    held = threading.Event()
    engine.tokenizer.decode = lambda ids, **options: held.wait(10) and "x"
    server = serve(engine, limits=Limits(waiting_texts=3))
    answers = []
    ask = lambda: answers.append(server.post("/detokenize", {"tokens": [1]}).status_code)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: answers.count(503) == 5)
    held.set()
    for thread in threads:
        thread.join(10)
    assert sorted(answers) == [200] * 3 + [503] * 5


@pytest.mark.parametrize(
    ("description", "kept"),
    [
        ({"normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}}, True),
        ({"normalizer": {"type": "Prepend"}, "pre_tokenizer": None}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Strip"}]}}, False),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, False),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Removed"}}, False),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated"}}, True),
        ({"normalizer": {"type": "Replace", "content": "_", "pattern": {"String": " "}}}, True),
        ({"normalizer": {"type": "Replace", "content": " ", "pattern": {"Regex": " +"}}}, False),
        ({"added_tokens": [{"lstrip": True, "rstrip": False}]}, False),
    ],
)
def test_which_tokenizers_have_a_bound(description, kept):
    assert keeps_all_characters(description) is kept


def test_the_bound_holds_for_a_real_one():
    tokenizer = Tokenizer.from_pretrained("models/kvjax_small")
    longest = tokenizer.max_token_characters
    for text in ("a" * 999, " \n" * 500, "é🙂" * 300, "the quick brown fox " * 50):
        assert longest is None or len(tokenizer.encode(text, add_special_tokens=False)) * longest >= len(text)
