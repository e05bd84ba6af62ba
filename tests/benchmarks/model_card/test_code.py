"""The baseline by hand, and that model and baseline are asked about the same bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

from benchmarks.model_card import code
from benchmarks.model_card.code import NEW, CodeMeasurement, Line, lines, scores, windows
from benchmarks.model_card.gate import serving
from benchmarks.model_card.ngram import ByteNgram
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig, random, save

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=1280,
    width=8,
    mlp_width=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    layers=(LayerConfig(RopeConfig(8, 1e4)),),
    query_scale=8**-0.5,
    norm_eps=1e-6,
    max_position=64,
    qk_norm=True,
)


def folder_of(decoder, tokenizer_folder, path):
    """A model folder: a decoder with the tests' tokenizer."""
    for file in tokenizer_folder.glob("*"):
        (path / file.name).write_bytes(file.read_bytes())
    save(decoder, path)
    return path


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


def test_bits_and_lines_are_the_models_own(tokenizer_folder, tmp_path):
    """By one pass over each window, and one over everything for each written token; the baseline has the same bytes."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    decoder = random(CONFIG, jax.random.key(0), embedding_std=1.0)
    [end] = tokenizer("\n")["input_ids"]
    decoder.unembedding[...] = decoder.unembedding[...].at[end].mul(2.5)  # so that some lines end
    graph, params = nnx.split(decoder)
    logits = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))
    text = "def größe(x):\n    return x + 1  # größer\n" * 40
    wanted = [Line(text[:size], "") for size in (5, 9, 200, 303)]
    ngram = ByteNgram([b"x"], 1)
    with serving(folder_of(decoder, tokenizer_folder, tmp_path), 64 + NEW) as engine:
        measurement = CodeMeasurement(engine, tokenizer, ngram)
        model, baseline = measurement.bits(text, 64, 4)
        written, _ = measurement.lines(wanted, 64)
    ids = tokenizer(text)["input_ids"]
    starts = windows(len(ids), 64, 4)
    scored = [tokenizer.decode(ids[: s + 64]).encode()[len(tokenizer.decode(ids[: s + 32]).encode()) :] for s in starts]
    size = sum(map(len, scored))
    assert baseline == pytest.approx(sum(ngram.bits(part).sum() for part in scored) / size, rel=1e-2)
    found = [jax.nn.log_softmax(logits(jnp.array([ids[start : start + 64]]))[0]) for start in starts]
    own = [row[at - 1, ids[start + at]] for row, start in zip(found, starts, strict=True) for at in range(32, 64)]
    assert model == pytest.approx(-sum(map(float, own)) / np.log(2) / size, rel=1e-2)
    ended = []
    for line, answer in zip(wanted, written, strict=True):
        seen = tokenizer(line.context.removesuffix(" "))["input_ids"][NEW - 64 :]  # the context holds 64 tokens
        every = list(seen)
        for _ in range(NEW):
            every.append(int(jnp.argmax(logits(jnp.array([every + [0] * (64 - len(every))]))[0, len(every) - 1])))
        first, *others = tokenizer.decode(every[len(seen) :], skip_special_tokens=True).split("\n")
        assert answer.rstrip("\ufffd") == first.rstrip("\ufffd")  # the engine shows no half of a last character
        ended.append(bool(others))
    assert any(ended)


def test_a_window_longer_than_the_models_context_is_refused(tokenizer_folder, tmp_path, capsys):
    folder = folder_of(random(CONFIG, jax.random.key(0)), tokenizer_folder, tmp_path)
    with pytest.raises(SystemExit) as ended:
        code.main(["--model", str(folder), "--length", "65"])
    assert ended.value.code == 2
    assert "--length 65 is more than the model's context of 64 tokens" in capsys.readouterr().err
