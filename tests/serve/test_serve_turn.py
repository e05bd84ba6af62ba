"""How long the newest turn of a conversation is, and which engines are told."""

import pytest
from fake_engine import FakeEngine, FakeTokenizer

from kvjax.engine.text.tokenizer import Tokenizer
from kvjax.serve.chat_template import ChatPrompt
from kvjax.serve.checkpoint import find_model
from kvjax.serve.messages import Message
from kvjax.serve.turn import newest_turn

ROLES = {"s": "system", "u": "user", "a": "assistant", "d": "developer"}


def conversation(roles: str) -> list[Message]:
    return [Message(role=ROLES[role], content=f"{index} says {role}") for index, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("roles", "first"),
    [
        ("u", None),
        ("su", None),
        ("uu", None),
        ("a", None),
        ("au", 1),
        ("uau", 2),
        ("suau", 3),
        ("duau", 3),
        ("uauau", 4),
        ("uauu", 2),
        ("uasu", 2),
        ("uaua", 2),
        ("ua", None),
        ("uaa", None),
    ],
)
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize(
    "tokenizer", [FakeTokenizer(), Tokenizer.from_pretrained(find_model("kvjax-small"))], ids=["fake", "small"]
)
def test_a_turn_is_what_came_after_the_last_answer(tokenizer, roles, first, generation_prompt):
    messages = conversation(roles)
    chat = ChatPrompt(messages, generation_prompt)
    prompt = chat.tokens(tokenizer)
    turn = newest_turn(tokenizer, chat, prompt)
    if first is None:
        assert turn is None
        return
    earlier = tokenizer.decode(ChatPrompt(messages[:first], False).tokens(tokenizer), skip_special_tokens=False)
    whole = tokenizer.decode(prompt, skip_special_tokens=False)
    new = tokenizer.decode(prompt[-turn:], skip_special_tokens=False)
    assert earlier + new == whole


def test_a_template_that_writes_earlier_messages_another_way():
    """As those do that leave out what an assistant has thought: the turn begins where the prompt departs."""
    tokenizer = FakeTokenizer()
    messages = conversation("uauau")
    text = "<user>0 says u\n<assistant>...\n<user>2 says u\n<assistant>"
    prompt = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(prompt[-newest_turn(tokenizer, ChatPrompt(messages), prompt) :]).startswith("...\n<user>2")


def test_a_template_that_wants_a_question_at_the_end():
    class Wanting(FakeTokenizer):
        def render(self, messages, **options):
            if messages[-1]["role"] != "user":
                raise ValueError("ask something")
            return super().render(messages, **options)

    messages = conversation("uau")
    chat = ChatPrompt(messages)
    assert newest_turn(Wanting(), chat, chat.tokens(Wanting())) is None


@pytest.mark.parametrize(("multi_turn", "turn"), [(True, len("<user>now\n<assistant>")), (False, None)])
def test_only_methods_of_several_turns_are_told(serve, multi_turn, turn):
    engine = FakeEngine()
    engine.caches.multi_turn = multi_turn
    roles = [("user", "hi"), ("assistant", "hello"), ("user", "now")]
    body = {"messages": [{"role": role, "content": content} for role, content in roles], "n": 2}
    assert serve(engine).post("/v1/chat/completions", body).status_code == 200
    assert [params.turn for _, params, *_ in engine.asked] == [turn, turn]
