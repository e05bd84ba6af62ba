"""The configuration of a training run: frozen data read from YAML. No arrays, no files."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

KINDS = ("repeats", "recall", "needles", "hard_needles", "id_needles", "variables", "chains", "python")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model to train, in the format of Qwen3.

    Attributes:
        dtype: of the arithmetic; weights are float32 while they are trained.
        saved_dtype: of the weights that are exported.
    """

    layers: int = 8
    width: int = 96
    mlp_width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 100_000.0
    embedding_std: float = 1.0
    tied: bool = False
    dtype: str = "float32"
    saved_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("dtype", "saved_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} must be float32 or bfloat16, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stretch of training at one context length; the optimiser starts anew with it.

    Attributes:
        context: tokens a sequence.
        batch: sequences a step.
        steps: at most so many.
        mix: how often each kind of document is drawn; weights, not necessarily of sum 1.
        learning_rate: reached after `warmup` steps, then constant, falling to zero over the last `cooldown`.
        halvings: step i learns from sequences of `context / 2 ** (i % (halvings + 1))`, and from as many more of them:
            what a model has learned at short lengths it forgets while it sees only long ones.
        until: leave the stage early once an evaluation's needle accuracy is at least this; None never does.
    """

    context: int
    batch: int
    steps: int
    mix: dict[str, float]
    learning_rate: float = 2e-3
    warmup: int = 200
    cooldown: int = 0
    halvings: int = 0
    until: float | None = None

    def shape(self, step: int) -> tuple[int, int]:
        """Sequences and tokens of each in one step."""
        halved = step % (self.halvings + 1)
        return self.batch << halved, self.context >> halved

    def __post_init__(self) -> None:
        unknown = set(self.mix) - set(KINDS)
        if unknown:
            raise ValueError(f"mix names {sorted(unknown)}; the kinds are {', '.join(KINDS)}")
        if self.halvings < 0 or self.context >> self.halvings < 64:
            raise ValueError(
                f"context must be at least 64 tokens to hold a needle and its question, got {self.context} halved "
                f"{self.halvings} times"
            )
        if min(self.batch, self.steps) < 1 or self.warmup + self.cooldown > self.steps:
            raise ValueError(
                f"batch and steps must be positive and warmup + cooldown <= steps, got "
                f"{self.batch}, {self.steps}, {self.warmup} + {self.cooldown}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run.

    Attributes:
        tokenizer: folder of the tokenizer's files.
        export: folder that the weights are written to, with the tokenizer beside them; None for the tokenizer's own.
        runs: folder of checkpoints and logs.
        evaluate_every, save_every: in steps.
        evaluate_batch: held-out documents of each kind an evaluation; at long contexts fewer.
        processes: that draw documents; 0 draws them in a thread. Batches are the same either way.
        vocabulary: tokens of the tokenizer, if one is trained for this run.
        betas, weight_decay, clip: of AdamW and of the gradient's global norm.
    """

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    tokenizer: Path
    runs: Path
    export: Path | None = None
    seed: int = 0
    evaluate_every: int = 100
    evaluate_batch: int = 16
    save_every: int = 200
    processes: int = 0
    vocabulary: int = 2048
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty: a run has at least one")
        if self.processes < 0:
            raise ValueError(f"processes is {self.processes}, must be 0 (a thread) or more")

    @property
    def folder(self) -> Path:
        """The folder that the model is written to."""
        return self.export or self.tokenizer

    @property
    def max_context(self) -> int:
        """The longest context that any stage trains."""
        return max(stage.context for stage in self.stages)


def read_config(path: Path) -> TrainConfig:
    """The run that a YAML file describes.

    Raises:
        TypeError: the file names a field that does not exist.
        ValueError: a value out of its bounds.
    """
    fields: dict[str, Any] = yaml.safe_load(path.read_text())
    fields["model"] = ModelConfig(**fields.get("model", {}))
    shared = fields.pop("every_stage", {})
    stages = [{**shared, **stage} for stage in fields["stages"]]
    for stage in stages:
        stage["mix"] = {kind: float(weight) for kind, weight in stage["mix"].items()}
    fields["stages"] = tuple(StageConfig(**stage) for stage in stages)
    for name in {"tokenizer", "runs", "export"} & fields.keys():
        fields[name] = Path(fields[name])
    if "betas" in fields:
        fields["betas"] = tuple(fields["betas"])
    return TrainConfig(**fields)
