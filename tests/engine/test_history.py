"""A conversation's next turn computes what is new, and answers to the bit as if it had computed everything."""

import dataclasses

import numpy as np
import pytest

from kvjax.engine import Engine, EngineConfig
from kvjax.engine.history import History, Piece
from tests.engine import tiny
from tests.engine.client import GREEDY, Client, settle

PIECE = 256


def piece(size: int = 8) -> Piece:
    return Piece(((np.zeros(size // 2, np.uint8), np.zeros(size - size // 2, np.uint8)),))


def filled(history: History, tokens: np.ndarray, salt: str = "") -> None:
    for key in history.keys(tokens, salt):
        history.put(key, piece())


def find(history: History, tokens: np.ndarray, salt: str = "") -> list[Piece]:
    return history.find(history.keys(tokens, salt))


def test_a_prompt_finds_the_longest_chain_that_it_begins_with():
    history, tokens = History(4, most_bytes=1000), np.arange(18)
    filled(history, tokens)
    assert history.nbytes == 4 * 8, "the last two tokens are no piece"
    for changed, found in [(0, 0), (3, 0), (4, 1), (11, 2), (16, 4), (17, 4)]:
        other = tokens.copy()
        other[changed] += 1
        assert len(find(history, other)) == found
    assert len(find(history, tokens[:11])) == 2
    assert find(history, tokens, "somebody else") == []
    assert len(find(history, tokens.astype(np.int64))) == 4
    history.check_integrity()


def test_the_least_recently_used_pieces_leave():
    history = History(4, most_bytes=5 * 8)
    first, second, third = (np.arange(8) + 100 * n for n in range(3))
    filled(history, first)
    filled(history, second)
    find(history, first)
    filled(history, third)
    assert [len(find(history, tokens)) for tokens in (first, second, third)] == [2, 0, 2]
    history.put(b"huge", piece(1000))
    assert len(find(history, first)) == 2, "what cannot be kept throws nothing out"
    history.check_integrity()


@pytest.fixture(scope="module", params=[("rocketkv-mt", 192, None), ("full", None, 1 << 24)], ids=["mt", "full"])
def engine(tmp_path_factory, request):
    method, budget, history = request.param
    config = EngineConfig(
        max_model_len=900,
        max_num_seqs=2,
        method=method,
        token_budget=budget,
        room=32,
        prefill_piece=PIECE,
        history_bytes=history,
    )
    with Engine.from_pretrained(tiny.write(tmp_path_factory.mktemp("history")), config) as engine:
        yield engine
        assert engine.stats().compiles_after_warmup == 0


@pytest.mark.parametrize(
    ("first", "second", "reused"),
    [(600, 800, 2), (512, 700, 2), (511, 700, 1), (513, 513, 1), (700, 640, 2), (700, 639, 1), (100, 300, 0)],
)
def test_a_next_turn_is_what_it_is_from_nothing(engine, first, second, reused):
    """The last 128 tokens, whose queries choose, are always computed: 640 tokens reuse 512, and 639 only 256.

    Where nothing is chosen it is the last token alone.
    """
    if not engine.caches.window:
        reused = min(first, second - 1) // PIECE
    earlier = tiny.prompt(700)[:first]
    turn = [*earlier[:second], *tiny.prompt(700, seed=1)[: max(second - first, 0)]]
    params = dataclasses.replace(GREEDY, max_tokens=40, logprobs=3, kept=True)
    salt = f"{first} {second}"
    with Client() as client:
        cold = client.submit(engine, turn, params, cache_salt="cold " + salt).result()
        client.submit(engine, earlier, params, cache_salt=salt).result()
        warm = client.submit(engine, turn, params, cache_salt=salt).result()
    assert (cold.cached_tokens, warm.cached_tokens) == (0, reused * PIECE)
    assert (cold.tokens, cold.logprobs) == (warm.tokens, warm.logprobs)
    for ours, theirs in zip(cold.kept, warm.kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    settle(engine)


def test_log_probabilities_of_a_prompt_are_computed_although_its_kv_is_there(engine):
    params = dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    prompt = tiny.prompt(600)
    [first] = engine.generate([prompt], params, progress=False)
    [again] = engine.generate([prompt], params, progress=False)
    assert again.cached_tokens == 0
    assert first.prompt_logprobs == again.prompt_logprobs


def test_a_history_that_holds_nothing_is_refused(tmp_path):
    folder = tiny.write(tmp_path)
    piece = PIECE * 3 * 2 * 2 * 16 * 4  # layers, kv heads, K and V, head dim, bytes
    Engine.from_pretrained(folder, EngineConfig(prefill_piece=PIECE, history_bytes=piece))
    with pytest.raises(
        ValueError, match=f"={piece - 1} hold no piece of 256 tokens, which takes {piece}: raise --host"
    ):
        Engine.from_pretrained(folder, EngineConfig(prefill_piece=PIECE, history_bytes=piece - 1))
