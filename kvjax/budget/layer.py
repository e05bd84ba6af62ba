"""One layer's budget: what its view keeps of a sequence, and what a decode step reads of the view."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """What one layer keeps (stage 1), and what a decode step reads of that (stage 2).

    A budget of nothing but a capacity chooses nothing: the view holds the last `capacity` entries, which are all of
    them in a full layer and the window in a sliding one. One behaviour has one spelling: a field that would have no
    effect must have its default, so that budgets that act alike are equal keys of the compilation cache.

    Attributes:
        capacity: KV entries that a view holds for each kv head of a slot.
        stage2_tokens: tokens of the view that a decode step attends to exactly; None reads the whole view.
        page_size: consecutive entries of the view that share one summary, by which stage 2 chooses.
        head_dims: how many dimensions of a head stage 2 estimates with; None for all.
        observation_window: prompt positions at the end, whose queries choose what stays and which stay themselves (W);
            None where nothing is chosen.
        pooling_kernel: width in tokens of the max-pooling of stage 1's scores, odd; 1 for none.
        sinks: prompt positions at the beginning that always stay.
        head_tokens: tokens of a prompt that each kv head keeps, where they are not the same; the capacity is room for
            the most, and generated tokens.

    Raises:
        TypeError: a value that is not a whole number.
        ValueError: a value out of bounds, or one that would have no effect; the message says what to change.
    """

    capacity: int
    _: dataclasses.KW_ONLY
    stage2_tokens: int | None = None
    page_size: int = 1
    head_dims: int | None = None
    observation_window: int | None = None
    pooling_kernel: int = 1
    sinks: int = 0
    head_tokens: tuple[int, ...] | None = None

    @classmethod
    def selecting(
        cls,
        capacity: int,
        *,
        observation_window: int = 32,
        pooling_kernel: int = 63,
        stage2_tokens: int | None = None,
        page_size: int = 1,
        head_dims: int | None = None,
        sinks: int = 0,
        head_tokens: tuple[int, ...] | None = None,
    ) -> "LayerBudget":
        """A layer whose stage 1 chooses what stays; the defaults are RocketKV's (its multi-turn runs use W = 128)."""
        return cls(
            capacity,
            stage2_tokens=stage2_tokens,
            page_size=page_size,
            head_dims=head_dims,
            observation_window=observation_window,
            pooling_kernel=pooling_kernel,
            sinks=sinks,
            head_tokens=head_tokens,
        )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "head_tokens" and type(value) is tuple:
                continue
            if type(value) is not int and not (value is None and field.default is None):  # True is no number here
                raise TypeError(f"{field.name}={value!r} is a {type(value).__name__}: give an int")
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}: a view holds at least one entry")
        self._check_stage1()
        self._check_stage2()

    def _check_stage1(self) -> None:
        window, kernel = self.observation_window, self.pooling_kernel
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(
                f"pooling_kernel={kernel} must be odd and at least 1, or a pooled score lies beside its token: "
                f"use {max(kernel, 0) + 1}"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0")
        if window is None:
            for name, default in (("sinks", 0), ("head_tokens", None)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect while observation_window is None: give a window, "
                        f"or leave {name} at {default}"
                    )
            if kernel != 1:
                raise ValueError(
                    f"pooling_kernel={kernel} has no effect while observation_window is None: give a window (RocketKV "
                    "has 32), or leave the kernel at 1"
                )
        elif window < 1:
            raise ValueError(f"observation_window={window} must be at least 1, or None where nothing is chosen")
        elif window + self.sinks > self.capacity:
            also = f" and sinks={self.sinks} together" if self.sinks else ""
            raise ValueError(
                f"observation_window={window}{also} must be at most capacity={self.capacity}, for the window always "
                f"stays: shorten the window, or raise the capacity to {window + self.sinks}"
            )

        if self.head_tokens is not None:
            least = (window or 0) + self.sinks
            for kept in self.head_tokens or (0,):
                if type(kept) is not int or not least <= kept <= self.capacity:
                    raise ValueError(
                        f"head_tokens={self.head_tokens}: a kv head keeps from {least}, the window and the sinks, to "
                        f"capacity={self.capacity} tokens"
                    )

    def _check_stage2(self) -> None:
        if self.stage2_tokens is None:
            for name, value, default in (("page_size", self.page_size, 1), ("head_dims", self.head_dims, None)):
                if value != default:
                    raise ValueError(
                        f"{name}={value} has no effect while stage2_tokens is None: say how many tokens a step reads, "
                        f"or leave {name} at {default}"
                    )
            return
        if not 1 <= self.stage2_tokens < self.capacity:
            raise ValueError(
                f"stage2_tokens={self.stage2_tokens} must be at least 1 and below capacity={self.capacity}: "
                "None reads the whole view"
            )
        if not 1 <= self.page_size <= self.capacity:
            raise ValueError(f"page_size={self.page_size} must be 1 to capacity={self.capacity}: 4, 8 and 16 are usual")
        if self.head_dims is not None and self.head_dims < 1:
            raise ValueError(f"head_dims={self.head_dims} must be at least 1: None estimates with all dimensions")

    def within(self, context: int, capacity: int | None = None) -> "LayerBudget":
        """The same budget cut to a context, if wanted at another capacity; what then has no effect is dropped.

        Nothing is chosen where everything fits, and a view no larger than what stage 2 reads is read as a whole.

        Args:
            context: most tokens a sequence may have.
            capacity: entries of the view, before it is cut; None for those it has.
        """
        capacity = min(self.capacity if capacity is None else capacity, context)
        stage1: dict[str, Any] = {}
        stage2: dict[str, Any] = {"page_size": min(self.page_size, capacity)}
        if capacity == context:
            stage1 = {"observation_window": None, "pooling_kernel": 1, "sinks": 0, "head_tokens": None}
        elif self.head_tokens is not None:
            stage1 = {"head_tokens": tuple(min(kept, capacity) for kept in self.head_tokens)}
        if self.stage2_tokens is None or self.stage2_tokens >= capacity:
            stage2 = {"stage2_tokens": None, "page_size": 1, "head_dims": None}
        return dataclasses.replace(self, capacity=capacity, **stage1, **stage2)

    def nbytes(self, kv_heads: int, head_dim: int, dtype: Any) -> int:
        """Bytes that one sequence takes in this layer: K, V, and the two summaries of each page.

        Pages of one entry have no summaries, for the key is its own. Where each entry came from (4 bytes for each
        entry and kv head) is not counted.

        Args:
            kv_heads, head_dim: of the model.
            dtype: of the cache; anything that names one.
        """
        pages = -(-self.capacity // self.page_size) if self.page_size > 1 else 0
        return 2 * (self.capacity + pages) * kv_heads * head_dim * jnp.dtype(dtype).itemsize
