"""A target whose replies a test writes: words are its tokens, and it records its requests."""

import asyncio
from collections.abc import Callable

from kvjax.eval.targets import Prompt, Target, TargetReply, TargetRequest

TEMPLATE = 3  # tokens that it writes around each message


class FakeTarget(Target):
    """Answers with `say(prompt)`, which may raise instead.

    Attributes:
        requests: (prompt, max_tokens, seed) in their order.
        context_prefix, history: those of each request, in the same order.
        most: requests in flight at the same time, at most.
    """

    def __init__(self, say: Callable[[Prompt], str] = lambda prompt: "", max_model_len: int | None = 4096) -> None:
        self.name, self.identity, self.max_model_len = "fake", {"model": "fake"}, max_model_len
        self.say = say
        self.requests: list[tuple[Prompt, int, int]] = []
        self.context_prefix: list[Prompt | None] = []
        self.history: list[Prompt | None] = []
        self.most = self._flying = 0

    def count(self, prompt: Prompt) -> int:
        if isinstance(prompt, str):
            return len(prompt.split())
        return sum(len(message["content"].split()) + TEMPLATE for message in prompt)

    async def complete(self, request: TargetRequest) -> TargetReply:
        prompt = request.prompt
        self.requests.append((prompt, request.max_tokens, request.seed))
        self.context_prefix.append(request.context_prefix)
        self.history.append(request.history)
        self._flying += 1
        self.most = max(self.most, self._flying)
        try:
            await asyncio.sleep(0.001)
            text = self.say(prompt)
        finally:
            self._flying -= 1
        return TargetReply(text, "stop", self.count(prompt), len(text.split()), 0.5, 1.0)


def reads(prompt: Prompt) -> str:
    """What a perfect reader of mini/niah_single tasks says."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    key = text.rsplit("for ", 1)[1].split(" ")[0].split("?")[0]
    return text.split(f"The code for {key} is ")[1].split(".")[0]
