"""Whoever draws a batch, it is the same; processes end with whoever asked them."""

import dataclasses
import multiprocessing

import numpy as np
import pytest

from kvjax.train.feed import Feed, draw_batch
from kvjax.train.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(toy):
    return Trainer(toy)


def same(drawn, wanted):
    return all(np.array_equal(a, b) for a, b in zip(drawn, wanted, strict=True))


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_come_in_order_and_are_the_same_whoever_draws(trainer, toy, processes):
    config = dataclasses.replace(toy, processes=processes)
    with Feed(trainer.documents, config) as feed:
        left = feed.batches(0, 0)
        assert same(next(left), draw_batch(trainer.documents, toy, 0, 0))
        # another stage, though the first had been asked for more
        for stage, first in ((1, 1), (0, 3)):
            found = list(feed.batches(stage, first))
            wanted = [draw_batch(trainer.documents, toy, stage, s) for s in range(first, toy.stages[stage].steps)]
            assert len(found) == len(wanted)
            assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


def test_processes_end_with_the_feed_and_a_lost_one_is_told(trainer, toy):
    with Feed(trainer.documents, dataclasses.replace(toy, processes=1)) as feed:
        [process] = multiprocessing.active_children()
        process.kill()
        process.join(10)
        with pytest.raises(RuntimeError, match="has ended"):
            list(feed.batches(0, 0))
    with Feed(trainer.documents, dataclasses.replace(toy, processes=1)) as feed:
        next(feed.batches(0, 0))
        assert len(multiprocessing.active_children()) == 1
    assert not multiprocessing.active_children()


def test_a_batch_is_a_function_of_seed_stage_and_step(trainer, toy):
    first = draw_batch(trainer.documents, toy, 0, 1)
    assert same(draw_batch(trainer.documents, toy, 0, 1), first)
    for other in (draw_batch(trainer.documents, toy, 0, 2), draw_batch(trainer.documents, _seeded(toy), 0, 1)):
        assert not same(other, first)


def test_a_stage_of_several_lengths_takes_them_in_turn(trainer, toy):
    stage = dataclasses.replace(toy.stages[1], context=256, batch=2, halvings=2)
    config = dataclasses.replace(toy, stages=(stage,))
    shapes = [draw_batch(trainer.documents, config, 0, step)[0].shape for step in range(4)]
    assert shapes == [(2, 256), (4, 128), (8, 64), (2, 256)]


def _seeded(toy):
    return dataclasses.replace(toy, seed=1)
