"""Random texts of a given number of tokens, for clients of a chat endpoint."""

import os
from collections.abc import Sequence

import numpy as np

from kvjax.engine.text.tokenizer import Tokenizer

TRIED = 2000  # tokens of the vocabulary that are looked at


class Words:
    """The words of a model that are one token each, with the space before them."""

    def __init__(self, model: str | os.PathLike[str]) -> None:
        self.tokenizer = Tokenizer.from_pretrained(model)
        tried = np.random.default_rng(0).permutation(self.tokenizer.vocab_size)[:TRIED].tolist()
        texts = {token: self.tokenizer.decode([token]).strip() for token in tried}
        self._words = [
            text for token, text in texts.items() if text.isalnum() and self.tokenizer.encode(f" {text}") == [token]
        ]
        if not self._words:
            raise ValueError(f"no word of the model in {os.fspath(model)} is one token")

    def text(self, count: int, *seed: int) -> str:
        """`count` words at random: as many tokens, or a few more where the first one has no space before it."""
        return " ".join(np.random.default_rng(seed).choice(self._words, count).tolist())

    def tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt that a server makes of a conversation."""
        return self.tokenizer.apply_chat_template(messages)
