"""The engine's thread: when it is idle, and what it leaves behind."""

from kvjax.engine import Finish, SamplingParams
from tests.engine import tiny
from tests.engine.client import settle


def test_idle_means_that_nothing_is_left(engine, client):
    """Right after the last delta the thread may still hold a dispatch that nobody reads."""
    for length in range(1, 40):
        client.submit(engine, tiny.prompt(length), SamplingParams(max_tokens=3, ignore_eos=True)).result()
        settle(engine)


def test_a_slot_that_was_left_is_not_taken_for_one_that_decodes(engine, client):
    """A cancelled request stays active on the device until the next dispatch; prompts may pass before that."""
    for _ in range(3):
        leaving = client.submit(engine, tiny.prompt(5), SamplingParams(max_tokens=500, ignore_eos=True), leave_after=2)
        leaving.wait()
        [scored] = engine.generate([tiny.prompt(300)], SamplingParams(max_tokens=0), progress=False)
        assert scored.finish is Finish.LENGTH
        settle(engine)
