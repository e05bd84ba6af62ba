"""A task for the hand-set transformer, of which the best budgets are known: pairs of tokens, then one of the firsts.

Layer 0 needs the last token alone, which the window keeps; layer 1 needs the second of whichever pair is asked for.
So each token more in layer 1 answers more questions, and each beyond the window in layer 0 answers none.
"""

import random

from benchmarks.model_card.induction import Induction
from kvjax.search.samples import RankedCase, SampleSets

WINDOW = 4
MODEL = Induction(vocabulary=256, max_position=256)


def case(seed: int, pairs: int = 48) -> RankedCase:
    rng = random.Random(seed)
    firsts = rng.sample(range(2, 128), pairs)
    target_logprobs = [(first, rng.randrange(128, 256)) for first in firsts]
    asked, answer = rng.choice(target_logprobs[: pairs - WINDOW])
    return RankedCase(tuple(token for pair in target_logprobs for token in pair), (asked, answer), 1)


def sets(samples: int = 48) -> SampleSets:
    made = [case(seed) for seed in range(3 * samples)]
    return SampleSets(tuple(made[:samples]), tuple(made[samples : 2 * samples]), tuple(made[2 * samples :]))
