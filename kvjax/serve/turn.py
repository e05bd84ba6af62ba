"""Newest turn: the tokens of a prompt that follow the last answer. Multi-turn methods select for them alone."""

import dataclasses

from kvjax.serve.chat_template import ChatPrompt
from kvjax.serve.errors import ApiError
from kvjax.serve.protocol import TokenizerProtocol


def newest_turn(tokenizer: TokenizerProtocol, chat: ChatPrompt, prompt: list[int]) -> int | None:
    """Tokens of `prompt` that are new since the assistant's last answer; None if there was none. Slow.

    They begin where the prompt departs from what the template makes of the messages before: from the last user's
    message on, with any beside it. A message of the assistant at the end, to be continued, belongs to the turn.
    """
    roles = [message.role for message in chat.messages]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=0)
    answered = max((index for index, role in enumerate(roles[:last_user]) if role == "assistant"), default=-1)
    if answered < 0:
        return None
    try:
        before = dataclasses.replace(
            chat, messages=chat.messages[: answered + 1], generation_prompt=False, continued=False
        )
        earlier = before.tokens(tokenizer)
    except ApiError:  # some templates want a question at the end
        return None
    same = next((i for i, (a, b) in enumerate(zip(earlier, prompt, strict=False)) if a != b), len(earlier))
    return max(len(prompt) - same, 1)
