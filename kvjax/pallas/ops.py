"""Operation tables of the attention backends: Pallas kernels for a TPU or a Hopper GPU, jax.numpy for the rest.

Over several devices each computes its own kv heads, and nothing passes between them. XLA splits jax.numpy by itself;
kernels, which it cannot look into, are split here.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.attention.ops import REFERENCE_OPS, Ops, PageView
from kvjax.attention.read_units import ReadUnits
from kvjax.cache import TENSOR
from kvjax.pallas.decode_attention import decode_attention
from kvjax.pallas.dispatch import REFERENCE, dispatch, native
from kvjax.pallas.observation_scores import attention_received
from kvjax.pallas.page_scores import page_scores
from kvjax.pallas.page_selection import page_selection
from kvjax.pallas.prefill_attention import prefill_attention
from kvjax.pallas.selected_attention import selected_attention

_HEADS, _KV_HEADS, _ALL = PartitionSpec(None, TENSOR), PartitionSpec(TENSOR), PartitionSpec()


def backend_ops(attention_backend: str | None, mesh: Mesh | None = None) -> Ops:
    """The table of an attention backend.

    Args:
        attention_backend: "reference", or the name of kernels, whose operations raise NotImplementedError for what they
            do not implement; with a colon the path of a table outside the library, `package.module:TABLE`. None for the
            kernels of the devices JAX runs on; where one raises, or there are none, that operation is the reference's.
        mesh: the devices over whose axis "tensor" heads are split; XLA splits the operations of a table outside.

    Raises:
        ValueError: there is no table at that path.
    """
    if attention_backend is not None and ":" in attention_backend:
        return _find_table(attention_backend)
    name = native() if attention_backend is None else attention_backend
    if name == REFERENCE:
        return REFERENCE_OPS
    kernels = kernel_ops(name, mesh)
    if attention_backend is not None:
        return kernels
    operations = {}
    for field in dataclasses.fields(Ops):
        either = {REFERENCE: getattr(REFERENCE_OPS, field.name), name: getattr(kernels, field.name)}
        operations[field.name] = functools.partial(dispatch, field.name, either, None)
    return Ops(**operations)


def _find_table(path: str) -> Ops:
    module, _, attribute = path.partition(":")
    try:
        table = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"attention_backend={path!r} cannot be imported: {error}") from error
    if not isinstance(table, Ops):
        raise ValueError(
            f"attention_backend={path!r} is a {type(table).__name__}: give a table, dataclasses.replace(REFERENCE_OPS, "
            "...) of kvjax.attention.ops"
        )
    return table


def kernel_ops(implementation: str, mesh: Mesh | None = None) -> Ops:
    """The kernels of one platform, over the heads of each device of a mesh."""
    kernels = _Kernels(implementation, mesh)
    return Ops(**{field.name: getattr(kernels, field.name) for field in dataclasses.fields(Ops)})


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The operations of `Ops` by the kernels of one platform."""

    implementation: str
    mesh: Mesh | None

    def _run(
        self,
        operation: Callable[..., Any],
        inputs: tuple[PartitionSpec, ...],
        output: PartitionSpec,
        *arrays: Any,
        **options: Any,
    ) -> Any:
        """The operation over the heads of each device."""
        part = functools.partial(operation, implementation=self.implementation, **options)
        if self.mesh is not None:  # a kernel does not say over which axes its output varies
            part = jax.shard_map(part, mesh=self.mesh, in_specs=inputs, out_specs=output, check_vma=False)
        return part(*arrays)

    def prefill_attention(self, *arrays: Array, **options: Any) -> Float[Array, "P H D"]:
        return self._run(prefill_attention, (_HEADS, _KV_HEADS, _KV_HEADS, _ALL), _HEADS, *arrays, **options)

    def attention_received(self, *arrays: Array, **options: Any) -> Float[Array, "R T"]:
        return self._run(attention_received, (_HEADS, _KV_HEADS, _ALL, _ALL), _KV_HEADS, *arrays, **options)

    def page_scores(self, pages: PageView, *, page_size: int) -> Float[Array, "B K P"]:
        _check_contiguous(pages)
        arrays = pages.q, pages.summary, pages.entries
        options = {"page_size": page_size, "scale": pages.scale}
        return self._run(page_scores, (_HEADS, _HEADS, _ALL), _HEADS, *arrays, **options)

    def quest_scores(self, pages: PageView) -> Float[Array, "B H P"]:
        raise NotImplementedError("Quest's scores of each query head are jax.numpy's: kernels score for a whole group")

    def hybrid_scores(self, pages: PageView, *, page_size: int, dims: int) -> Float[Array, "B K C"]:
        raise NotImplementedError(f"scores by {dims} head dims are jax.numpy's: kernels score pages by all of them")

    def exact_scores(self, pages: PageView, *, shared: bool) -> Float[Array, "B R C"]:
        raise NotImplementedError("exact scores of tokens are jax.numpy's: kernels score pages by their summary")

    def page_selection(
        self,
        pages: PageView,
        scores: Float[Array, "B R P"],
        most: Int[Array, "B"] | None,
        *,
        page_size: int,
        count: int,
        newest: bool,
    ) -> ReadUnits:
        _check_contiguous(pages)
        if not newest:
            raise NotImplementedError("a selection without the newest page: kernels always choose it")

        def operation(scores: Array, entries: Array, *most: Array, **options: Any) -> ReadUnits:
            return page_selection(scores, entries, most=most[0] if most else None, **options)

        arrays = (scores, pages.entries) if most is None else (scores, pages.entries, most)
        inputs = (_HEADS, _ALL, _ALL)[: len(arrays)]
        return self._run(operation, inputs, _HEADS, *arrays, page_size=page_size, count=count)

    def selected_attention(self, pages: PageView, units: ReadUnits, *, page_size: int) -> Float[Array, "B K G D"]:
        _check_contiguous(pages)
        if page_size == 1:
            raise NotImplementedError("single tokens are selected: kernels read pages of consecutive entries")
        arrays = pages.q, pages.k, pages.v, pages.entries, units
        options = {"page_size": page_size, "scale": pages.scale}
        return self._run(selected_attention, (_HEADS, _HEADS, _HEADS, _ALL, _HEADS), _HEADS, *arrays, **options)

    def decode_attention(self, pages: PageView, *, window: int | None) -> Float[Array, "B K G D"]:
        if window is not None:
            raise NotImplementedError(
                f"a sliding window of {window}: its ring has no order, and kernels read a view's first entries"
            )
        _check_contiguous(pages)
        q = pages.q.reshape(pages.q.shape[0], -1, pages.q.shape[3])
        arrays = q, pages.k, pages.v, pages.entries
        inputs = _HEADS, _HEADS, _HEADS, _ALL
        return self._run(decode_attention, inputs, _HEADS, *arrays, scale=pages.scale).reshape(pages.q.shape)


def _check_contiguous(pages: PageView) -> None:
    if not pages.contiguous:
        raise NotImplementedError("views of unlike kv heads have gaps, and kernels read a view's first entries")
