"""Splits of a token budget between the two stages of a layer and among layers. Numbers, no profiles."""

import math
from collections.abc import Sequence
from fractions import Fraction

from kvjax.budget.layer import LayerBudget

LEAST_TOKEN_BUDGET = 16  # below it too little is left for either stage


def adaptive_split(
    context: int,
    max_new_tokens: int,
    token_budget: int,
    head_dim: int,
    *,
    observation_window: int = 32,
    pooling_kernel: int = 63,
) -> LayerBudget:
    """RocketKV's split of one token budget between its stages (arXiv 2502.14051, adaptive compression decomposition).

    Of the compression c = S/t stage 1 takes c**r, the more the longer the context: r = 0.2 + 0.06 log2(c), at most
    0.8. Stage 2 takes the rest, and spends half of its traffic on estimates and half on exact attention.

    Args:
        context: most tokens of a sequence, prompt and generated (S).
        max_new_tokens: how many of them are generated (N); the view keeps room for them.
        token_budget: KV pairs' worth of traffic for each kv head and step (t). A context within it is kept and read
            as a whole.
        head_dim: D.
        observation_window, pooling_kernel: of stage 1.

    Raises:
        ValueError: a budget below 16, no room for a prompt beside the new tokens, or none for its window.
    """
    if token_budget < LEAST_TOKEN_BUDGET:
        raise ValueError(f"token_budget={token_budget} must be at least {LEAST_TOKEN_BUDGET}: raise it")
    if head_dim < 1:
        raise ValueError(f"head_dim={head_dim} must be at least 1: give that of the model")
    if not 1 <= max_new_tokens < context:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at least 1 and below context={context}, which counts the prompt "
            "too: generate fewer, or make the context longer"
        )
    if context <= token_budget:
        return LayerBudget(context)
    compression = context / token_budget
    exponent = min(0.2 + 0.06 * math.log2(compression), 0.8)
    # the factor: 262,144 / 1,024**0.8 is 1,024, and no rounding of a logarithm may make it 1,023
    kept = math.floor(context / compression**exponent * (1 + 1e-12))
    capacity = min(max(kept, 2 * max_new_tokens), context)
    if capacity - max_new_tokens < observation_window:
        raise ValueError(
            f"of capacity={capacity} entries {capacity - max_new_tokens} are left for the prompt beside max_new_tokens="
            f"{max_new_tokens}, but observation_window={observation_window} of them always stay: shorten the window, "
            f"or raise token_budget from {token_budget}"
        )
    page, dims = stage2_split(capacity, token_budget, head_dim)
    return LayerBudget.selecting(
        capacity,
        observation_window=observation_window,
        pooling_kernel=pooling_kernel,
        selected_tokens=token_budget // 2,
        page_size=page,
        selection_options={"head_dims": dims},
    ).within(context)


def stage2_split(capacity: int, token_budget: int, head_dim: int) -> tuple[int, int]:
    """Entries of a page and head dims with which stage 2 estimates a view, for half of a token budget's traffic.

    With c2 = capacity / t: pages of ceil(sqrt(c2)) entries, but of 1 above c2, and floor(D p / c2) dims, at least 1.
    In whole numbers, so exact.
    """
    page = math.isqrt(max(-(-capacity // token_budget) - 1, 0)) + 1
    if page * token_budget > capacity:
        page = 1
    return page, min(max(head_dim * page * token_budget // capacity, 1), head_dim)


def pyramid_capacities(layers: int, mean: int, least: int, most: int, beta: int | float = 20) -> list[int]:
    """PyramidKV's capacities: an arithmetic series that falls from the first layer to the last (arXiv 2406.02069).

    Beyond `least` the last layer gets the beta-th part of the mean and the first one twice the mean less that; where
    that is more than `most`, the series is flattened until it fits. Rounded by largest remainder, so the sum is exactly
    `layers * mean`, where the paper's code rounds every step down and loses some.

    Args:
        layers: how many.
        mean: entries a layer on average, between `least` and `most`.
        least: entries that every layer has: the observation window.
        most: entries that no layer may exceed: the context.
        beta: how steep, at least 1, which is flat; 20 in the paper.

    Raises:
        ValueError: a mean or a beta out of bounds.
    """
    if not least <= mean <= most:
        raise ValueError(f"the mean capacity {mean} must be from {least}, the window, to {most}, the context")
    if not 1 <= beta < math.inf:
        raise ValueError(f"beta={beta} must be at least 1, which is flat, and finite: PyramidKV has 20")
    if layers == 1:
        return [mean]
    share = Fraction(mean - least)
    first = min(2 * share - share / Fraction(beta), Fraction(most - least))
    step = 2 * (first - share) / (layers - 1)
    return [least + extra for extra in largest_remainder([first - layer * step for layer in range(layers)])]


def largest_remainder(shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers next to the shares with the same sum: rounded down, and what is missing to the largest remainders.

    Ties go to the lower index, so shares that fall stay falling.

    Args:
        shares: exact numbers, whose sum is whole.
    """
    floors = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: floors[index] - shares[index])
    for index in order[: int(sum(shares)) - sum(floors)]:
        floors[index] += 1
    return floors
