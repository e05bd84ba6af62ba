"""Checkpoint of an allocator, by Orbax: its state and its history. A run resumed from it ends in the same bits."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kvjax.search.allocators.allocator import State
from kvjax.search.generation import SearchGeneration

_FIELDS = ("candidates", "score", "log_probability", "fitness")


class Checkpoint:
    """The newest state of one allocator's run, in a folder of its own.

    Args:
        identity: JSON values that must be equal for a saved state to be of this search.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._folder, self._identity = folder.absolute(), identity

    def save(self, state: State, history: Sequence[SearchGeneration]) -> None:
        """Replaces what was saved before; a process that is killed meanwhile leaves the old one."""
        arrays: dict[str, Any] = {str(place): np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(state))}
        for name in _FIELDS if history else ():
            arrays[name] = np.concatenate([getattr(generation, name) for generation in history])
        arrays["sizes"] = np.array([len(generation.candidates) for generation in history], np.int64)
        arrays["spread"] = np.array([generation.spread for generation in history], np.float64)
        arrays["seconds"] = np.array([generation.seconds for generation in history], np.float64)
        with self._manager() as manager:
            step = len(history)
            if step in manager.all_steps():
                return
            state_args = ocp.args.StandardSave({name: array for name, array in arrays.items() if array.size})
            manager.save(step, args=ocp.args.Composite(state=state_args, identity=ocp.args.JsonSave(self._identity)))
            manager.wait_until_finished()

    def restore(self, like: State) -> tuple[State, list[SearchGeneration]] | None:
        """The saved state and history; None if nothing is saved.

        Args:
            like: a state of the same structure, whose arrays may have other shapes. Leaves are saved in
                the order of its keys, so a key that is renamed must keep its place.

        Raises:
            ValueError: another search is saved there; says in what it differs.
        """
        if not self._folder.exists():
            return None
        with self._manager() as manager:
            newest = manager.latest_step()
            if newest is None:
                return None
            saved = manager.restore(
                newest,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(), identity=ocp.args.JsonRestore()),
            )
        identity = saved["identity"]
        differing = [key for key in {**identity, **self._identity} if identity.get(key) != self._identity.get(key)]
        if differing:
            raise ValueError(
                f"{self._folder} holds another search, it differs in {', '.join(sorted(differing))}: "
                "begin afresh (--fresh), or give another folder of runs"
            )
        arrays = saved["state"]
        leaves, structure = jax.tree.flatten(like)
        state = jax.tree.unflatten(structure, [arrays[str(place)] for place in range(len(leaves))])
        history: list[SearchGeneration] = []
        begin = 0
        for size, spread, seconds in zip(
            *(arrays.get(name, ()) for name in ("sizes", "spread", "seconds")), strict=True
        ):
            parts = {name: np.asarray(arrays[name][begin : begin + size]) for name in _FIELDS}
            history.append(SearchGeneration(**parts, spread=float(spread), seconds=float(seconds)))
            begin += size
        return state, history

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True))
