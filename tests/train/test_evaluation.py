"""Scores against predictions made by hand."""

import jax.numpy as jnp
import numpy as np

from kvjax.train.documents import Document
from kvjax.train.evaluation import runs, score


def test_runs_are_the_unbroken_stretches():
    mask = np.array([1, 1, 0, 0, 1, 0, 1, 1], bool)
    assert runs(mask) == [slice(0, 2), slice(4, 5), slice(6, 8)]
    assert runs(np.zeros(3, bool)) == []


def test_a_reply_is_right_only_when_all_its_tokens_are():
    tokens = np.array([9, 1, 2, 3, 4, 5], np.int32)
    document = Document(tokens, np.array([0, 1, 1, 0, 1, 1], bool))

    def predict(params, given):
        # wrong at the last token only: replies (1, 2) and (4, 5) are one right, one wrong
        return jnp.asarray(given[:, 1:]).at[:, -1].set(0), jnp.ones(given[:, 1:].shape, jnp.float32)

    found = score(predict, None, [document, document], 2)
    assert (found.tokens, found.replies, found.loss) == (0.75, 0.5, 1.0)
