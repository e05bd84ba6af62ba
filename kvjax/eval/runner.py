"""The runner: sends every sample of an evaluation to a target, several at a time, and scores the replies.

cases ──► workers (one a request in flight) ──► Target
             │ sample: made in a thread, because counting tokens takes a while
             └──► record ──► on_record       called on the event loop, one after the other
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvjax.eval.dialogue import Dialogue
from kvjax.eval.metrics import METRICS
from kvjax.eval.record import Key, Record, Turn
from kvjax.eval.targets import Form, Prompt, Target, TargetFailedError, TargetGoneError, TargetRequest
from kvjax.eval.tasks import Sample, Task

SEEDS = 1_000_000  # samples of one seed; those of the next seed are all new
# A template writes something around each message, and a chat model its answer's end.
ANSWER_END = 2
# After so many samples in a row without any reply the rest is not tried.
PATIENCE = 3


@dataclass(frozen=True)
class Case:
    """One sample of an evaluation: the `index`-th of a task at a length in tokens."""

    task: Task
    length: int
    index: int

    @property
    def key(self) -> Key:
        return self.task.name, self.length, self.index


@dataclass(frozen=True)
class Conduct:
    """The settings that all samples of an evaluation share.

    Attributes:
        form: 'completion' ends in the beginning of the answer, 'chat' goes through the model's template.
        seed: samples of two seeds are all different.
        temperature: 0 is greedy.
        concurrency: samples in flight at the same time.
        query_agnostic: a compressed cache chooses the tokens to retain before it has seen the question.
        evict: tokens not retained in a sample's first turn are gone in the later ones. Otherwise each turn chooses
            anew among all tokens, as RocketKV-MT does.
    """

    form: Form = "completion"
    seed: int = 0
    temperature: float = 0.0
    concurrency: int = 4
    query_agnostic: bool = False
    evict: bool = False

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency={self.concurrency} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature={self.temperature} is outside [0, 100]")


def evaluate(
    target: Target,
    cases: Sequence[Case],
    conduct: Conduct,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Evaluates all cases and returns their records in the order of completion, after `on_record` of each.

    A failed request makes a record with an error. After `PATIENCE` samples in a row for which the target was gone,
    the remaining cases are not tried and have no record. An interrupt (Ctrl-C) cancels the requests in flight.
    """
    return asyncio.run(_Run(target, conduct, on_record).all(cases))


def template_tokens(target: Target) -> int:
    """Tokens that a target's chat template adds to one turn; 0 if it has none, which fails every request."""
    word = "word"
    try:
        return target.count([{"role": "user", "content": word}]) - target.count(word) + ANSWER_END
    except TargetFailedError:
        return 0


def draw_sample(case: Case, conduct: Conduct, target: Target, template: int = 0) -> Sample:
    """The sample of a case; `template` tokens around each turn count in its length.

    Raises:
        TargetFailedError: the task cannot be made as short as that.
    """
    seed = conduct.seed * SEEDS + case.index

    def drawn(turns: int) -> Sample:
        return case.task.sample(length=max(case.length - turns * template, 0), seed=seed, count=target.count)

    try:
        sample = drawn(1)
        return drawn(1 + len(sample.later)) if sample.later and template else sample
    except ValueError as error:
        raise TargetFailedError(f"{case.task.name} at {case.length} tokens: {error}") from error


class _Run:
    """One evaluation on one event loop."""

    def __init__(self, target: Target, conduct: Conduct, on_record: Callable[[Record], None]) -> None:
        self._target, self._conduct, self._on_record = target, conduct, on_record
        self._records: list[Record] = []
        self._gone_in_a_row = 0
        self._template = 0

    async def all(self, cases: Sequence[Case]) -> list[Record]:
        if not cases:
            return []
        if self._conduct.form == "chat":
            self._template = await asyncio.to_thread(template_tokens, self._target)
        left = iter(cases)
        try:
            async with self._target.session(), asyncio.TaskGroup() as group:
                for _ in range(min(self._conduct.concurrency, len(cases))):
                    group.create_task(self._work(left))
        except ExceptionGroup as group:  # the first is the cause, the others were cancelled or failed likewise
            raise group.exceptions[0] from group
        return self._records

    async def _work(self, left: Iterator[Case]) -> None:
        """One worker: takes cases until none is left or the target is gone for good."""
        for case in left:
            if self._gone_in_a_row >= PATIENCE:
                return
            turns: list[Turn] = []
            try:
                await self._evaluate(case, turns)
                score, error = sum(turn.score for turn in turns) / len(turns), None
                self._gone_in_a_row = 0
            except TargetFailedError as failure:
                score, error = None, str(failure)
                self._gone_in_a_row = self._gone_in_a_row + 1 if isinstance(failure, TargetGoneError) else 0
            record = Record(*case.key, score, error, tuple(turns))
            self._records.append(record)
            self._on_record(record)

    async def _evaluate(self, case: Case, turns: list[Turn]) -> None:
        """Appends to `turns` as replies arrive. Raises TargetFailedError."""
        sample = await asyncio.to_thread(draw_sample, case, self._conduct, self._target, self._template)
        dialogue, metric = Dialogue(sample, self._conduct.form), METRICS[case.task.metric]
        first: Prompt | None = None
        for question in sample.turns:
            prompt = dialogue.prompt(question)
            context_prefix = dialogue.history if self._conduct.query_agnostic else prompt
            first = first or context_prefix
            if self._conduct.evict:
                context_prefix = first
            request = TargetRequest(
                prompt,
                max_tokens=await asyncio.to_thread(self._max_tokens, prompt, sample.max_new_tokens),
                temperature=self._conduct.temperature,
                seed=self._conduct.seed * SEEDS + case.index,
                context_prefix=None if context_prefix is prompt else context_prefix,
                history=dialogue.history if turns else None,
            )
            reply = await self._target.complete(request)
            dialogue.add_reply(question, reply.text)
            try:
                score = metric(reply.text, question.answers)
            except ValueError as error:
                raise TargetFailedError(f"{case.task.metric} cannot score it: {error}") from error
            turns.append(Turn.of(question, reply, score))

    def _max_tokens(self, prompt: Prompt, requested: int) -> int:
        """Tokens that the reply may take: those requested, or those that the model's context has left."""
        context = self._target.max_model_len
        if context is None:
            return requested
        size = self._target.count(prompt)
        if size >= context:
            raise TargetFailedError(f"the prompt has {size} tokens, and the model's context is {context}")
        return min(requested, context - size)
