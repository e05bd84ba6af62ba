"""Checkpoints of a run: weights, optimiser and the place in the schedule, by Orbax.

Batches are a pure function of the place, so a killed run that resumes ends in the same bits as one that was
never killed.
"""

import dataclasses
from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint as ocp

from kvjax.train.step import State


@dataclasses.dataclass(frozen=True)
class Place:
    """The next step to do: `step` of `stage`; `total` steps were done before in all stages."""

    stage: int = 0
    step: int = 0
    total: int = 0


class Checkpoints:
    """The last few checkpoints of a run, in one folder. Not for several processes at once."""

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, place: Place, state: State) -> None:
        """Writes the state; a checkpoint that is there for the same place is kept as it is."""
        if place.total in self._manager.all_steps():
            return
        self._manager.save(
            place.total,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), place=ocp.args.JsonSave(dataclasses.asdict(place))
            ),
        )
        self._manager.wait_until_finished()

    def place(self) -> Place | None:
        """The place of the newest checkpoint, or None if there is none."""
        newest = self._manager.latest_step()
        if newest is None:
            return None
        restored = self._manager.restore(newest, args=ocp.args.Composite(place=ocp.args.JsonRestore()))
        return Place(**restored["place"])

    def restore(self, place: Place, like: State) -> State:
        """The state saved at `place`; `like` gives its structure.

        Raises:
            FileNotFoundError, ValueError: no such checkpoint, or of another structure.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(place.total, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        return restored["state"]
