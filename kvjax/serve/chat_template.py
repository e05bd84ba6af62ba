"""Chat template: messages to token ids, and an error of the request where the template refuses them."""

from kvjax.serve.errors import ApiError
from kvjax.serve.protocol import TokenizerProtocol
from kvjax.serve.schema import Message


def require_template(tokenizer: TokenizerProtocol) -> None:
    """Raises ApiError (400) for a model that has no chat template."""
    if not tokenizer.has_chat_template:
        raise ApiError(
            400,
            "this model has no chat template: use /v1/completions, or start the server with --chat-template",
            param="messages",
            code="no_chat_template",
        )


def apply_template(tokenizer: TokenizerProtocol, messages: list[Message], generation_prompt: bool) -> list[int]:
    """Token ids of the conversation. Slow. Raises ApiError (400) in the template's words if it refuses."""
    rendered = [message.for_template() for message in messages]
    if "developer" not in (tokenizer.chat_template or ""):
        # the newer name of the system role: a template that does not know it would write it as it stands
        roles = {"developer": "system"}
        rendered = [message | {"role": roles.get(message["role"], message["role"])} for message in rendered]
    try:
        return tokenizer.apply_chat_template(rendered, add_generation_prompt=generation_prompt)
    except (ValueError, TypeError) as error:
        raise ApiError(400, f"messages: {error}"[:500], param="messages") from error
