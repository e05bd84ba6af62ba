"""Tokenizer: text to tokens and back, a thin face over a Hugging Face tokenizer, loaded from files only."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
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
    def backend(self) -> Any:
        """The tokenizer of transformers itself."""
        return self._tokenizer

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

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation as text, special tokens written out, rendered in a sandbox.

        Args:
            continue_final_message: leave the last message open, to be gone on with.
            variables: further variables of the template, as `enable_thinking`.

        Raises:
            ValueError: there is no template, or it refuses these messages (it says why).
        """
        import jinja2

        if not self.has_chat_template:
            raise ValueError("this model has no chat template; use completions, or give one with --chat-template")
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(variables or {}),
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """The prompt of a conversation as token ids: `render`, whose template writes the special tokens itself."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self.encode(text, add_special_tokens=False)

    @property
    def max_token_characters(self) -> int | None:
        """Most characters of a text that one token stands for; None where some may become no token at all."""
        return self._longest

    @functools.cached_property
    def _longest(self) -> int | None:
        description = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return max(map(len, self._tokenizer.get_vocab())) if keeps_all_characters(description) else None

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


def keeps_all_characters(description: Mapping[str, Any]) -> bool:
    """Whether every character of a text is in one of its tokens, by the `tokenizers` library's own description.

    Added tokens may take spaces beside them with them, normalisers may strip or compose, and some pre-tokenisers drop
    the spaces between words.
    """
    stages = [description.get(stage) for stage in ("normalizer", "pre_tokenizer")]
    for stage in stages:
        if stage is not None:
            stages += stage.get("normalizers", []) + stage.get("pretokenizers", [])
    return all(
        stage is None
        or stage["type"] in ("Sequence", "ByteLevel", "Metaspace", "Digits", "Prepend")
        or (stage["type"] == "Split" and stage["behavior"] != "Removed")
        or (stage["type"] == "Replace" and stage["content"] != "" and len(stage["pattern"].get("String", "")) == 1)
        for stage in stages
    ) and not any(token["lstrip"] or token["rstrip"] for token in description.get("added_tokens", []))


def _bytes_of_characters() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level BPE vocabulary (that of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()
