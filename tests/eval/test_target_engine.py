"""An engine as a target: its answers are those of `Engine.generate`, and its refusals reasons."""

import asyncio
import dataclasses
import shutil

import pytest

from kvjax.engine import EngineConfig, SamplingParams
from kvjax.eval.targets import TargetError, TargetFailedError, TargetGoneError, TargetRequest
from kvjax.eval.targets.engine import EngineTarget, fingerprint
from tests.end_to_end.server_process import MODEL
from tests.engine import tiny

pytestmark = pytest.mark.heavy

PROMPTS = ["The hen in the inn", "an ant ", "tin", "then they thin"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    one_layer = dataclasses.replace(tiny.CONFIG, layers=(tiny.LOCAL,))  # compiles sooner
    folder = tiny.write(tmp_path_factory.mktemp("tiny"), one_layer)
    config = EngineConfig(max_num_seqs=2, max_model_len=64, max_num_queued_reqs=2)
    target = EngineTarget.from_pretrained(folder, config)
    with target.engine:
        yield target
        target.engine.check_integrity()


def ask(target, prompts, **options):
    async def all_of_them():
        async with target.session():
            return await asyncio.gather(*(target.complete(TargetRequest(prompt, **options)) for prompt in prompts))

    return asyncio.run(all_of_them())


def test_answers_are_the_engines_own(target):
    params = SamplingParams(max_tokens=9, temperature=0.0)
    wanted = target.engine.generate(PROMPTS, params, progress=False)
    answers = ask(target, PROMPTS, max_tokens=9)
    assert [(a.text, a.finish, a.tokens, a.prompt_tokens) for a in answers] == [
        (w.text, w.finish, len(w.tokens), len(w.prompt_tokens)) for w in wanted
    ]
    assert all(0 < answer.first_token_seconds <= answer.seconds for answer in answers)
    assert [target.count(prompt) for prompt in PROMPTS] == [len(w.prompt_tokens) for w in wanted]


def test_seeds_count_when_it_is_warm(target):
    [one], [same], [other] = (ask(target, ["tin"], max_tokens=9, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one.text == same.text != other.text


def test_after_an_interruption_the_engine_has_nothing_left_to_say(target, caplog):
    async def interrupted():
        async with target.session(), asyncio.TaskGroup() as group:
            for prompt in PROMPTS[:2]:
                group.create_task(target.complete(TargetRequest(prompt, max_tokens=40)))
            while target.engine.stats().running < 2:
                await asyncio.sleep(0.001)
            raise KeyError("stop")

    before = target.engine.stats()
    with pytest.raises(BaseExceptionGroup):
        asyncio.run(interrupted())
    stats = target.engine.stats()
    assert stats.submitted == before.submitted + 2 == stats.finished + stats.cancelled + stats.failed
    assert not caplog.records


def test_what_does_not_fit_says_how_much_does(target):
    with pytest.raises(TargetFailedError, match="context is 64 tokens"):
        ask(target, ["tin"], max_tokens=64)
    with pytest.raises(TargetFailedError, match="the prompt is empty"):
        ask(target, [""], max_tokens=1)


def test_more_than_the_queue_holds_says_what_to_lower(target):
    with pytest.raises(TargetFailedError, match="lower --concurrency"):
        ask(target, ["tin"] * 9, max_tokens=1)


def test_a_model_without_a_template_does_not_chat(target):
    messages = [{"role": "user", "content": "tin"}]
    with pytest.raises(TargetFailedError, match="no chat template"):
        target.count(messages)
    with pytest.raises(TargetFailedError, match="no chat template"):
        ask(target, [messages], max_tokens=1)


def test_an_engine_that_is_not_started_is_gone(target):
    idle = EngineTarget.from_pretrained(MODEL, EngineConfig(max_model_len=64))
    with pytest.raises(TargetGoneError):
        ask(idle, ["tin"], max_tokens=1)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TargetError, match=str(tmp_path)):
        EngineTarget.from_pretrained(tmp_path)
    with pytest.raises(TargetError, match="max_model_len"):
        EngineTarget.from_pretrained(MODEL, EngineConfig(max_model_len=1 << 20))


def test_a_fingerprint_follows_weights_and_configuration_but_not_the_place(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(MODEL, folder)
    same = fingerprint(first)
    assert fingerprint(second) == same
    (second / "README.md").write_text("words")
    assert fingerprint(second) == same
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)
    other = fingerprint(second)
    (second / "config.json").write_text("{}")
    assert len({same, other, fingerprint(second)}) == 3
