"""Conversations that are cut off by the end of one engine and go on in the next one, as if nothing had happened."""

import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import cache
from kvjax.engine import Completion, Engine, EngineConfig, Finish, SamplingParams, TokenLogprob
from kvjax.engine.config import ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.scheduling.work import Admit
from kvjax.engine.sessions.conversation import Conversation
from kvjax.engine.sessions.snapshot import NAME, SessionStore, _checksum, identity
from tests.engine import tiny
from tests.engine.client import GREEDY, PATIENCE, Caller, Client, settle

SLOTS, CONTEXT, ROOM = 3, 500, 24
BUDGETS = {"full": None, "rocketkv": 64, "rocketkv-mt": 192}
LONG = dataclasses.replace(GREEDY, max_tokens=110, logprobs=2)  # the views are selected anew several times
SAMPLED = dataclasses.replace(LONG, temperature=0.9, top_p=0.9, seed=5, presence_penalty=0.5, compress_after=30)


def requests(method: str) -> list[tuple[list[int], SamplingParams, str]]:
    """Greedy behind a long prompt; sampled; and one with all that is told once, in rocketkv of a smaller budget."""
    budget = 48 if method == "rocketkv" else None
    turn = 20 if method == "rocketkv-mt" else None
    told = dataclasses.replace(
        LONG, retained=True, prompt_logprobs=1, token_budget=budget, turn=turn, logit_bias={7: 0.5}
    )
    return [(tiny.prompt(300), LONG, ""), (tiny.prompt(40), SAMPLED, "tenant"), (tiny.prompt(200, seed=3), told, "")]


def config(method: str, session_dir: Path | None) -> EngineConfig:
    return EngineConfig(
        max_model_len=CONTEXT,
        max_num_seqs=SLOTS,
        method=method,
        token_budget=BUDGETS[method],
        headroom=ROOM,
        prefill_chunk_size=256,
        session_dir=session_dir,
    )


def engine_of(folder: Path, method: str, session_dir: Path | None) -> Engine:
    return Engine.from_pretrained(folder, config(method, session_dir))


def cut_off(engine: Engine, asked: list[tuple[list[int], SamplingParams, str]]) -> list[Caller]:
    """Ends an engine while all of these decode; each has got some tokens, and the end that it would get anyway."""
    decode = engine._runner.decode

    def slowly(*arguments):
        time.sleep(0.05)
        return decode(*arguments)

    engine._runner.decode = slowly
    with Client() as client:
        callers = [client.submit(engine, prompt, params, cache_salt=salt) for prompt, params, salt in asked]
        for caller in callers:
            caller.wait_for(6)
        engine.drain(0.0)
        for caller in callers:
            assert caller.result().finish is Finish.CANCELLED
    settle(engine)
    return callers


def ask(engine: Engine, prompt: list[int], params: SamplingParams, salt: str = "") -> Caller:
    with Client() as client:
        caller = client.submit(engine, prompt, params, cache_salt=salt)
        caller.wait()
    settle(engine)
    return caller


def resumed(caller: Caller) -> int:
    caller.result()
    return caller.deltas[-1].timing.resumed


def equal(one: Completion, other: Completion) -> None:
    """But for where the KV came from."""
    plain = [dataclasses.replace(each, retained=None, cached_tokens=0) for each in (one, other)]
    assert plain[0] == plain[1]
    for ours, theirs in zip(one.retained or (), other.retained or (), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=BUDGETS)
def suspended(request, folder, tmp_path_factory):
    """The method, a folder with three conversations, and what their callers have heard."""
    return cut_off_engine(folder, request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def full(folder, tmp_path_factory):
    return cut_off_engine(folder, "full", tmp_path_factory)


def cut_off_engine(folder, method, tmp_path_factory):
    place = tmp_path_factory.mktemp("suspended") / method
    with engine_of(folder, method, place) as engine:
        assert "suspended      0 conversations are back" in engine.startup_report()
        heard = cut_off(engine, requests(method))
        assert engine.stats().cancelled == SLOTS
        assert engine.stats().compiles_after_warmup == 0
    return method, place, heard


@pytest.fixture
def copied(full, tmp_path):
    """A copy of a folder, for a test that harms it."""
    shutil.copytree(full[1], tmp_path / "copy")
    return tmp_path / "copy"


def test_conversations_go_on_as_if_nothing_had_happened(folder, suspended, tmp_path):
    """To the bit: tokens, text, log-probabilities. What was generated before is there at once."""
    method, place, heard = suspended
    shutil.copytree(place, tmp_path / "copy")
    with engine_of(folder, method, tmp_path / "copy") as engine:
        assert "suspended      3 conversations are back" in engine.startup_report()
        assert not (tmp_path / "copy" / NAME).exists()
        assert [slot.state for slot in engine.stats().slots] == ["suspended"] * SLOTS
        settle(engine)
        with Client() as client:
            callers = [client.submit(engine, each[0], each[1], cache_salt=each[2]) for each in requests(method)]
            for caller in callers:
                caller.wait()
        settle(engine)
        assert engine.stats().suspended == 0
        for caller, before, (prompt, params, salt) in zip(callers, heard, requests(method), strict=True):
            told = tuple(token for delta in before.deltas for token in delta.tokens)
            assert 0 < len(told) < params.max_tokens
            assert caller.deltas[0].tokens == told
            assert resumed(caller) == len(told)
            assert caller.result().cached_tokens == len(prompt)
            uninterrupted = ask(engine, prompt, params, salt)
            assert resumed(uninterrupted) == 0
            equal(caller.result(), uninterrupted.result())
        assert engine.stats().compiles_after_warmup == 0
        assert engine.stats().generated_tokens == 2 * SLOTS * LONG.max_tokens - sum(map(resumed, callers))


def test_a_new_request_takes_the_oldest_slot_and_never_waits(folder, full, copied):
    asked = requests("full")
    with engine_of(folder, "full", copied) as engine:
        ask(engine, tiny.prompt(9), GREEDY)
        assert engine.stats().suspended == 2
        dropped = ask(engine, *asked[0])  # in the slot that is free again
        assert resumed(dropped) == 0
        assert engine.stats().suspended == 2
        assert resumed(ask(engine, *asked[2])) > 0
        first = ask(engine, *asked[1])
        assert resumed(first) > 0
        equal(first.result(), ask(engine, *asked[1]).result())


def test_a_request_that_comes_between_two_pieces_of_work_goes_on_with_its_conversation(folder, copied):
    """The scheduler looks at conversations and at free slots under one lock: none is read anew in between."""
    with engine_of(folder, "full", copied) as engine:
        loop, late = engine._loop, []
        assert loop is not None
        execute = loop._execute

        def executed(work, conversation):
            if isinstance(work, Admit) and not late:  # the other one comes while a slot is being taken
                late.append(client.submit(engine, *requests("full")[2][:2]))
                while engine.stats().submitted < 2:
                    time.sleep(0.01)
            execute(work, conversation)

        loop._execute = executed
        with Client() as client:
            client.submit(engine, tiny.prompt(9), GREEDY).wait()
            late[0].wait()
        settle(engine)
        assert resumed(late[0]) > 0


def test_only_the_same_request_is_attached(folder, copied):
    prompt, params, salt = requests("full")[1]
    with engine_of(folder, "full", copied) as engine:
        others = [
            (prompt, params, "another tenant"),
            (prompt, dataclasses.replace(params, seed=6), salt),
            ([*prompt, 9], params, salt),
            (prompt, dataclasses.replace(params, max_tokens=111), salt),
        ]
        for other in others[:2]:
            assert resumed(ask(engine, *other)) == 0
        assert [engine._loop._suspended.find(active(engine, *other)) for other in others] == [None] * 4
        assert resumed(ask(engine, prompt, params, salt)) > 0


def active(engine: Engine, prompt, params, salt):
    """A request as the engine makes it, and nothing done about it."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._loop, "submit", made.append)
        engine._submit(prompt, params, lambda delta: None, "", salt)
    return made[0]


def test_what_nobody_asks_for_is_suspended_again(folder, full, copied):
    with engine_of(folder, "full", copied) as engine:
        engine.drain(PATIENCE)
        assert (copied / NAME).is_dir()
    with engine_of(folder, "full", copied) as engine:
        for asked, heard in zip(requests("full"), full[2], strict=True):
            caller = ask(engine, *asked)
            assert resumed(caller) == sum(len(delta.tokens) for delta in heard.deltas)
            equal(caller.result(), ask(engine, *asked).result())
        engine.drain(PATIENCE)
        assert not list(copied.iterdir())


def test_two_equal_requests_without_a_seed_are_two_conversations(folder, tmp_path):
    params = dataclasses.replace(SAMPLED, seed=None)
    twice = [(tiny.prompt(40), params, "")] * 2
    with engine_of(folder, "full", tmp_path) as engine:
        heard = cut_off(engine, twice)
    with engine_of(folder, "full", tmp_path) as engine:
        again = [ask(engine, *each) for each in twice]
        assert all(resumed(caller) for caller in again)
        for caller, before in zip(again, heard, strict=True):
            told = [token for delta in before.deltas for token in delta.tokens]
            assert list(caller.result().tokens[: len(told)]) == told
        assert again[0].result().tokens != again[1].result().tokens


def test_waiting_and_prefilling_requests_are_cancelled_and_finished_ones_leave_nothing(folder, tmp_path):
    with engine_of(folder, "full", tmp_path) as engine, Client() as client:
        done = client.submit(engine, tiny.prompt(9), GREEDY)
        done.wait()
        advance = engine._runner.advance

        def slowly(prefill):
            time.sleep(0.3)
            advance(prefill)

        engine._runner.advance = slowly
        callers = [client.submit(engine, tiny.prompt(380, seed=seed), LONG) for seed in range(5)]
        while engine.stats().submitted < 6:
            time.sleep(0.01)
        engine.drain(0.0)
        assert {caller.result().finish for caller in callers} == {Finish.CANCELLED}
        settle(engine)
    assert not (tmp_path / NAME).exists()


def test_another_model_is_refused_and_serving_goes_on(folder, copied, tmp_path, caplog):
    other = shutil.copytree(folder, tmp_path / "other")
    settings = other / "config.json"
    settings.write_text(settings.read_text() + "\n")  # nothing else would notice
    with caplog.at_level(logging.WARNING, "kvjax"), engine_of(other, "full", copied) as engine:
        assert "suspended      0 conversations are back" in engine.startup_report()
        [record] = caplog.records
        assert "are not for this engine: weights" in record.getMessage()
        assert resumed(ask(engine, *requests("full")[0])) == 0
        engine.drain(PATIENCE)
    assert (copied / NAME).is_dir()
    assert len(list(session_store_of(folder, copied).load())) == SLOTS


def caches_of(method: str = "full", **settings) -> CacheConfig:
    chosen = dataclasses.replace(config(method, None), **settings)
    return CacheConfig.declare(tiny.CONFIG, ResolvedConfig.resolve(chosen, tiny.CONTEXT, "cpu"))


def session_store_of(folder: Path, place: Path) -> SessionStore:
    return SessionStore.open(place, folder, caches_of(), None)


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        ({"profile", "layout"}, {"method": "rocketkv", "token_budget": 64}),
        ({"profile", "layout"}, {"max_model_len": 499}),
        ({"layout"}, {"max_num_seqs": 4}),
        ({"dtype", "layout"}, {"kv_cache_dtype": "bfloat16"}),
        ({"numerics"}, {"prefill_chunk_size": 512}),
        (set(), {"tensor_parallel_size": 2, "decode_steps": 1, "seed": 3}),
    ],
)
def test_what_must_be_equal(folder, settings, changed):
    one, other = identity(folder, caches_of()), identity(folder, caches_of(**settings))
    assert {name for name in one if one[name] != other[name]} == changed


def test_budgets_are_a_part_of_it(folder):
    one, other = (identity(folder, caches_of("rocketkv", token_budget=budget)) for budget in (64, 65))
    assert {name for name in one if one[name] != other[name]} >= {"profile"}


# reads that are still under way when the first of them fails find Orbax's event loop closed, which Python reports
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_or_harmed_array_costs_its_conversation_alone(folder, copied, caplog):
    files = [path for path in (copied / NAME / "slot-1").rglob("*") if path.is_file() and path.parent.name == "d"]
    largest = max(files, key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    middle = len(whole) // 2
    harms = (whole[:middle], b"", bytes([*whole[:middle], whole[middle] ^ 1, *whole[middle + 1 :]]))
    for harm in harms:
        caplog.clear()
        largest.write_bytes(harm)
        assert {saved.slot for saved in session_store_of(folder, copied).load()} == {0, 2}
        [record] = caplog.records
        assert "cannot be read and is dropped" in record.getMessage()
    session_store = session_store_of(folder, copied)
    assert len(list(session_store.load())) == 2
    session_store.consume()
    assert not (copied / NAME).exists()


def test_values_are_compared_with_what_was_written(folder, copied, tmp_path, monkeypatch, caplog):
    """A storage that brings other bits without a word, as raw arrays on a disk may."""
    loaded = list(session_store_of(folder, copied).load())
    session_store = session_store_of(folder, tmp_path / "place")
    with monkeypatch.context() as patch:
        patch.setattr("kvjax.engine.sessions.snapshot._checksum", lambda array: _checksum(array) ^ (array.ndim == 3))
        session_store.save(loaded)
    assert not list(session_store.load())
    assert [record.getMessage().count("is not what was written") for record in caplog.records] == [1] * SLOTS


@pytest.mark.parametrize("harm", ["cut", "digit", "none"])
def test_a_harmed_description_costs_all_of_them(folder, copied, caplog, harm):
    about = copied / NAME / "about" / "metadata"
    text = about.read_text()
    if harm == "none":
        about.unlink()
    else:
        at = text.index("prompt") + 30
        other = str((int(text[at]) + 1) % 10) if text[at].isdigit() else "1"
        about.write_text(text[: len(text) // 2] if harm == "cut" else text[:at] + other + text[at + 1 :])
    session_store = session_store_of(folder, copied)
    assert not list(session_store.load())
    [record] = caplog.records
    assert "cannot be read and are dropped" in record.getMessage()
    session_store.consume()
    assert not (copied / NAME).exists()


def test_half_written_ones_are_ignored_and_swept(folder, copied, caplog):
    (copied / NAME).rename(copied / f"{NAME}.orbax-checkpoint-tmp")
    assert not list(session_store_of(folder, copied).load())
    assert not list(copied.iterdir())
    assert not caplog.records


def test_a_folder_that_cannot_be_is_said_at_once(folder, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="choose another folder for --session-dir"),
        engine_of(folder, "full", tmp_path / "file"),
    ):
        pass


def test_a_save_that_fails_is_logged(folder, copied, tmp_path, caplog):
    loaded = list(session_store_of(folder, copied).load())
    session_store = session_store_of(folder, tmp_path / "place")
    shutil.rmtree(tmp_path / "place")
    (tmp_path / "place").touch()
    session_store.save(loaded)
    assert "3 conversations could not be suspended" in caplog.text


def test_arrays_come_back_as_they_were(folder, copied, tmp_path):
    loaded = list(session_store_of(folder, copied).load())
    session_store = session_store_of(folder, tmp_path / "place")
    session_store.save(loaded[::-1])
    again = list(session_store.load())
    assert [saved.slot for saved in again] == [saved.slot for saved in loaded[::-1]]
    for one, other in zip(loaded[::-1], again, strict=True):
        ours, theirs = cache.named(one.arrays), cache.named(other.arrays)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
        assert one.conversation.to_json() == other.conversation.to_json()


def test_a_conversation_as_json():
    params = SamplingParams(
        max_tokens=None,
        temperature=0.7,
        logit_bias={3: np.float64(-1.5)},
        stop=("\ud800", "b"),
        seed=2**64 - 1,
        stop_token_ids=(1, 2),
    )
    logprobs = (TokenLogprob(3, -0.25, ((4, -1.0), (5, float("-inf")))), TokenLogprob(6, -1e-38))
    one = Conversation(
        np.array([1, 2, 3], np.int32), params, "salt\udfff", (0, 1), 99, (3, 6), logprobs, (None, logprobs[0])
    )
    other = Conversation.from_json(json.loads(json.dumps(one.to_json())))
    for field in dataclasses.fields(Conversation):
        np.testing.assert_equal(getattr(other, field.name), getattr(one, field.name))
    assert other.params == params
    assert other.position == 4
    with pytest.raises(ValueError, match="0 generated ones"):
        dataclasses.replace(one, tokens=())


def test_rows_of_specs():
    spec = cache.ArraySpec((4, 2, 8), jnp.float32, (None, cache.TENSOR, None))
    assert spec.row == cache.ArraySpec((2, 8), jnp.float32, (cache.TENSOR, None))
    tree = {"views": (spec, spec), "none": None}
    names = cache.named(tree)
    assert list(names) == ["views.0", "views.1"]
    assert cache.unnamed(names, tree) == tree
    assert cache.rows(tree) == {"views": (spec.row, spec.row), "none": None}
    with pytest.raises(KeyError):
        cache.unnamed({"views.0": spec}, tree)
