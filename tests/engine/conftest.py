"""One engine for nearly all tests: starting it compiles for seconds."""

import pytest

from kvjax.engine import Engine, EngineConfig
from kvjax.engine.text.tokenizer import Tokenizer
from tests.engine import tiny
from tests.engine.client import Client, settle

SLOTS, CHUNK = 4, 256
CONFIG = EngineConfig(max_num_seqs=SLOTS, max_num_queued_reqs=60, prefill_chunk_size=CHUNK)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def _engine(folder):
    with Engine.from_pretrained(folder, CONFIG) as engine:
        yield engine


@pytest.fixture
def engine(_engine):
    """The shared engine; holds after every test that nothing is left of it."""
    yield _engine
    settle(_engine)


@pytest.fixture(scope="session")
def client():
    with Client() as client:
        yield client
