"""How a sample becomes prompts: one for each of its questions, with what the model has said before."""

from kvjax.eval.target import Form, Prompt
from kvjax.eval.tasks_sample import Question, Sample


class Dialogue:
    """The turns of one sample in one form: ask `prompt` of each of `sample.turns`, then `hear` what the model said.

    A completing model goes on from one growing text, in which each of its answers is closed with a line end. A chat
    model gets messages, its own among them. Either way it reads what it said, right or wrong.
    """

    def __init__(self, sample: Sample, form: Form) -> None:
        self._form: Form = form
        self._context = self._text = sample.context
        self._opening = sample.messages
        self._messages: list[dict[str, str]] = []

    def prompt(self, question: Question) -> Prompt:
        """What to send for `question`, the next one."""
        if self._form == "completion":
            return self._text + question.question + question.answer_prefix
        return self._asked(question)

    @property
    def history(self) -> Prompt:
        """What comes before the next question: in the first turn the context alone."""
        if self._form == "completion":
            return self._text
        return self._messages or [{"role": "user", "content": self._context.rstrip("\n")}]

    def hear(self, question: Question, said: str) -> None:
        """Takes the model's answer to `question` into what comes before the next one."""
        if self._form == "completion":
            self._text += question.question + question.answer_prefix + said
            self._text += "" if self._text.endswith("\n") else "\n"
        else:
            self._messages = [*self._asked(question), {"role": "assistant", "content": said}]

    def _asked(self, question: Question) -> list[dict[str, str]]:
        if not self._messages:
            return self._opening  # the context and the first question are one message
        return [*self._messages, {"role": "user", "content": question.question.rstrip("\n")}]
