"""Tokenizers of GGUF files: tokens, special tokens, BOS and EOS, and refusals that name what is not implemented."""

import numpy as np
import pytest

from kvjax.engine.text.tokenizer import Tokenizer
from kvjax.models.gguf import GGUFFile, hf_config, read_tokenizer
from kvjax.models.gguf.pre import PRE_TOKENIZERS
from tests.models import gguf_file
from tests.models.gguf_file import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

MERGES = ("Ġ t", "h e", "Ġt he", "1 2", "Ġ Ġ")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def make(tmp_path, metadata, architecture="llama", rows=None):
    count = rows or len(metadata["tokenizer.ggml.tokens"])
    sizes = {
        "context_length": 64,
        "embedding_length": 8,
        "block_count": 1,
        "feed_forward_length": 8,
        "attention.head_count": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    fields = {f"{architecture}.{name}": value for name, value in sizes.items()} | metadata
    tensors = {"token_embd.weight": np.zeros((count, 8), np.float32)}
    return gguf_file.write(tmp_path / "model.gguf", architecture, fields, tensors)


def byte_level(**fields):
    return gguf_file.byte_level_vocabulary(300, MERGES) | {
        f"tokenizer.{name.replace('__', '.')}": value for name, value in fields.items()
    }


def sentencepiece(**fields):
    """The vocabulary of a SentencePiece model: unknown, BOS, EOS, the bytes, characters, and joins with a score."""
    joins = ["▁h", "el", "lo", "▁hel", "▁hello", "ab", "bc"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"helowabc",
        *joins,
        "<|end|>",
        "<tag>",
    ]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 261) + [CONTROL, USER_DEFINED]
    scores = [0.0] * 259 + [-100.0] * 9 + [-1.0, -2.0, -3.0, -4.0, -5.0, -7.0, -6.0] + [0.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def pieces(tokenizer, text, **options):
    return tokenizer._tokenizer.convert_ids_to_tokens(tokenizer.encode(text, **options))


def test_byte_level_merges_and_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, byte_level(chat_template=TEMPLATE)))
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_token_id == 2
    assert pieces(tokenizer, "the the  12<|im_end|>") == ["t", "he", "Ġthe", "ĠĠ", "1", "2", "<|im_end|>"]
    text = "ünï 漢字 🎉\n<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("ünï"))) == "ünï".encode()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert tokenizer.decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({}, "t"),  # smollm does not begin with BOS
        ({"ggml__add_bos_token": True}, "<|im_start|>"),
        ({"ggml__pre": "llama-bpe"}, "<|im_start|>"),
        ({"ggml__pre": "llama-bpe", "ggml__add_bos_token": False}, "t"),
    ],
)
def test_a_text_begins_with_bos_where_the_file_or_the_kind_says_so(fields, first, tmp_path):
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, byte_level(**fields)))
    assert pieces(tokenizer, "the")[0] == first
    assert pieces(tokenizer, "the", add_special_tokens=False)[0] == "t"
    # whole parts that are tokens need no merge there
    assert (pieces(tokenizer, " 12")[-1] == "12") == (fields.get("ggml__pre") == "llama-bpe")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_way_to_cut_a_text_loses_nothing(name, tmp_path):
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, byte_level(ggml__pre=name)))
    text = "Don't  SAY\n\n 1234 x_y; naïve café 漢字 مرحبا \t!?"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_sentencepiece_merges_by_score_and_spells_unknown_characters_in_bytes(tmp_path):
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, sentencepiece()))
    assert pieces(tokenizer, "hello") == ["<s>", "▁hello"]
    assert pieces(tokenizer, "abc", add_special_tokens=False) == ["▁", "a", "bc"]  # bc has the better score
    assert pieces(tokenizer, "é", add_special_tokens=False) == ["▁", "<0xC3>", "<0xA9>"]
    assert pieces(tokenizer, "<tag>hello<|end|>", add_special_tokens=False) == ["<tag>", "▁hello", "<|end|>"]
    for text in ("hello hello", "  hello", "é漢 hello"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(tokenizer.encode("é", add_special_tokens=False)[1]) == b"\xc3"


def test_sentencepiece_without_a_space_in_front(tmp_path):
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, sentencepiece(add_space_prefix=False, add_bos_token=False)))
    assert pieces(tokenizer, "hello") == ["h", "el", "lo"]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_gemma_merges_in_the_order_of_its_vocabulary(tmp_path):
    path = make(tmp_path, sentencepiece(scores=[0.0] * 277), "gemma3")
    assert pieces(Tokenizer.from_pretrained(path), "abc", add_special_tokens=False) == ["▁", "ab", "c"]


def test_phi3_strips_what_follows_its_control_tokens(tmp_path):
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, sentencepiece(), "phi3"))
    assert pieces(tokenizer, "<|end|>\nhello", add_special_tokens=False) == ["<|end|>", "▁hello"]


def test_tokens_that_end_a_turn_are_those_named_and_those_known_by_their_text(tmp_path):
    path = make(tmp_path, byte_level(ggml__eot_token_id=7))
    assert hf_config(GGUFFile(path))["eos_token_id"] == [2, 7, 0]
    # of SentencePiece vocabularies, only control tokens count
    path = make(tmp_path, sentencepiece())
    assert hf_config(GGUFFile(path))["eos_token_id"] == [2, 275]


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (byte_level(ggml__model="bert"), "has a tokenizer of kind 'bert'; these are implemented: gpt2, llama"),
        (
            byte_level(ggml__pre="glm4"),
            r"cuts its text by 'glm4' \(tokenizer\.ggml\.pre\); these are implemented: dbrx,",
        ),
        (byte_level(ggml__pre=None), r"does not say how its text is cut before the merges .* old converter"),
        (byte_level(ggml__merges=["a b c"]), "has the merge 'a b c', which is not of two tokens"),
        (byte_level(ggml__merges=["漢 b"]), "has a tokenizer that cannot be built"),
        (byte_level(ggml__token_type=[1, 2]), r"has 2 numbers in 'tokenizer\.ggml\.token_type' for its 300 tokens"),
        (byte_level(ggml__eos_token_id=300), r"has 300 as .*eos_token_id'; the model has tokens 0 to 299"),
        (byte_level(chat_template=5), r"has 5 as 'tokenizer\.chat_template'; only a text"),
        (sentencepiece(scores=None), r"has no 'tokenizer\.ggml\.scores' in its metadata"),
        (sentencepiece(scores=[1.0]), r"has 1 numbers in 'tokenizer\.ggml\.scores' for its 277 tokens"),
    ],
)
def test_what_is_not_implemented_or_does_not_fit_is_named(metadata, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        read_tokenizer(GGUFFile(make(tmp_path, metadata)))


def test_more_tokens_than_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has 300 tokens and 299 rows in its embedding"):
        read_tokenizer(GGUFFile(make(tmp_path, byte_level(), rows=299)))
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, byte_level(), rows=320))
    assert tokenizer.decode([310]) == ""
