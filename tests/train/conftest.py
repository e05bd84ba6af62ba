"""A tokenizer and a run so small that they train in seconds."""

from pathlib import Path

import pytest

from kvjax.train.config import ModelConfig, StageConfig, TrainConfig
from kvjax.train.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = Path(pytest.__file__).read_text() + Path(__file__).read_text()
    save_tokenizer(train_tokenizer([source], vocabulary=1280, word_weight=60), folder)
    return folder


@pytest.fixture(scope="session")
def toy(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    mix = {"repeats": 1.0, "recall": 1.0, "needles": 1.0, "variables": 0.5}
    return TrainConfig(
        model=ModelConfig(layers=1, width=16, mlp_width=32, heads=2, kv_heads=1, head_dim=8, tied=True),
        stages=(
            StageConfig(context=64, batch=2, steps=6, warmup=2, mix=mix),
            StageConfig(context=128, batch=1, steps=4, warmup=1, cooldown=2, mix=mix),
        ),
        tokenizer=tokenizer_folder,
        runs=tmp_path_factory.mktemp("runs"),
        evaluate_every=4,
        evaluate_batch=2,
        save_every=2,
    )
