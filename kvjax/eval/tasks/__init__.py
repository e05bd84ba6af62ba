"""Generated tasks: test cases of any length, made from a name, a length in tokens, a seed and a token counter."""

from kvjax.eval.tasks.registry import TASKS, find_task
from kvjax.eval.tasks.sample import CountTokens, Question, Sample
from kvjax.eval.tasks.task import GeneratedTask, Task

__all__ = ["TASKS", "CountTokens", "GeneratedTask", "Question", "Sample", "Task", "find_task"]
