"""An operation for another backend, in one file outside the library, served by an engine by the path of its table."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import pytest

from kvjax.attention.ops import REFERENCE_OPS, Ops, PageView
from kvjax.engine import Engine, EngineConfig
from tests.engine import tiny
from tests.engine.client import GREEDY, generate, settle

CALLS: Counter[str] = Counter()  # traced operations by name
HERE = "tests.engine.test_own_backend"


def counted(name: str):
    def operation(*arrays, **options):
        CALLS[name] += 1
        return getattr(REFERENCE_OPS, name)(*arrays, **options)

    return operation


def page_scores(pages: PageView, *, page_size: int):
    """The operation of the new backend: the softmax over all filled entries, whose pages have a logit each."""
    CALLS["page_scores"] += 1
    high, low = (pages.summary[:, :, None, :, side].astype(jnp.float32) for side in (0, 1))
    q = pages.q[:, :, :, None].astype(jnp.float32)
    logits = jnp.sum(jnp.maximum(q * high, q * low), axis=-1) * pages.scale
    filled = pages.filled.reshape(*pages.filled.shape[:2], -1, page_size).sum(axis=-1)[:, :, None]
    weights = jnp.where(
        filled > 0, jnp.exp(logits - logits.max(axis=-1, keepdims=True, where=filled > 0, initial=0)), 0
    )
    return jnp.mean(weights / jnp.maximum(jnp.sum(weights * filled, axis=-1, keepdims=True), 1e-30), axis=2)


def received(queries, k, length, observed, *, scale, per_head):
    """Attention by position alone: the earlier a token, the more."""
    rows = queries.shape[1] if per_head else len(k)
    return jnp.broadcast_to(-jnp.arange(float(k.shape[1])), (rows, k.shape[1]))


COUNTED = dataclasses.replace(
    Ops(**{field.name: counted(field.name) for field in dataclasses.fields(Ops)}), page_scores=page_scores
)
EARLIEST = dataclasses.replace(REFERENCE_OPS, attention_received=received)


def config(attention_backend: str, method: str, token_budget: int) -> EngineConfig:
    return EngineConfig(
        max_model_len=640,
        max_num_seqs=1,
        method=method,
        token_budget=token_budget,
        headroom=24,
        attention_backend=attention_backend,
    )


def test_a_table_with_an_operation_written_anew_generates_what_the_reference_does(tmp_path):
    """Prefill, eviction and decode are all composed of it."""
    path, prompt, tokens = tiny.write(tmp_path), tiny.prompt(400), {}
    CALLS.clear()
    for backend in ("reference", f"{HERE}:COUNTED"):
        with Engine.from_pretrained(path, config(backend, "rocketkv", 48)) as engine:
            [completion] = generate(engine, [(prompt, dataclasses.replace(GREEDY, max_tokens=16))])
            tokens[backend] = completion.tokens
            settle(engine)
    [reference, other] = tokens.values()
    assert len(other) == 16
    assert other == reference
    prefill, decode = ["prefill_attention", "attention_received"], ["page_scores", "page_selection"]
    assert not [name for name in (*prefill, *decode, "selected_attention", "decode_attention") if not CALLS[name]]


def test_an_eviction_follows_the_table(tmp_path):
    """The first tokens stay, for the operation says that they receive the most."""
    with Engine.from_pretrained(tiny.write(tmp_path), config(f"{HERE}:EARLIEST", "rocketkv-stage1", 48)) as engine:
        sampling = dataclasses.replace(GREEDY, max_tokens=2, retained=True)
        [completion] = generate(engine, [(tiny.prompt(300), sampling)])
        assert completion.retained is not None
        for positions, kind in zip(completion.retained, tiny.CONFIG.layers, strict=True):
            if kind.window is None:
                for row in positions:
                    assert row[row >= 0].tolist() == [*range(16), *range(268, 300)]
        settle(engine)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("nowhere:OPS", "attention_backend='nowhere:OPS' cannot be imported: No module named 'nowhere'"),
        (f"{HERE}:NONE", "cannot be imported: .*has no attribute 'NONE'"),
        (f"{HERE}:HERE", "is a str: give a table, dataclasses.replace"),
    ],
)
def test_a_path_that_is_no_table_is_refused(backend, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(tiny.write(tmp_path), config(backend, "rocketkv", 48))
