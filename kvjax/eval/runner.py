"""Asks a target every sample of an evaluation, several at a time, and scores the answers.

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
from kvjax.eval.target import Form, Prompt, Target, TargetFailedError, TargetGoneError
from kvjax.eval.tasks import Task
from kvjax.eval.tasks_sample import Sample

SEEDS = 1_000_000  # samples of one seed; those of the next seed are all new
# A template writes something around each message, and a chat model its answer's end.
ANSWER_END = 2
# With so many samples in a row that nobody answered, the rest is not tried.
PATIENCE = 3


@dataclass(frozen=True)
class Case:
    """One sample to be asked: the `index`-th of a task at a length in tokens."""

    task: Task
    length: int
    index: int

    @property
    def key(self) -> Key:
        return self.task.name, self.length, self.index


@dataclass(frozen=True)
class Conduct:
    """How every sample is asked.

    Attributes:
        form: 'completion' ends in the beginning of the answer, 'chat' goes through the model's template.
        seed: samples of two seeds are all different.
        temperature: 0 is greedy.
        concurrency: samples asked at the same time.
        query_agnostic: a compressed cache chooses what to keep before it has seen the question.
        evict: what it has not kept in a sample's first turn is gone in the later ones. Otherwise each turn chooses
            anew among everything, as RocketKV-MT does.
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
    """Asks all cases and returns their records in the order they came to be, each told to `on_record` first.

    A failed request makes a record with an error. After `PATIENCE` samples in a row for which nobody answered, the
    cases left are not tried and have no record. Interrupting it (Ctrl-C) cancels what is in flight.
    """
    return asyncio.run(_Run(target, conduct, on_record).all(cases))


def template_tokens(target: Target) -> int:
    """Tokens that a target's chat template adds to one turn; 0 if it has none, which every request will say."""
    word = "word"
    try:
        return target.count([{"role": "user", "content": word}]) - target.count(word) + ANSWER_END
    except TargetFailedError:
        return 0


def draw(case: Case, conduct: Conduct, target: Target, template: int = 0) -> Sample:
    """The sample of a case, which leaves room in its length for `template` tokens around each turn.

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
        self._unanswered = 0
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
        """One worker: takes cases until none is left or nobody answers any more."""
        for case in left:
            if self._unanswered >= PATIENCE:
                return
            turns: list[Turn] = []
            try:
                await self._ask(case, turns)
                score, error = sum(turn.score for turn in turns) / len(turns), None
                self._unanswered = 0
            except TargetFailedError as failure:
                score, error = None, str(failure)
                self._unanswered = self._unanswered + 1 if isinstance(failure, TargetGoneError) else 0
            record = Record(*case.key, score, error, tuple(turns))
            self._records.append(record)
            self._on_record(record)

    async def _ask(self, case: Case, turns: list[Turn]) -> None:
        """Fills `turns` as they are answered. Raises TargetFailedError."""
        sample = await asyncio.to_thread(draw, case, self._conduct, self._target, self._template)
        dialogue, metric = Dialogue(sample, self._conduct.form), METRICS[case.task.metric]
        first: Prompt | None = None
        for question in sample.turns:
            prompt = dialogue.prompt(question)
            context_prefix = dialogue.history if self._conduct.query_agnostic else prompt
            first = first or context_prefix
            if self._conduct.evict:
                context_prefix = first
            answer = await self._target.complete(
                prompt,
                max_tokens=await asyncio.to_thread(self._room, prompt, sample.max_new_tokens),
                temperature=self._conduct.temperature,
                seed=self._conduct.seed * SEEDS + case.index,
                context_prefix=None if context_prefix is prompt else context_prefix,
                earlier=dialogue.history if turns else None,
            )
            dialogue.hear(question, answer.text)
            try:
                score = metric(answer.text, question.answers)
            except ValueError as error:
                raise TargetFailedError(f"{case.task.metric} cannot score it: {error}") from error
            turns.append(
                Turn(
                    question.question,
                    question.answers,
                    answer.text,
                    score,
                    answer.finish,
                    answer.prompt_tokens,
                    answer.tokens,
                    round(answer.first_token_seconds, 4),
                    round(answer.seconds, 4),
                )
            )

    def _room(self, prompt: Prompt, wanted: int) -> int:
        """Tokens the answer may take: those wanted, or those that the model's context has left."""
        context = self._target.max_model_len
        if context is None:
            return wanted
        size = self._target.count(prompt)
        if size >= context:
            raise TargetFailedError(f"the prompt has {size} tokens, and the model's context is {context}")
        return min(wanted, context - size)
