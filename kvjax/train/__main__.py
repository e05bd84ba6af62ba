"""`python -m kvjax.train --config configs/train/cpu.yaml`: trains, resumes, exports."""

import argparse
import time
from pathlib import Path

import jax

from kvjax.train.config import read_config
from kvjax.train.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    """Trains the model of a YAML config and writes it, in the Hugging Face format, beside its tokenizer."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.train", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--export", action="store_true", help="write the newest checkpoint; do not train")
    args = parser.parse_args(argv)
    config = read_config(args.config)
    config.runs.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config)
    device = jax.devices()[0]
    print(f"{trainer.parameters / 1e6:.2f}M parameters, {config.model.dtype}, on {device.device_kind}")
    if args.export:
        print(f"wrote {trainer.export(*trainer.newest())}")
        return
    print("scores are tokens/replies: the share predicted, one by one and whole")
    start = time.perf_counter()
    trainer.run()
    print(f"trained in {time.perf_counter() - start:.0f} s; wrote {config.folder}")


if __name__ == "__main__":
    main()
