"""Rotary position embedding and the ways checkpoints stretch it to longer contexts.

A scaling is a frozen dataclass with one function, `frequencies`; its fields carry the names of the Hugging
Face `rope_parameters`, so reading and writing a config is the identity. Frequencies follow transformers
operation by operation in float32 (positions of 10^5 amplify every rounding), and are NumPy constants at trace
time.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Gemma 3's global layers)."""

    factor: float

    def frequencies(self, base: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        return base / np.float32(self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, base: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        context = self.original_max_position_embeddings
        wavelength = 2 * math.pi / base
        smooth = (context / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        middle = (1 - smooth) * base / self.factor + smooth * base
        scaled = np.where(wavelength > context / self.low_freq_factor, base / self.factor, middle)
        return np.where(wavelength < context / self.high_freq_factor, base, scaled), 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): each dimension interpolated by how often it turns within the original
    context.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, base: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        dim = 2 * base.size

        def turning(rotations: float) -> float:
            """The dimension that turns `rotations` times within the original context."""
            return (
                dim
                * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low, high = turning(self.beta_fast), turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(base.size, dtype=np.float32) - low) / (high - low if high != low else 0.001)
        keep = 1 - np.clip(ramp, 0, 1)
        return base / self.factor * (1 - keep) + base * keep, self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): one factor a dimension, a set for short contexts and one for long.

    transformers changes sets when a sequence outgrows the original context, which makes every cached key
    wrong. So `use_long` is chosen once, when the model is loaded, from the longest sequence it will serve (as
    vLLM does).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None
    use_long: bool = True

    def __post_init__(self) -> None:
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"longrope has {len(self.short_factor)} short factors and {len(self.long_factor)} long ones"
            )

    def frequencies(self, base: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        factors = self.long_factor if self.use_long else self.short_factor
        if len(factors) != base.size:
            raise ValueError(f"longrope has {len(factors)} factors for {base.size} rotated pairs of dimensions")
        return base / np.asarray(factors, np.float32), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


Scaling = Linear | Llama3 | Yarn | LongRope


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How one layer encodes positions.

    Attributes:
        dim: rotated dimensions of a head, the first ones; even, at most head_dim.
        theta: base of the wavelengths.
        scaling: None for the plain embedding.
    """

    dim: int
    theta: float
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 2:
            raise ValueError(f"rope dim is {self.dim}, must be positive and even")

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Angle a position for each pair of dimensions, float32 [dim/2], and a factor for cos and sin."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        base = np.float32(1.0) / np.float32(self.theta) ** exponents
        if self.scaling is None:
            return base, 1.0
        scaled, factor = self.scaling.frequencies(base, self.theta)
        return scaled.astype(np.float32), factor


def rotation(config: RopeConfig, positions: Int[Array, "*B"]) -> tuple[Float[Array, "*B 1 R"], Float[Array, "*B 1 R"]]:
    """Cosine and sine of the angles at `positions`, float32, ready to broadcast over heads; R = config.dim /
    2.
    """
    frequencies, factor = config.frequencies()
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "*B N D"], cos: Float[Array, "*B 1 R"], sin: Float[Array, "*B 1 R"]
) -> Float[Array, "*B N D"]:
    """Turn the first 2R dimensions of each head; pairs are (i, i + R), the order of Hugging Face
    checkpoints.
    """
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x.dtype)
