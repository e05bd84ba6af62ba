"""Suspended slots: they hold conversations without a caller, which go on when an equal request comes, or make way.

SIGTERM    decoding requests are cut off: their slots are suspended, taken and saved
a start    what was saved is put into slots
a request  an equal one gets what there is, and its slot is woken
another    that finds no free slot takes the one suspended first
"""

import logging
from collections.abc import Mapping

import jax
import numpy as np

from kvjax.engine.active_request import ActiveRequest
from kvjax.engine.device.runner import Runner
from kvjax.engine.device.steps import DecodeState
from kvjax.engine.sessions import slot_arrays
from kvjax.engine.sessions.conversation import Conversation
from kvjax.engine.sessions.slot_arrays import SlotArrays
from kvjax.engine.sessions.snapshot import SessionSnapshot, SessionStore

logger = logging.getLogger(__name__)


class SuspendedSlots:
    """Those of one runner. The engine's lock guards it, and its thread alone calls what touches arrays."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._specs = SlotArrays(
            runner.caches.views, DecodeState.declare(runner.layout.max_num_seqs, runner.vocab_size)
        )
        self._conversations: dict[int, Conversation] = {}

    def __len__(self) -> int:
        return len(self._conversations)

    @property
    def slots(self) -> list[int]:
        """The oldest first."""
        return list(self._conversations)

    def tokens(self, slot: int) -> int | None:
        """Tokens of a slot's conversation; None if the slot is not suspended."""
        conversation = self._conversations.get(slot)
        return None if conversation is None else conversation.position + 1

    def find(self, request: ActiveRequest) -> int | None:
        """The slot whose conversation a request goes on with; None if there is none."""
        return next((slot for slot, each in self._conversations.items() if each.answers(request)), None)

    def cut_off(self, decoding: Mapping[int, ActiveRequest]) -> None:
        """Suspends requests where they stand, by their slots: the youngest of all."""
        for slot, request in sorted(decoding.items(), key=lambda item: item[1].arrived):
            if not request.cancelled:
                self._conversations[slot] = Conversation.of(request)

    def drop(self, slot: int) -> Conversation | None:
        """The slot is not suspended any more; returns its conversation, None if it was not."""
        return self._conversations.pop(slot, None)

    def take(self) -> list[SessionSnapshot]:
        """Copies of all that is suspended, on the host; a failure is logged. The device copies one slot at a time."""
        snapshots = []
        for slot, conversation in self._conversations.items():
            try:
                snapshots.append(SessionSnapshot(slot, conversation, jax.device_get(self._take(slot))))
            except Exception:
                logger.exception("the conversation of slot %d could not be taken from the device", slot)
        return snapshots

    def restore(self, session_store: SessionStore) -> int:
        """Suspends what an earlier engine has saved, and compiles all that it takes; returns how many conversations."""
        self._warm_up()
        for saved in session_store.load():
            self._put_back(saved)
        return len(self)

    def _put_back(self, saved: SessionSnapshot) -> None:
        """Suspends one, in the slot it was in."""
        self._put(saved.slot, saved.arrays)
        plans = self._runner.caches.within(saved.conversation.params.token_budget).plans
        self._runner.occupancy.resumed(saved.slot, int(saved.arrays.length), saved.arrays.used, plans)
        self._conversations[saved.slot] = saved.conversation

    def _warm_up(self) -> None:
        """On slot 0, which stays as it is."""
        row = self._take(0)
        self._put(0, row)
        self.wake(0)
        self._put(0, row)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot stands where its conversation does. Waits for the device."""
        for slot, conversation in self._conversations.items():
            arrays = jax.device_get(self._take(slot))
            assert int(arrays.length) == conversation.position, (slot, arrays.length, conversation.position)
            assert int(arrays.state.generated) == len(conversation.tokens), slot
            assert int(arrays.state.token) == conversation.tokens[-1], slot
            self._runner.occupancy.check_slot(slot, conversation.position, arrays.used)

    def _take(self, slot: int) -> SlotArrays:
        runner = self._runner
        return slot_arrays.take_slot(self._specs, runner.mesh, SlotArrays(runner.views, runner.state), np.int32(slot))

    def _put(self, slot: int, row: SlotArrays) -> None:
        runner = self._runner
        arrays = SlotArrays(runner.views, runner.state)
        new = slot_arrays.insert_slot(slot_arrays.shardings(arrays, runner.mesh), arrays, row, np.int32(slot))
        runner.views, runner.state = new.views, new.state

    def wake(self, slot: int) -> None:
        """Sets the slot of a dropped conversation decoding from where it stands."""
        runner = self._runner
        runner.state = slot_arrays.wake(slot_arrays.shardings(runner.state, runner.mesh), runner.state, np.int32(slot))
