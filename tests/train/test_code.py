"""The baseline by hand, and that model and baseline are asked about the same bytes."""

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from kvjax.models import DecoderConfig, LayerConfig, RopeConfig, random
from kvjax.train.code import Line, Measurement, lines, scores, windows
from kvjax.train.ngram import ByteNgram


def test_witten_bell_by_hand():
    """abab a: a stands 3 times, b 2 times, 2 kinds; after a came b twice, 1 kind; after b came a twice."""
    ngram = ByteNgram([b"ababa"], order=2)
    alone = {"a": (3 + 2 / 256) / (5 + 2), "b": (2 + 2 / 256) / (5 + 2), "c": (0 + 2 / 256) / (5 + 2)}
    after_a = {"b": (2 + 1 * alone["b"]) / (2 + 1), "a": (0 + 1 * alone["a"]) / (2 + 1)}
    found = ngram.probabilities([b"", b"", b"", b"a", b"a", b"c"], np.frombuffer(b"abcbac", np.uint8))
    # c is no known context, so the empty one decides
    wanted = [alone["a"], alone["b"], alone["c"], after_a["b"], after_a["a"], alone["c"]]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(ngram.bits(b"ab"), [-np.log2(alone["a"]), -np.log2(after_a["b"])], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("context", [b"", b"a", b"xyzab", b"banan", b"\xff\xff"])
def test_probabilities_sum_to_one(order, context):
    ngram = ByteNgram([b"banana bandana", b"\x00\xffanana"], order)
    found = ngram.probabilities([context] * 256, np.arange(256, dtype=np.uint8))
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found > 0).all()


def test_bits_of_a_text_are_those_of_its_bytes_one_by_one():
    ngram, text = ByteNgram([b"the cat sat on the mat"], 4), b"that cat \xe4"
    alone = ngram.probabilities([text[:i] for i in range(len(text))], np.frombuffer(text, np.uint8))
    np.testing.assert_allclose(ngram.bits(text), -np.log2(alone), rtol=1e-12)


def test_no_gram_runs_from_one_text_into_the_next():
    apart, joined = ByteNgram([b"ab", b"cd"], 2), ByteNgram([b"abcd"], 2)
    pair = [b"b"], np.frombuffer(b"c", np.uint8)
    assert apart.probabilities(*pair)[0] < joined.probabilities(*pair)[0]


def test_a_line_is_written_byte_by_byte_up_to_its_end():
    ngram = ByteNgram([b"def main():\n" * 5], 5)
    assert ngram.line(b"\ndef ", 80) == b"main():"
    assert ngram.line(b"\ndef ", 3) == b"mai"
    assert ByteNgram([b"        x = 1\n" * 5], 5).line(b"        ", 80) == b"x = 1"


@pytest.mark.parametrize(("texts", "order", "text"), [([b"a"], 8, "1 to 7"), ([b""], 5, "no bytes")])
def test_what_cannot_be_counted_is_refused(texts, order, text):
    with pytest.raises(ValueError, match=text):
        ByteNgram(texts, order)


def test_lines_are_code_from_second_halves_after_all_that_stands_before():
    text = "first = one_long_name\n# a comment that is long\nshort\n    second = a_long_name\nthird = `a_long_name`\n"
    [line] = lines([("a.py", text)], 1)
    assert line == Line(text[: text.index("second")], "second = a_long_name")
    with pytest.raises(ValueError, match="1 lines"):
        lines([("a.py", text)], 2)


def test_windows_never_score_a_byte_twice():
    assert windows(100, 40, 3) == [0, 30, 60]
    with pytest.raises(ValueError, match="100 tokens do not hold 9 windows"):
        windows(100, 40, 9)


def test_scores_ignore_indentation_and_count_whole_lines():
    wanted = [Line("    ", "return value"), Line("", "abcd")]
    found = scores(1.5, wanted, [" return value", "abxx"])
    assert (found.bits, found.exact) == (1.5, 0.5)
    assert found.similarity == pytest.approx((1 + 0.5) / 2)


def test_model_and_baseline_are_asked_about_the_same_bytes(tokenizer_folder):
    """A model whose output is flat says log2(V) bits a token; both are divided by the bytes of the same stretches."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = DecoderConfig(
        family="qwen3",
        vocab_size=1280,
        width=8,
        mlp_width=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        layers=(LayerConfig(RopeConfig(8, 1e4)),),
        query_scale=1.0,
        norm_eps=1e-6,
        max_position=64,
        qk_norm=True,
    )
    decoder = random(config, jax.random.key(0))
    decoder.norm.weight[...] = 0 * decoder.norm.weight[...]
    text = "def größe(x):\n    return x + 1  # größer\n" * 40
    ngram = ByteNgram([b"x"], 1)
    model, baseline = Measurement(decoder, tokenizer, ngram).bits(text, 64, 4, 3)
    ids = tokenizer(text)["input_ids"]
    starts = windows(len(ids), 64, 4)
    scored = [tokenizer.decode(ids[: s + 64]).encode()[len(tokenizer.decode(ids[: s + 32]).encode()) :] for s in starts]
    size = sum(map(len, scored))
    assert model == pytest.approx(4 * 32 * np.log2(1280) / size, rel=1e-2)
    assert baseline == pytest.approx(sum(ngram.bits(part).sum() for part in scored) / size, rel=1e-2)
