"""The Python text the model learns from, which `kvjax.eval` shares: it tests on the packages held out here."""

from kvjax.eval.tasks_library import HELD_OUT, LEFT_OUT, standard_library

__all__ = ["HELD_OUT", "LEFT_OUT", "standard_library"]
