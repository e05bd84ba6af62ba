"""Token counts of one HTTP request's streams: its `usage` object, and the summary in its log line."""

import dataclasses
from collections import Counter
from typing import Any

from kvjax.engine.request import Delta, Finish, Timing


@dataclasses.dataclass
class StreamTally:
    """One choice so far. `counts_prompt` marks the first choice of a prompt: usage counts a prompt once.

    `retained` is the summary of what the views keep of the prompt, where the request has `return_retained`.
    """

    prompt_tokens: int
    counts_prompt: bool
    generated: int = 0
    cached: int = 0
    finish: Finish | None = None
    timing: Timing | None = None
    retained: dict[str, Any] | None = None

    def add(self, delta: Delta) -> None:
        self.generated += len(delta.tokens)
        self.cached = max(self.cached, delta.cached_tokens)
        self.finish, self.timing = delta.finish, delta.timing

    def usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, self.generated, self.cached)


def usage(prompt: int, generated: int, cached: int) -> dict[str, Any]:
    """OpenAI's `usage` object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def total_usage(streams: list[StreamTally]) -> dict[str, Any]:
    prompts = [stream for stream in streams if stream.counts_prompt]
    return usage(
        sum(stream.prompt_tokens for stream in prompts),
        sum(stream.generated for stream in streams),
        sum(stream.cached for stream in prompts),
    )


def summary(streams: list[StreamTally]) -> str:
    """`prompt 12,800 tok: computed 12,800 | generated 64 tok, stop | TTFT 0.21 s | 48.2 tok/s | ...`.

    The figures of several choices are joined: sums of tokens, the first token of any, tokens a second of all.
    """
    prompts = [stream for stream in streams if stream.counts_prompt]
    generated = sum(stream.generated for stream in streams)
    finishes = Counter(str(stream.finish) for stream in streams if stream.finish)
    reasons = ", ".join(f"{count} {name}" if len(streams) > 1 else name for name, count in finishes.items())
    parts = [
        f"prompt {sum(stream.prompt_tokens for stream in prompts):,} tok{_sources(prompts)}",
        f"generated {generated:,} tok" + (f", {reasons}" if reasons else ""),
    ]
    timings = [stream.timing for stream in streams if stream.timing]
    resumed = sum(timing.resumed for timing in timings)
    if resumed:
        parts.append(f"resumed after {resumed:,} tokens")
    if timings and generated:
        first = min(timing.first_token for timing in timings)
        parts.append(f"TTFT {first - min(timing.arrived for timing in timings):.2f} s")
        seconds = max(timing.finished for timing in timings) - first
        first_ones = sum(max(timing.resumed, 1) for timing in timings)  # those that came all at once
        if generated > first_ones and seconds > 0:
            parts.append(f"{(generated - first_ones) / seconds:.1f} tok/s")
    if timings:
        parts.append(f"view {100 * max(timing.view_fraction for timing in timings):.3g}% of full KV")
    return " | ".join(parts)


def _sources(prompts: list[StreamTally]) -> str:
    tokens: Counter[str] = Counter()
    for stream in prompts:
        if stream.timing:
            tokens.update(stream.timing.prefix)
    # what was computed comes last: the tiers before it are what saved it
    order = sorted(tokens, key=lambda source: source == "computed")
    shown = [f"{source} {tokens[source]:,}" for source in order if tokens[source]]
    return ": " + " + ".join(shown) if shown else ""
