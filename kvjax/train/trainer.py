"""The training loop: stages of growing context, evaluation, checkpoints, export.

It depends neither on the content of documents nor on the attention.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from kvjax.eval.tasks.library import standard_library
from kvjax.models import save as save_decoder
from kvjax.train.checkpoint import Checkpoints, Place
from kvjax.train.config import TrainConfig
from kvjax.train.documents import Documents, corpus_ids
from kvjax.train.evaluation import Score, held_out, make_predict, score
from kvjax.train.feed import Feed
from kvjax.train.step import State, decoder_config, first_params, make_step, on_device, optimiser
from kvjax.train.tokenizer import END, EOS, PAD, SPECIAL, save_tokenizer


class Trainer:
    """Trains the model of a config from its newest checkpoint on, or from nothing.

    Raises:
        FileNotFoundError: the tokenizer's folder has no tokenizer.json.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        file = config.tokenizer / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there: python -m kvjax.train.tokenizer --out {config.tokenizer}")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(file))
        ends = tuple(SPECIAL.index(token) for token in (EOS, END))
        self.decoder = decoder_config(config, vocab_size=self.tokenizer.get_vocab_size(), eos_token_ids=ends)
        self.graph, self.first = first_params(config, self.decoder)
        python = any(stage.mix.get("python") for stage in config.stages)
        empty = np.zeros(0, np.uint16)
        self.documents = Documents(self.tokenizer, corpus_ids(self.tokenizer, standard_library()) if python else empty)
        self.unseen = Documents(
            self.tokenizer, corpus_ids(self.tokenizer, standard_library(held_out=True)) if python else empty
        )
        self.predict = make_predict(self.graph, config.model.dtype)

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return sum(array.size for array in jax.tree.leaves(self.first))

    def run(self, *, stop_after: int | None = None) -> State:
        """Trains to the end, exports, and returns the state; resumes where the newest checkpoint stands.

        Args:
            stop_after: return after so many steps of this call, as if killed: nothing is saved or exported.
        """
        with Checkpoints(self.config.runs / "checkpoints") as checkpoints, Feed(self.documents, self.config) as feed:
            place = checkpoints.place() or Place()
            state = self._start(place, checkpoints)
            for index in range(place.stage, len(self.config.stages)):
                if place.step == 0:
                    state = self._restarted(state, index)
                place, state, done = self._stage(place, state, checkpoints, feed, stop_after)
                if stop_after is not None:
                    stop_after -= done
                    if stop_after <= 0:
                        return state
                place = Place(index + 1, 0, place.total)
                checkpoints.save(place, state)
                self.export(place, state)
        return state

    def newest(self) -> tuple[Place, State]:
        """The place of the newest checkpoint, and its state.

        Raises:
            FileNotFoundError: the run has none yet.
        """
        with Checkpoints(self.config.runs / "checkpoints") as checkpoints:
            place = checkpoints.place()
            if place is None:
                raise FileNotFoundError(f"no checkpoint in {self.config.runs}: train first")
            return place, self._start(place, checkpoints)

    def export(self, place: Place, state: State) -> Path:
        """Writes the config, how to generate, and the weights beside the tokenizer's files; returns the folder.

        The config claims the longest context trained up to `place`, and no more.
        """
        folder = self.config.folder
        if folder != self.config.tokenizer:
            save_tokenizer(self.tokenizer, folder)
        saved = jax.tree.map(lambda array: array.astype(self.config.model.saved_dtype), state["params"])
        decoder = nnx.merge(self.graph, saved)
        begun = self.config.stages[: place.stage + (place.step > 0)] or self.config.stages[:1]
        decoder.config = replace(self.decoder, max_position=max(stage.context for stage in begun))
        save_decoder(decoder, folder)
        (folder / "model.safetensors").chmod(0o644)
        ends = list(self.decoder.eos_token_ids)
        generation = {"eos_token_id": ends, "pad_token_id": SPECIAL.index(PAD), "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        return folder

    def evaluate(self, state: State, stage: int) -> dict[str, Score]:
        """Scores of every kind in the stage's mix, on documents of its length that training never draws."""
        config = self.config.stages[stage]
        batch = max(1, min(self.config.evaluate_batch, 4096 // config.context))
        count = batch * max(1, min(self.config.evaluate_batch, 8192 // config.context) // batch)
        return {
            kind: score(self.predict, state["params"], held_out(self.unseen, kind, config.context, count), batch)
            for kind, weight in config.mix.items()
            if weight
        }

    def _start(self, place: Place, checkpoints: Checkpoints) -> State:
        # between two stages a checkpoint has the optimiser of the former, which begins anew with the next
        stage = self.config.stages[min(place.stage, len(self.config.stages) - 1)]
        fresh = {"params": self.first, "optimiser": optimiser(self.config, stage).init(self.first)}
        if place == Place():
            # the step donates its state, and the first weights are needed again
            return _settled(jax.tree.map(jnp.copy, fresh))
        return _settled(checkpoints.restore(place, fresh))

    def _restarted(self, state: State, stage: int) -> State:
        fresh = optimiser(self.config, self.config.stages[stage]).init(state["params"])
        return _settled({"params": state["params"], "optimiser": fresh})

    def _stage(
        self, place: Place, state: State, checkpoints: Checkpoints, feed: Feed, stop_after: int | None
    ) -> tuple[Place, State, int]:
        stage = self.config.stages[place.stage]
        step = make_step(self.graph, optimiser(self.config, stage), self.config.model.dtype)
        done, since, losses = 0, time.perf_counter(), []
        for number, drawn in enumerate(feed.batches(place.stage, place.step), place.step):
            state, value = step(state, on_device(drawn))
            losses.append(value)
            done += 1
            place = Place(place.stage, number + 1, place.total + 1)
            if stop_after is not None and done >= stop_after:
                return place, state, done
            last = place.step == stage.steps
            if place.step % self.config.evaluate_every == 0 or last:
                mean = float(np.mean([float(value) for value in losses]))
                rate = len(losses) * stage.batch * stage.context / (time.perf_counter() - since)
                scores = self.evaluate(state, place.stage)
                self._report(place, mean, rate, scores)
                since, losses = time.perf_counter(), []
                if stage.until is not None and scores["needles"].replies >= stage.until:
                    break
            if place.step % self.config.save_every == 0 and not last:
                checkpoints.save(place, state)
        return place, state, done

    def _report(self, place: Place, loss: float, rate: float, scores: dict[str, Score]) -> None:
        stage = self.config.stages[place.stage]
        shown = "  ".join(f"{kind} {s.tokens:.3f}/{s.replies:.3f}" for kind, s in scores.items())
        print(
            f"context {stage.context:5d}  step {place.step:5d}/{stage.steps}  loss {loss:7.4f}  "
            f"{rate:6.0f} tok/s  {shown}",
            flush=True,
        )
        line = {
            "stage": place.stage,
            "context": stage.context,
            "step": place.step,
            "total": place.total,
            "loss": loss,
            "tokens_per_second": rate,
            "time": time.time(),
            "scores": {kind: asdict(s) for kind, s in scores.items()},
        }
        with (self.config.runs / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def _settled(state: State) -> State:
    # arrays of a checkpoint are tied to their device and new ones are not, which the step would compile twice for
    return jax.device_put(state, jax.local_devices()[0])
