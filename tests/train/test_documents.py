"""Training documents: their length, what counts in the loss, and that a counting token can be known."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from kvjax.train.config import KINDS
from kvjax.train.documents import Documents, corpus_ids
from kvjax.train.evaluation import runs
from kvjax.train.tokenizer import END, EOS, SPECIAL, USER


@pytest.fixture(scope="module")
def documents(tokenizer_folder):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    return Documents(tokenizer, corpus_ids(tokenizer, [("a.py", "x = 1\n" * 500), ("b.py", "y = 2\n" * 99)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 128, 640])
def test_a_document_has_its_length_and_something_to_learn(documents, kind, length):
    if (kind, length) == ("chains", 64):
        with pytest.raises(ValueError, match="do not fit"):  # a worked reply repeats the statements
            documents.of_kind(kind, length, random.Random(0))
        return
    for seed in range(30):
        document = documents.of_kind(kind, length, random.Random(seed))
        assert document.tokens.shape == document.mask.shape == (length,)
        assert document.mask.any()
        assert not document.mask[document.tokens == SPECIAL.index("<|pad|>")].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_a_function_of_its_seed(documents, kind):
    one, two = (documents.of_kind(kind, 128, random.Random(5)) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert not np.array_equal(one.tokens, documents.of_kind(kind, 128, random.Random(6)).tokens)


def test_counting_tokens_of_repeats_were_seen_one_segment_before(documents):
    document = documents.repeats(128, random.Random(3))
    size = int(np.flatnonzero(document.mask)[0])
    np.testing.assert_array_equal(document.tokens[size:], document.tokens[:-size])
    assert document.mask[size:].all()


@pytest.mark.parametrize("seed", range(20))
def test_counting_tokens_of_recall_follow_their_key_as_the_first_time(documents, seed):
    document = documents.recall(128, random.Random(seed))
    tokens, replies = document.tokens.tolist(), runs(document.mask)
    first = tokens[: replies[0].start - 1]
    for reply in replies:
        pair = tokens[reply.start - 1 : reply.stop]
        places = [i for i in range(len(first)) if first[i : i + len(pair)] == pair]
        assert places, "a value that was not told with this key"


@pytest.mark.parametrize("kind", ["needles", "variables"])
def test_counting_tokens_are_replies_that_the_context_answers(documents, kind):
    decode = documents.tokenizer.decode
    chats = 0
    for seed in range(40):
        document = documents.of_kind(kind, 256, random.Random(seed))
        text = decode(document.tokens.tolist(), skip_special_tokens=False)
        replies = decode(document.tokens[document.mask].tolist(), skip_special_tokens=False)
        chat = text.startswith(USER)
        chats += chat
        assert replies.endswith(END if chat else EOS)
        context = text.split("\n")[0]
        for number in [word.strip(".,") for word in replies.split() if word[0].isdigit()]:
            assert number.split(END)[0].split(EOS)[0].strip(".,") in context
    assert 5 < chats < 35


def test_every_python_token_counts_and_files_end_in_eos(documents):
    document = documents.python(64, random.Random(0))
    assert document.mask.all()
    assert (documents.corpus == SPECIAL.index(EOS)).sum() == 2
    with pytest.raises(ValueError, match="a document takes"):
        documents.python(10**6, random.Random(0))


def test_the_mix_is_followed(documents):
    for seed in range(20):
        assert documents.draw({"python": 1.0, "repeats": 0.0}, 64, random.Random(seed)).mask.all()


def test_documents_read_back_as_the_tokens_a_user_would_send(documents):
    """A prompt typed as one text gives the ids that were trained on, though those were joined from parts."""
    for seed in range(40):
        tokens = documents.needles(256, random.Random(seed)).tokens
        tokens = tokens[tokens != SPECIAL.index("<|pad|>")].tolist()
        text = documents.tokenizer.decode(tokens, skip_special_tokens=False)
        assert documents.tokenizer.encode(text).ids == tokens
