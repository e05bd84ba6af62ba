"""Dialogues: the prompts of a sample, one for each of its questions, with the replies before it."""

from kvjax.eval.targets import Form, Prompt
from kvjax.eval.tasks import Question, Sample


class Dialogue:
    """The turns of one sample in one form: send the `prompt` of each of `sample.turns`, then `add_reply`.

    A completing model goes on from one growing text, in which each of its replies is closed with a line end. A chat
    model gets messages, its own among them. Either way it reads its replies, right or wrong.
    """

    def __init__(self, sample: Sample, form: Form) -> None:
        self._form: Form = form
        self._context = self._text = sample.context
        self._opening = sample.messages
        self._messages: list[dict[str, str]] = []

    def prompt(self, question: Question) -> Prompt:
        """The prompt of `question`, the next one."""
        if self._form == "completion":
            return self._text + question.question + question.answer_prefix
        return self._messages_up_to(question)

    @property
    def history(self) -> Prompt:
        """The conversation before the next question: in the first turn the context alone."""
        if self._form == "completion":
            return self._text
        return self._messages or [{"role": "user", "content": self._context.rstrip("\n")}]

    def add_reply(self, question: Question, reply: str) -> None:
        """Appends `question` and the model's reply to the history."""
        if self._form == "completion":
            self._text += question.question + question.answer_prefix + reply
            self._text += "" if self._text.endswith("\n") else "\n"
        else:
            self._messages = [*self._messages_up_to(question), {"role": "assistant", "content": reply}]

    def _messages_up_to(self, question: Question) -> list[dict[str, str]]:
        if not self._messages:
            return self._opening  # the context and the first question are one message
        return [*self._messages, {"role": "user", "content": question.question.rstrip("\n")}]
