"""GGUF tokenizer: the vocabulary in the metadata of a file, as a fast tokenizer of transformers.

Two kinds: `gpt2`, byte-level BPE with merges in the file, cut beforehand by the expression that `tokenizer.ggml.pre`
names; and `llama`, SentencePiece-BPE, whose merges follow from the scores, and which spells what it does not know in
bytes. Control tokens of a file are special tokens here, and user-defined ones are matched whole.
"""

import os
from typing import Any

from kvjax.models.gguf.config import ARCHITECTURE, CONTROL, eos_token_ids, token_id
from kvjax.models.gguf.pre import PRE_TOKENIZERS, PreTokenizer
from kvjax.models.gguf.reader import GGUFFile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that no deep learning framework was found

SPACE = "\u2581"  # a space in the vocabulary of a SentencePiece model
_UNKNOWN, _USER_DEFINED, _BYTE = 2, 4, 6
_PREFIX = "tokenizer.ggml."


def read_tokenizer(file: GGUFFile) -> Any:
    """The `PreTrainedTokenizerFast` that a file describes, with its special tokens and its chat template.

    Raises:
        ValueError: a kind of tokenizer that is not implemented, or lists that do not fit together; says which.
    """
    kind = file.text(_PREFIX + "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise file.fault(f"has a tokenizer of kind {kind!r}; these are implemented: {', '.join(builders)}")
    tokens = file.texts(_PREFIX + "tokens")
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    if not 1 <= len(tokens) <= rows:
        raise file.fault(
            f"has {len(tokens):,} tokens and {rows:,} rows in its embedding; at most one a row can be used"
        )
    types = _list(file, "token_type", len(tokens), default=[1] * len(tokens))
    try:
        backend, add_bos = builders[kind](file, tokens, types)
        return _wrap(file, backend, tokens, types, add_bos)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library has no other
        raise file.fault(f"has a tokenizer that cannot be built: {error}") from error


def _byte_level(file: GGUFFile, tokens: list[str], types: list[Any]) -> tuple[Any, bool]:
    """Byte-level BPE, and whether it begins a text with BOS if the file does not say."""
    from tokenizers import Tokenizer, decoders, models

    del types
    pre = _pre_tokenizer(file)
    pairs = [tuple(merge.split(" ")) for merge in file.texts(_PREFIX + "merges")]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise file.fault(f"has the merge {' '.join(wrong)!r:.60}, which is not of two tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.ignore_merges))  # pyright: ignore[reportArgumentType]
    if (normalizer := pre.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[Any]) -> tuple[Any, bool]:
    """SentencePiece-BPE: any two neighbours whose join is a token may merge, the best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    gemma = file.text(ARCHITECTURE).startswith("gemma")
    # the order of Gemma's merges is that of its vocabulary: its scores are not in that order
    scores = [-float(i) for i in range(len(tokens))] if gemma else _list(file, "scores", len(tokens))
    special = {token for token, each in zip(tokens, types, strict=True) if each in (CONTROL, _USER_DEFINED, _BYTE)}
    unknown = next((token for token, each in zip(tokens, types, strict=True) if each == _UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores, special),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.flag(_PREFIX + "add_space_prefix", default=True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _merges(vocabulary: dict[str, int], scores: list[Any], special: set[str]) -> list[tuple[str, str]]:
    """Every pair of tokens whose join is a token, by the score of the join; of one join, by the tokens' ids."""
    ranked = []
    for token, i in vocabulary.items():
        if token in special:
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None and token[:cut] not in special and token[cut:] not in special:
                ranked.append((-scores[i], left, right, token[:cut], token[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _pre_tokenizer(file: GGUFFile) -> PreTokenizer:
    known = ", ".join(sorted(PRE_TOKENIZERS))
    if _PREFIX + "pre" not in file.metadata:
        raise file.fault(
            f"does not say how its text is cut before the merges ({_PREFIX}pre): it was made by an old converter; "
            f"these are implemented: {known}"
        )
    name = file.text(_PREFIX + "pre")
    if name not in PRE_TOKENIZERS:
        raise file.fault(f"cuts its text by {name!r:.60} ({_PREFIX}pre); these are implemented: {known}")
    return PRE_TOKENIZERS[name]


def _wrap(file: GGUFFile, backend: Any, tokens: list[str], types: list[Any], add_bos: bool) -> Any:
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    # llama.cpp strips the space behind these: Phi-3's template writes a newline there that it was not trained on
    strips = file.text(ARCHITECTURE) == "phi3" and file.text(_PREFIX + "model") == "llama"
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    for wanted, special in ((_USER_DEFINED, False), (CONTROL, True)):
        added = [
            AddedToken(token, normalized=False, special=special, rstrip=strips and special and token not in kept)
            for token, each in zip(tokens, types, strict=True)
            if each == wanted and token
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    ids = {name: token_id(file, key) for name, key in _SPECIAL.items()}
    ids["eos_token"] = next(iter(eos_token_ids(file)), None)
    named = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    before = [("bos_token", file.flag(_PREFIX + "add_bos_token", add_bos))]
    after = [("eos_token", file.flag(_PREFIX + "add_eos_token", default=False))]
    used = [name for name, wanted in before + after if wanted and name in named]
    if used:
        parts = {name: f"<{name}>" for name in used}
        single = [parts[n] for n, _ in before if n in parts] + ["$A"] + [parts[n] for n, _ in after if n in parts]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(single), special_tokens=[(parts[name], ids[name]) for name in used]
        )
    template = file.text("tokenizer.chat_template") if "tokenizer.chat_template" in file.metadata else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **named
    )


_SPECIAL = {"bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}


def _list(file: GGUFFile, name: str, length: int, default: list[Any] | None = None) -> list[Any]:
    """An array with one number for each token. Raises ValueError for another length."""
    if default is not None and _PREFIX + name not in file.metadata:
        return default
    values = file.numbers(_PREFIX + name)
    if len(values) != length:
        raise file.fault(f"has {len(values):,} numbers in {_PREFIX + name!r} for its {length:,} tokens")
    return values.tolist()
