"""Limits of one request: choices, prompts, bytes, and the silence of a stream."""

import dataclasses

MAX_CHOICES = 8
MAX_PROMPTS = 2048
MAX_GRAMMAR = 262_144  # characters of a grammar or schema
MAX_TOOLS = 128
MAX_RETAINED_BINS = 256  # parts of a prompt, each with the share of it that is retained


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that are constants everywhere but in tests.

    Attributes:
        body_bytes: the largest body read.
        keep_alive_seconds: a stream that is silent for so long sends a comment, so that no proxy closes it.
        waiting_texts: texts, short ones and long ones apart, that may wait for a thread that tokenises.
        unknown_names: how many unknown field names are warned about before the server stops.
    """

    body_bytes: int = 16 * 2**20
    keep_alive_seconds: int | float = 10.0
    waiting_texts: int = 512
    unknown_names: int = 100
