"""Session snapshots: conversations on the disk while no engine runs, written at its end and read at the next start.

    DIR/conversations/about     what must be equal for them to mean anything, and the host's side of each, as JSON
    DIR/conversations/slot-N    the arrays of slot N, whole: a mesh of any size takes its part of them

They are Orbax checkpoints. Orbax writes under another name and renames, so half of it is never found. What is read is
proven by checksums, for nothing below would notice a flipped bit; and a fault costs a conversation, never another
answer.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import crc32c
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvjax import cache
from kvjax.cache import ArraySpec
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.steps import DecodeState
from kvjax.engine.kv.namespace import namespace
from kvjax.engine.sessions.conversation import Conversation
from kvjax.engine.sessions.slot_arrays import SlotArrays

logger = logging.getLogger(__name__)

FORMAT = "kvjax-suspended-1"
NAME = "conversations"
DIGEST = 64  # hexadecimal digits, of which twelve are enough for a person


@dataclasses.dataclass(frozen=True, eq=False)
class SessionSnapshot:
    """One conversation outside an engine: the slot it was in, the host's side, and its arrays without slots."""

    slot: int
    conversation: Conversation
    arrays: SlotArrays


def identity(path: Path, caches: CacheConfig) -> dict[str, str]:
    """All that two engines must share for one to go on, bit for bit, where the other stood: names and short values.

    All that stored KV of the model in folder `path` depends on but the number of devices, and how the views are
    selected and laid out.
    """
    layout = caches.layout
    names = dataclasses.asdict(namespace(path, caches, 1))  # of one device, however many there are: arrays are whole
    specs = SlotArrays(caches.views, DecodeState.declare(layout.max_num_seqs, caches.model.vocab_size))
    shapes = {name: (spec.shape, jnp.dtype(spec.dtype).name) for name, spec in cache.named(specs).items()}
    profile = _digest(repr((caches.profile, caches.plans, caches.multi_turn, layout.reselect)))
    return {
        **{name: value for name, value in names.items() if value},
        "profile": f"{layout.method} {profile[:12]}",
        "layout": f"{layout.max_num_seqs} slots of {layout.max_model_len} tokens, {_digest(repr(shapes))[:12]}",
    }


class SessionStore:
    """One folder of suspended conversations, for one engine at a time.

    Args:
        identity: of the engine.
        specs: its arrays, of all slots; `mesh` is where they live.
    """

    def __init__(self, folder: Path, identity: dict[str, str], specs: SlotArrays, mesh: Mesh | None = None) -> None:
        self.folder, self._identity, self._mesh = folder, identity, mesh
        self._like = cache.rows(specs)
        self._snapshot = folder.absolute() / NAME
        self._used_up = False
        self._lock = threading.Lock()  # a start that is just done may meet the end

    @classmethod
    def open(cls, folder: Path, path: Path, caches: CacheConfig, mesh: Mesh | None) -> "SessionStore":
        """That of an engine for the model in folder `path`.

        Raises:
            ValueError: nothing can be written there.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold what people wrote
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(0, "nothing may be written there")
        except OSError as error:
            raise ValueError(
                f"session_dir={str(folder)!r}: {error.strerror}; choose another folder for --session-dir"
            ) from error
        specs = SlotArrays(caches.views, DecodeState.declare(caches.layout.max_num_seqs, caches.model.vocab_size))
        return cls(folder, identity(path, caches), specs, mesh)

    def save(self, conversations: Sequence[SessionSnapshot]) -> None:
        """Writes them in place of what is there, the oldest first; with none of them it does nothing.

        A failure is logged: the engine ends either way.
        """
        if not conversations:
            return
        began = time.monotonic()
        try:
            with self._lock:
                self._used_up = False
                self._write(conversations)
        except Exception:
            logger.exception("%d conversations could not be suspended in %s", len(conversations), self.folder)
            return
        seconds = time.monotonic() - began
        logger.info("suspended %d conversations in %s, %.1f s", len(conversations), self.folder, seconds)

    def load(self) -> Iterator[SessionSnapshot]:
        """What the last engine has left, in the order in which it was saved, placed on this engine's mesh.

        What is of another engine is left alone and what cannot be read is left out; a warning says so.
        """
        for rest in self.folder.glob(f"{NAME}.*"):  # a save that did not come to its end
            shutil.rmtree(rest, ignore_errors=True)
        if not self._snapshot.is_dir():
            return
        try:
            about = self._read()
        except Exception as error:  # Orbax raises whatever it meets
            self._used_up = True
            logger.warning(
                "the conversations suspended in %s cannot be read and are dropped (%s)", self.folder, _line(error)
            )
            return
        if different := _differences(about["identity"], self._identity):
            logger.warning("the conversations suspended in %s are not for this engine: %s", self.folder, different)
            return
        self._used_up = True
        for each in about["conversations"]:
            try:
                saved = self._restore(each)
            except Exception as error:
                logger.warning(
                    "a conversation suspended in %s cannot be read and is dropped (%s)", self.folder, _line(error)
                )
                continue
            yield saved

    def consume(self) -> None:
        """Deletes what `load` has read: these conversations are the engine's now."""
        with self._lock:
            if self._used_up:
                shutil.rmtree(self._snapshot, ignore_errors=True)

    def _write(self, conversations: Sequence[SessionSnapshot]) -> None:
        import orbax.checkpoint as ocp

        records, items = [], {}
        for saved in conversations:
            arrays = {name: np.asarray(array) for name, array in cache.named(saved.arrays).items()}
            retained = saved.conversation.retained or ()
            arrays |= {f"kept.{layer}": np.asarray(positions) for layer, positions in enumerate(retained)}
            checksums = {name: _checksum(array) for name, array in arrays.items()}
            records.append({"slot": saved.slot, "crc32c": checksums, "conversation": saved.conversation.to_json()})
            items[f"slot-{saved.slot}"] = ocp.args.PyTreeSave(arrays)
        body = json.dumps({"format": FORMAT, "identity": self._identity, "conversations": records})
        items["about"] = ocp.args.JsonSave({"body": body, "sha256": _digest(body)})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(self._snapshot, args=ocp.args.Composite(**items), force=True)

    def _read(self) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            about = checkpointer.restore(self._snapshot, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if _digest(about["body"]) != about["sha256"]:
            raise ValueError("its description is not what was written")
        read = json.loads(about["body"])
        if read["format"] != FORMAT:
            raise ValueError(f"its format is {read['format']!r}, and this is {FORMAT!r}")
        return read

    def _restore(self, record: dict[str, Any]) -> SessionSnapshot:
        import orbax.checkpoint as ocp

        specs, name = cache.named(self._like), f"slot-{record['slot']}"
        layers = [layer for layer in range(len(self._like.views)) if f"kept.{layer}" in record["crc32c"]]
        retained = {f"kept.{layer}": self._like.views[layer].positions for layer in layers}
        targets = {key: self._target(spec) for key, spec in specs.items()}
        targets |= {key: _on_host(spec) for key, spec in retained.items()}
        like = {key: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for key, spec in {**specs, **retained}.items()}
        item = ocp.args.PyTreeRestore(item=like, restore_args=targets)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(self._snapshot, args=ocp.args.Composite(**{name: item}))[name]
        for key, array in arrays.items():
            if _checksum(np.asarray(array)) != record["crc32c"][key]:
                raise ValueError(f"{key} of {name} is not what was written")
        conversation = Conversation.from_json(record["conversation"], tuple(arrays[key] for key in retained) or None)
        return SessionSnapshot(record["slot"], conversation, cache.unnamed(arrays, self._like))

    def _target(self, spec: ArraySpec) -> Any:
        """How Orbax is to bring an array: cut over the mesh as it was declared, or to the host for a single device."""
        import orbax.checkpoint as ocp

        if self._mesh is None:
            return _on_host(spec)
        return ocp.ArrayRestoreArgs(sharding=spec.sharding(self._mesh), global_shape=spec.shape, dtype=spec.dtype)


def _on_host(spec: ArraySpec) -> Any:
    import orbax.checkpoint as ocp

    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=spec.dtype)


def _differences(there: dict[str, str], here: dict[str, str]) -> str:
    """`weights 0123456789ab there, ba9876543210 here; layout ...`; empty if there are none."""
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return "; ".join(f"{name} {_short(there.get(name))} there, {_short(here.get(name))} here" for name in names)


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value[:12] if len(value) == DIGEST else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(array: np.ndarray) -> int:
    return crc32c.crc32c(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
