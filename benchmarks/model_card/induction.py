"""An induction transformer with hand-set weights: it predicts the token after the last occurrence of the current one.

Two layers, in the format of Llama, no training. In layer 0 every head looks one token back and writes that token's
code next to its own; in layer 1 every head looks for the latest key whose previous token is the current one and
copies the token found there. So it is known what each layer may lose: layer 0 nothing of the last two keys, layer 1
nothing of the needles, and all else is free.

How: RMSNorm sees vectors of constant length and is the identity. Head dimensions turn with their RoPE frequencies.
Fast ones tell distances apart: a query turned one token back meets only the key before it. Slow ones hardly turn over
the whole context, and hold the codes that are matched. One between them falls with distance, so the latest wins.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from kvjax.models import Decoder, DecoderConfig, LayerConfig, RopeConfig, save
from kvjax.models.parameters import materialise

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128
CODE = 64  # numbers of +1 and -1 that stand for a token
WIDTH = 256  # its own code, the previous token's, the answer's, and one dimension that is always 1
OWN, PREVIOUS, ANSWER, ONE = slice(0, 64), slice(64, 128), slice(128, 192), 192
PAIRS = HEAD_DIM // 2  # dimensions i and i + PAIRS turn together
SLOW = PAIRS - CODE // 2  # the first pair that holds codes
TURN = 0.05  # radians that the fastest of those turns over the whole context
FAST = 12  # pairs that tell distances apart in layer 0
MARGIN = 16.0  # by how much a score leads, so that all others together weigh nothing: e**-16


@dataclass(frozen=True)
class Induction:
    """Sizes of the transformer.

    Attributes:
        vocabulary: tokens; each gets a code of its own.
        max_position: longest context in tokens; scores grow with it, and float32 holds them up to 128K.
        eos_token_ids: tokens that end a text; none by default, so that it goes on copying.

    Raises:
        ValueError: sizes beyond what codes or float32 can tell apart.
    """

    vocabulary: int = 256
    max_position: int = 4096
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.vocabulary <= 2048:
            raise ValueError(f"vocabulary is {self.vocabulary}, must be 2 to 2048 for codes of {CODE} signs")
        if not 16 <= self.max_position <= 131_072:
            raise ValueError(f"max_position is {self.max_position}, must be 16 to 131072 for scores in float32")

    @property
    def config(self) -> DecoderConfig:
        """The configuration of an ordinary Llama."""
        # the first slow pair turns TURN radians over the whole context
        theta = (self.max_position / TURN) ** (PAIRS / SLOW)
        return DecoderConfig(
            family="llama",
            vocab_size=self.vocabulary,
            width=WIDTH,
            mlp_width=8,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            layers=(LayerConfig(RopeConfig(HEAD_DIM, theta)),) * 2,
            query_scale=HEAD_DIM**-0.5,
            norm_eps=1e-6,
            max_position=self.max_position,
            eos_token_ids=self.eos_token_ids,
        )

    def codes(self) -> Float[np.ndarray, "V 64"]:
        """A row of signs for each token, any two of which differ in a quarter of their places at least."""
        rng, rows = np.random.default_rng(0), np.empty((0, CODE))
        while len(rows) < self.vocabulary:
            row = rng.choice([-1.0, 1.0], CODE)
            if not len(rows) or np.max(rows @ row) <= CODE / 2:
                rows = np.vstack([rows, row])
        return rows

    def build(self) -> Decoder:
        """The decoder, float32."""
        config = self.config
        codes, frequencies = self.codes(), config.layers[0].rope.frequencies()[0].astype(np.float64)
        embedding = np.zeros((self.vocabulary, WIDTH))
        embedding[:, OWN], embedding[:, ONE] = codes, 1.0
        unembedding = np.zeros((self.vocabulary, WIDTH))
        unembedding[:, ANSWER] = codes
        values: dict[str, np.ndarray] = {"embedding": embedding, "unembedding": unembedding}
        values |= _layer(0, 1, *previous_token(frequencies, self.max_position), OWN, PREVIOUS)
        values |= _layer(1, 2, *match(frequencies, self.max_position), OWN, ANSWER)
        values["norm.weight"] = np.full(WIDTH, math.sqrt((3 * CODE + 1) / WIDTH))
        return _filled(Decoder(config, jnp.float32), values)


def previous_token(frequencies: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Query and key weights [D, E] of a head that sees the token before, whatever it is.

    A key is the same everywhere, the query is that key turned one token back; each pair's score is the cosine of
    frequency * (distance - 1).
    """
    fast = frequencies[:FAST]
    distances = np.arange(longest)
    scores = np.cos(fast[:, None] * (distances - 1)).sum(axis=0)
    lead = scores[1] - np.delete(scores, 1).max()
    strength = (MARGIN + math.log(longest)) / lead * math.sqrt(HEAD_DIM)
    query, key = np.zeros((HEAD_DIM, WIDTH)), np.zeros((HEAD_DIM, WIDTH))
    query[:FAST, ONE], query[PAIRS : PAIRS + FAST, ONE] = strength * np.cos(fast), -strength * np.sin(fast)
    key[:FAST, ONE] = 1.0
    return query, key


def match(frequencies: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Query and key weights [D, E] of a head that sees the latest key whose previous token is the current one.

    Codes score CODE where they match and half of it at most where not, less what the slow pairs turn. One pair scores
    -sin(frequency * distance): it falls by MARGIN a token at least, and less over the whole context than a match leads.
    """
    scale = math.sqrt(HEAD_DIM)
    pair = int(np.argmax(frequencies * longest <= 1.0))  # the fastest that falls all the way
    recency = MARGIN / (math.sin(frequencies[pair] * longest) - math.sin(frequencies[pair] * (longest - 1)))
    turned = np.max(frequencies[SLOW:]) * longest
    lead = CODE * math.cos(turned) - CODE / 2 - CODE * math.sin(turned)
    strength = (recency * math.sin(frequencies[pair] * longest) + MARGIN + math.log(longest)) / lead
    query, key = np.zeros((HEAD_DIM, WIDTH)), np.zeros((HEAD_DIM, WIDTH))
    places = np.r_[SLOW:PAIRS, PAIRS + SLOW : HEAD_DIM]
    query[places, OWN], key[places, PREVIOUS] = strength * scale * np.eye(CODE), np.eye(CODE)
    # turned by a quarter: the score is cos(angle + pi / 2)
    query[PAIRS + pair, ONE], key[pair, ONE] = recency * scale, 1.0
    return query, key


def _layer(
    index: int, codes: int, query: np.ndarray, key: np.ndarray, read: slice, write: slice
) -> Mapping[str, np.ndarray]:
    """All weights of a layer whose heads do the same: they read one code and write it, each a part of it.

    `codes`: how many codes its input holds, next to the one; that is the length that the norm undoes.
    """
    prefix = f"layers.{index}."
    value, output = np.zeros((HEAD_DIM, WIDTH)), np.zeros((WIDTH, HEADS, HEAD_DIM))
    value[:CODE, read] = np.eye(CODE)
    for head in range(HEADS):
        output[write, head, :CODE] = np.eye(CODE) / HEADS
    return {
        f"{prefix}attention_norm.weight": np.full(WIDTH, math.sqrt((codes * CODE + 1) / WIDTH)),
        f"{prefix}attention.query": np.repeat(query[None], HEADS, axis=0),
        f"{prefix}attention.key": np.repeat(key[None], KV_HEADS, axis=0),
        f"{prefix}attention.value": np.repeat(value[None], KV_HEADS, axis=0),
        f"{prefix}attention.output": output,
    }


def _filled(decoder: Decoder, values: Mapping[str, np.ndarray]) -> Decoder:
    """The decoder with these weights; MLPs, which have nothing to do, are zero, and their norms one."""

    def value(path: str, param: object) -> jax.Array:
        shape = param.shape  # pyright: ignore[reportAttributeAccessIssue]
        if path in values:
            return jnp.asarray(values[path].reshape(shape), jnp.float32)
        return jnp.full(shape, 1.0 if path.endswith("norm.weight") else 0.0, jnp.float32)

    return materialise(decoder, value)


def write(induction: Induction, folder: Path) -> None:
    """Writes the transformer in the Hugging Face format, with a tokenizer that calls its tokens t0, t1, t2 ..."""
    save(induction.build(), folder)
    words = Tokenizer(WordLevel({f"t{token}": token for token in range(induction.vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Writes the transformer with its tokenizer, in the Hugging Face format."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card.induction", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--max-position", type=int, default=4096)
    args = parser.parse_args(argv)
    write(Induction(args.vocabulary, args.max_position), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
