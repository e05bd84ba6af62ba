"""The mathematics of attention in `jax.numpy`: runs on every device, and is what kernels are tested against."""

from kvjax.attention.dense import decode_attention, prefill_attention

__all__ = ["decode_attention", "prefill_attention"]
