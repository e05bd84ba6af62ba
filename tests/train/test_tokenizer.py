"""The tokenizer as its users load it: bytes survive, digits stand in pairs, nouns are whole, chats marked."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer

from kvjax.eval.tasks.words import NOUNS
from kvjax.train.tokenizer import ASSISTANT, END, PAIRS, SPECIAL, USER, train_tokenizer

SHIPPED = Path(__file__).parents[2] / "models" / "kvjax_small"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@given(text=st.text())
def test_any_text_survives(text):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    ids = tokenizer(text)["input_ids"]
    if not any(special in text for special in SPECIAL):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["héllo  世界 😀\r\n\t x  ", "\x00\x7f\u200d", "   if x:\n\n\n\treturn\n"])
def test_hard_texts_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_in_pairs(tokenizer):
    assert tokenizer.tokenize("x = 40719") == ["x", "Ġ=", "Ġ40", "71", "9"]
    assert tokenizer.tokenize(" 4821-3377.") == ["Ġ48", "21", "-", "33", "77", "."]
    assert all(len(tokenizer.tokenize(blank + pair)) == 1 for pair in PAIRS for blank in ("", " "))


def test_every_noun_is_one_token(tokenizer):
    assert all(len(tokenizer(f" {noun}")["input_ids"]) == 1 for noun in NOUNS)


def test_a_chat_is_marked_by_roles(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (f"{USER}Hi{END}{ASSISTANT}Yes{END}")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True) == (
        f"{USER}Hi{END}{ASSISTANT}"
    )
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids[0] == SPECIAL.index(USER)
    assert ids[-1] == SPECIAL.index(END)


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(TemplateError, match="wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


def test_too_little_text_for_a_vocabulary_says_so():
    with pytest.raises(ValueError, match="add text"):
        train_tokenizer(["a b c"], vocabulary=9000, word_weight=6)
