"""An engine on a GGUF file: the tokens that the same weights generate as safetensors, with a store for its KV."""

import pathlib
import shutil

from kvjax.engine import Engine, EngineConfig, SamplingParams
from kvjax.store.config import StoreConfig
from tests.models import gguf_file

SMALL = pathlib.Path(__file__).parents[2] / "models" / "kvjax_small"
CONFIG = EngineConfig(max_model_len=512, max_num_seqs=1, store=StoreConfig(host_cache_size=64 << 20))
PARAMS = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def test_a_file_generates_as_the_folder_it_is_made_from(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(SMALL, tmp_path / "checkpoint")
    path = gguf_file.convert(tmp_path / "checkpoint", tmp_path / "small.gguf", metadata={"tokenizer.ggml.pre": "gpt-2"})
    prompt = [*range(100, 400)]
    with Engine.from_pretrained(tmp_path / "checkpoint", CONFIG) as engine:
        [expected] = engine.generate([prompt], PARAMS, progress=False)
    with Engine.from_pretrained(path, CONFIG) as engine:
        [first] = engine.generate([prompt], PARAMS, progress=False)
        [again] = engine.generate([prompt], PARAMS, progress=False)
        assert "host" in engine.store_stats()  # whose keys speak of the digest of the file
    assert first.tokens == again.tokens == expected.tokens
