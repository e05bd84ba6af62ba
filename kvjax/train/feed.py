"""The feed: batches of a stage, drawn ahead of the device that learns from them, in a thread or in processes.

    main thread     takes batches in the order of steps and puts them on the device
    one thread      draws the next batch while the device computes this one: enough for a CPU
    or processes    each draws every n-th batch, some steps ahead: for a device that learns faster than a core draws

A batch is a pure function of seed, stage and step, so it is the same in a thread and in any process.
"""

import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import numpy as np
from jaxtyping import Bool, Int, Integer
from tokenizers import Tokenizer

from kvjax.train.config import TrainConfig
from kvjax.train.documents import Documents

Drawn = tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]
AHEAD = 2  # batches that each process has drawn or is drawing
GRACE = 10  # seconds that a process may take to finish its batch


def draw_batch(documents: Documents, config: TrainConfig, stage: int, step: int) -> Drawn:
    """Tokens and mask of one step: a pure function of seed, stage and step, so a resumed run sees the same ones."""
    stage_config = config.stages[stage]
    batch, context = stage_config.shape(step)
    drawn = [
        documents.draw(stage_config.mix, context, random.Random(f"{config.seed}/{stage}/{step}/{row}"))
        for row in range(batch)
    ]
    return np.stack([document.tokens for document in drawn]), np.stack([document.mask for document in drawn])


class Feed:
    """Batches in the order of steps, drawn by `config.processes` processes, or by a thread if that is 0.

    A context manager: processes begin on entry and end on exit. They also end when the process that made them is
    killed, since their pipes to it close.
    """

    def __init__(self, documents: Documents, config: TrainConfig) -> None:
        self._documents, self._config = documents, config
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._pending: list[int] = []  # requests that a process has not answered yet, one count a process

    def __enter__(self) -> "Feed":
        # a fork of a process that has started JAX may hang, so each begins anew
        context = multiprocessing.get_context("spawn")
        for _ in range(self._config.processes):
            here, there = context.Pipe()
            work = (there, self._config, self._documents.corpus)
            process = context.Process(target=_draw_for, args=work, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
            self._pending.append(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._pipes:
            self._pipes.pop().close()
        self._pending.clear()
        while self._processes:
            process = self._processes.pop()
            process.join(GRACE)
            process.kill()
            process.join()
            process.close()

    def batches(self, stage: int, first: int) -> Iterator[Drawn]:
        """Batches of `stage` from step `first` to its end. Asking for others ends an earlier iteration.

        Raises:
            RuntimeError: a process that draws has ended.
        """
        steps = range(first, self._config.stages[stage].steps)
        return self._by_processes(stage, steps) if self._pipes else self._by_thread(stage, steps)

    def _by_thread(self, stage: int, steps: range) -> Iterator[Drawn]:
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(draw_batch, self._documents, self._config, stage, step) for step in steps[:1]]
            for step in steps:
                batch = coming.pop().result()
                if step + 1 < steps.stop:
                    coming.append(pool.submit(draw_batch, self._documents, self._config, stage, step + 1))
                yield batch

    def _by_processes(self, stage: int, steps: range) -> Iterator[Drawn]:
        for index, pending in enumerate(self._pending):  # requests of an earlier iteration that it did not take
            for _ in range(pending):
                self._receive(index)
        ahead = AHEAD * len(self._pipes)
        for step in steps[:ahead]:
            self._request(stage, step)
        for step in steps:
            batch = self._receive(step % len(self._pipes))
            if step + ahead < steps.stop:
                self._request(stage, step + ahead)
            yield batch

    def _request(self, stage: int, step: int) -> None:
        index = step % len(self._pipes)
        self._pending[index] += 1
        try:
            self._pipes[index].send((stage, step))
        except OSError as error:
            raise RuntimeError("a process that draws documents has ended: its own error stands above") from error

    def _receive(self, index: int) -> Drawn:
        self._pending[index] -= 1
        try:
            return self._pipes[index].recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a process that draws documents has ended: its own error stands above") from error


def _draw_for(pipe: Connection, config: TrainConfig, corpus: Integer[np.ndarray, "N"]) -> None:
    """The main function of a process: draws the requested batches until the pipe is closed."""
    documents = Documents(Tokenizer.from_file(str(config.tokenizer / "tokenizer.json")), corpus)
    try:
        while True:
            stage, step = pipe.recv()
            pipe.send(draw_batch(documents, config, stage, step))
    except (EOFError, OSError, KeyboardInterrupt):
        return
