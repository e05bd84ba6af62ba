"""Three tokenizers of different make, and text as people write it."""

from pathlib import Path

import hypothesis.strategies as st
import tokenizers
from transformers import PreTrainedTokenizerFast

from kvjax.engine.text.tokenizer import REPLACEMENT, Tokenizer
from tests.engine import tiny

PUBLISHED = Path(__file__).parents[2] / "models" / "kvjax_small"
NAMES = ("byte level", "byte fallback", "published")

# Scripts of 1 to 4 bytes a character, marks that combine, emoji of several characters.
TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_characters="▁"),  # which is a space to SentencePiece
        st.sampled_from("the in an\n\t  "),
        st.sampled_from("你好世界こんにちは안녕"),
        st.sampled_from("🙂👩‍👩‍👧🏳️‍🌈🇩🇪👍🏽"),
        st.sampled_from("éü̈àä̃ʼक्षि"),
        st.just(REPLACEMENT),
    ),
    max_size=30,
)


def wrap(tokenizer: tokenizers.Tokenizer, chat_template: str | None = None) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tiny.SPECIAL[0]), chat_template)


def make(name: str) -> Tokenizer:
    match name:
        case "byte level":
            return wrap(tiny.byte_level())
        case "byte fallback":
            return wrap(tiny.byte_fallback())
        case _:
            return Tokenizer.from_pretrained(PUBLISHED)
