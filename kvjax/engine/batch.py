"""Batch generation: many prompts submitted at once, joined into completions in their order."""

import queue
import time
from collections.abc import Callable, Sequence

from kvjax.engine.active_request import ActiveRequest, DeltaCallback
from kvjax.engine.request import Completion, Delta, EngineDeadError, Finish, RequestFailedError, SamplingParams

Submit = Callable[[Sequence[int], SamplingParams, DeltaCallback, str], ActiveRequest]


def generate_batch(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    submit: Submit,
    cancel: Callable[[ActiveRequest], None],
    is_dead: Callable[[], bool],
    progress: bool,
) -> list[Completion]:
    """Completions of all prompts, by an engine's `submit` and `cancel`; `is_dead` says whether it has failed.

    Raises:
        EngineDeadError: the engine fails on the way.
        RequestFailedError: one of the requests failed; the others are cancelled.
    """
    from tqdm.auto import tqdm

    results: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()
    requests: list[ActiveRequest] = []
    received: list[list[Delta]] = [[] for _ in prompts]
    bar = tqdm(total=len(prompts), unit="req", disable=not progress)
    began, generated, unfinished = time.monotonic(), 0, len(prompts)
    try:
        for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            on_delta = lambda delta, index=index: results.put((index, delta))  # noqa: E731
            requests.append(submit(prompt, each, on_delta, f"batch-{index}"))
        while unfinished:
            index, delta = results.get()
            received[index].append(delta)
            generated += len(delta.tokens)
            if delta.finish is Finish.ERROR:
                raise (EngineDeadError if is_dead() else RequestFailedError)(delta.error)
            if delta.finish:
                unfinished -= 1
                bar.set_postfix_str(f"{generated / (time.monotonic() - began):,.0f} tok/s", refresh=False)
                bar.update()
    finally:
        bar.close()
        for request in requests:
            cancel(request)
    return [Completion.join(prompt, deltas) for prompt, deltas in zip(prompts, received, strict=True)]
