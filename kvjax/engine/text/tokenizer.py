"""Tokenizer: text to tokens and back, a thin face over a Hugging Face tokenizer, loaded from files only."""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that no deep learning framework was found

# A byte sequence that is not UTF-8 decodes to this; at the end of a text it may be a character still to come.
REPLACEMENT = "\ufffd"
# A space in the vocabulary of a SentencePiece model.
SPACE = "\u2581"


class Tokenizer:
    """A tokenizer of the `tokenizers` library with its chat template.

    Safe to use from several threads: it is never changed after it is built.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """Wraps a transformers tokenizer; `chat_template` (Jinja source) replaces its own."""
        self._tokenizer = tokenizer
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], chat_template: str | None = None) -> "Tokenizer":
        """Reads a folder in the Hugging Face format, or a GGUF file.

        Raises:
            FileNotFoundError: the folder has no tokenizer.
            ValueError: the file is damaged, or has a tokenizer of a kind that is not implemented.
        """
        from kvjax.models.gguf import GGUFFile, is_gguf, read_tokenizer

        if is_gguf(pathlib.Path(path)):
            return cls(read_tokenizer(GGUFFile(path)), chat_template)
        from transformers import AutoTokenizer  # seconds to import

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no tokenizer can be read from {path}: {error}") from error
        return cls(tokenizer, chat_template)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included. A model may have more rows than that."""
        return len(self._tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template; the names and sources of several, if there are several."""
        template = self._tokenizer.chat_template
        return str(template) if template else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """The prompt of a conversation, rendered in a sandbox.

        Raises:
            ValueError: there is no template, or it refuses these messages (it says why).
        """
        import jinja2

        if not self.has_chat_template:
            raise ValueError("this model has no chat template; use completions, or give one with --chat-template")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)  # the template writes the special tokens itself

    def token_text(self, token: int) -> str:
        """What one token looks like inside a text; parts of characters show as U+FFFD."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece and piece.startswith(SPACE):  # decoded alone it would lose that space
            return piece.replace(SPACE, " ")
        return self.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, parts of characters included."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token not in self._special and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):  # byte fallback of SentencePiece models
            return bytes([int(piece[3:5], 16)])
        return self.token_text(token).encode()

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        byte_level = "ByteLevel" in self._tokenizer.backend_tokenizer.to_str()
        special = frozenset(self._tokenizer.all_special_ids)
        return special if byte_level else frozenset(range(self.vocab_size))


def _bytes_of_characters() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level BPE vocabulary (that of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()
