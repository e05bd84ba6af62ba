"""openai-python against the real server, engine and model: what a user's first hour looks like."""

import re

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.end_to_end.server_process import MODEL, ServerProcess

PROMPT = "def add(a, b):\n    return"
GREEDY = {"model": "kvjax-small", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", "--max-model-len", "256") as process:
        process.url = process.ready()
        yield process
        metrics = httpx.get(f"{process.url}/metrics").text
        assert re.search(r"^kvjax:compiles_after_warmup(_total)?({.*})? 0\.0$", metrics, re.MULTILINE), metrics
        assert process.terminate() == 0, process.log


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(client: openai.OpenAI, prompt: object = PROMPT, **options: object) -> openai.types.Completion:
    return client.completions.create(prompt=prompt, **(GREEDY | options))


def test_models(client):
    card = client.models.list().data[0]
    assert card.max_model_len == 256


def test_the_four_forms_of_a_prompt_agree(client):
    tokens = AutoTokenizer.from_pretrained(MODEL).encode(PROMPT)
    [text] = {
        choice.text
        for prompt in (PROMPT, [PROMPT], tokens, [tokens, tokens])
        for choice in complete(client, prompt).choices
    }
    assert text


def test_streams_join_to_the_whole_answer(client):
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0


def test_chat_streams(client):
    chunks = client.chat.completions.create(
        model="kvjax-small", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, stream=True
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")


def test_seeds_reproduce_and_differ(client):
    def draw(seed: int) -> list[str]:
        choices = complete(client, temperature=1.5, seed=seed, n=3).choices
        return [choice.text for choice in choices]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(7))) == 3


def test_stop_and_logprobs(client):
    whole = complete(client, logprobs=3, echo=True).choices[0]
    assert whole.text.startswith(PROMPT)
    assert whole.logprobs.token_logprobs[0] is None
    assert all(len(top) >= 3 for top in whole.logprobs.top_logprobs[1:])
    new = complete(client).choices[0].text
    stopped = complete(client, stop=[new[3:5]]).choices[0]
    assert stopped.text == new[: new.index(new[3:5])]
    assert stopped.finish_reason == "stop"


def test_what_does_not_fit_is_refused_with_numbers(client):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, max_tokens=300)
    assert refused.value.code == "context_length_exceeded"
    assert "256" in refused.value.message


def test_many_at_once_get_what_each_gets_alone(client):
    prompts = [PROMPT, "import os\n", "class A:\n", "x = [1, 2", "for i in", "# a"]
    together = [choice.text for choice in complete(client, prompts).choices]
    assert together == [complete(client, prompt).choices[0].text for prompt in prompts]


def test_a_killed_server_starts_again_and_answers_the_same(tmp_path):
    answers = []
    for name in ("first", "second"):
        with ServerProcess(tmp_path / name, "--max-model-len", "256", "--max-num-seqs", "1") as process:
            url = process.ready()
            body = GREEDY | {"prompt": PROMPT}
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])
            process.kill()
    assert answers[0] == answers[1] != ""
