import hypothesis
import pytest

from kvjax.engine.text.tokenizer import Tokenizer
from tests.engine import tiny, vocabularies
from tests.engine.vocabularies import TEXT


@pytest.fixture(scope="module")
def of_name():
    return {name: vocabularies.make(name) for name in vocabularies.NAMES}


@pytest.mark.parametrize("name", vocabularies.NAMES)
@hypothesis.given(text=TEXT)
def test_text_survives_and_bytes_of_tokens_are_its_bytes(of_name, name, text):
    tokenizer = of_name[name]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    assert b"".join(tokenizer.token_bytes(token) for token in tokens) == text.encode()


@pytest.mark.parametrize("name", vocabularies.NAMES)
def test_every_id_has_a_text_and_bytes(of_name, name):
    tokenizer = of_name[name]
    for token in range(tokenizer.vocab_size + 30):  # models have more rows than their tokenizer has tokens
        raw, text = tokenizer.token_bytes(token), tokenizer.token_text(token)
        assert raw.decode(errors="replace") == text
    assert tokenizer.token_bytes(tokenizer.vocab_size + 30) == b""


def test_special_tokens():
    tokenizer = vocabularies.make("byte level")
    assert tokenizer.eos_token_id == tiny.EOS
    assert tokenizer.vocab_size < tiny.VOCAB
    assert tokenizer.encode("a<|eos|>b") == [*tokenizer.encode("a"), tiny.EOS, *tokenizer.encode("b")]
    assert tokenizer.decode([tiny.EOS, *tokenizer.encode("b")]) == "b"
    assert tokenizer.decode([tiny.EOS], skip_special_tokens=False) == "<|eos|>"
    assert tokenizer.token_text(tiny.EOS) == "<|eos|>"
    assert tokenizer.token_bytes(tiny.EOS) == b"<|eos|>"


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no tokenizer can be read from {tmp_path}"):
        Tokenizer.from_pretrained(tmp_path)


MESSAGES = [{"role": "user", "content": "hi"}]


def test_conversations():
    template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}{{ 'A' if add_generation_prompt }}"
    tokenizer = vocabularies.wrap(tiny.byte_level(), template)
    assert tokenizer.has_chat_template
    assert tokenizer.chat_template == template
    tokens = tokenizer.apply_chat_template(MESSAGES)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<|user|>hi<|end|>A"
    assert tokens[0] == tiny.SPECIAL.index("<|user|>")
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == tokens[:-1]


def test_without_a_template():
    tokenizer = vocabularies.make("byte level")
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="no chat template; use completions, or give one with --chat-template"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", "refuses these messages: no users here"),
        ("{{ messages.missing.attribute }}", "refuses these messages"),
        ("{% if %}", "refuses these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages: .*unsafe"),  # a sandbox
        ("{{ messages.clear() }}", "refuses these messages: .*unsafe"),
    ],
)
def test_templates_that_fail(template, message):
    tokenizer = vocabularies.wrap(tiny.byte_level(), template)
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(MESSAGES)
