"""The tokenizer that ships, and its training: a byte-level BPE, small, in the HF format.

Bytes are the alphabet, so any UTF-8 text survives a round trip. Digits stand in pairs from the left: two pairs nearly
name a number among hundreds of others, where single digits take a match of four tokens, which a small model does not
learn. The nouns of the generated tasks are single tokens, so few tokens hold many needles.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from kvjax.eval.tasks.library import standard_library
from kvjax.eval.tasks.words import ADJECTIVES, NOISE, NOUNS, PLACES, VERBS

EOS, PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

# Letters with one leading blank or mark; one or two digits with an optional blank; marks; line ends; other blanks.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception('roles are system, user and assistant, not ' + message.role) -}}
{%- endif -%}
{%- set content = message.content -%}
{%- if content is not string -%}
{%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- endif -%}
{{- '<|' + message.role + '|>' + content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

# Two digits are one token each, with the blank before them or without.
PAIRS = tuple(f"{number:02d}" for number in range(100))

# A noun or a pair counts this often in the merges' statistics: enough to be merged whole, whatever the corpus holds.
WORD_WEIGHT = 6000


def train_tokenizer(texts: Iterable[str], *, vocabulary: int, word_weight: int = WORD_WEIGHT) -> Tokenizer:
    """A tokenizer of exactly `vocabulary` tokens, from `texts` and the words of the generated tasks.

    Args:
        word_weight: how often each noun and pair of digits is counted, besides the texts; other words a sixth of it.

    Raises:
        ValueError: the texts are too few to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def everything() -> Iterator[str]:
        yield from texts
        yield "".join(f" {word}" for word in NOUNS + PAIRS) * word_weight
        yield "-".join(PAIRS) * word_weight
        asking = "What is are the code codes for and\nWhere does go goes to\nThe\nCopy"
        yield (asking + "\n") * word_weight
        others = (*ADJECTIVES, *VERBS, *PLACES, *" ".join(NOISE).replace(".", "").split())
        yield "".join(f" {word}" for word in others) * (word_weight // 6)

    tokenizer.train_from_iterator(everything(), trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the texts gave {tokenizer.get_vocab_size()} tokens, not {vocabulary}: add text")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that `transformers.AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main(argv: list[str] | None = None) -> None:
    """`python -m kvjax.train.tokenizer --out models/kvjax_small`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--vocabulary", type=int, default=2048)
    args = parser.parse_args(argv)
    texts = [text for _, text in standard_library()]
    tokenizer = train_tokenizer(texts, vocabulary=args.vocabulary)
    save_tokenizer(tokenizer, args.out)
    size = sum(map(len, texts))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    whole = sum(len(tokenizer.encode(f" {noun}").ids) == 1 for noun in NOUNS)
    print(f"{args.vocabulary} tokens; {len(texts)} files, {size / 1e6:.1f} MB of Python")
    print(f"that is {tokens / 1e6:.1f}M tokens of {size / tokens:.2f} bytes; {whole}/{len(NOUNS)} nouns are one")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
