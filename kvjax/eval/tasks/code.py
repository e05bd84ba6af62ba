"""Code completion: the next line of a file, which uses what another file of its package defines.

The shape is RepoBench-P's: other files come first, among them the definition, then the beginning of the file. The
files are those of the standard library that training held out, so samples depend on the version of Python too.
"""

import random
from dataclasses import dataclass

from kvjax.eval.tasks.fitting import largest_fit
from kvjax.eval.tasks.library_uses import Use, held_out_files, held_out_uses
from kvjax.eval.tasks.sample import CountTokens, Sample
from kvjax.eval.tasks.task import GeneratedTask


@dataclass(frozen=True)
class NextLineTask(GeneratedTask):
    """The next line of a held-out file.

    Attributes:
        before, after: an instruction before the code and one behind it; a model of nothing but code needs none.
        lines: of the file itself, at most so many before the one asked for.
    """

    metric = "edit_similarity"
    name: str
    before: str = ""
    after: str = ""
    lines: int = 30
    max_new_tokens: int = 64

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """A sample as in `Task`, which nears `length` while files last.

        The file itself takes at most half of the room and the definition half of the rest; other files fill it.

        Raises:
            ValueError: `length` does not hold the line and what leads to it.
            FileNotFoundError: this interpreter has no source of its standard library.
        """
        rng = self.rng(length, seed)
        use = rng.choice(held_out_uses())
        files = held_out_files()
        lines = files[use.path].split("\n")
        answer = lines[use.line]
        room = length - count(answer + "\n")

        def question(size: int) -> str:
            code = "".join(f"{line}\n" for line in lines[use.line - size : use.line])
            return f"# Path: {use.path}\n{use.statement}\n\n{code}{self.after}"

        size = largest_fit(lambda size: count(question(size)) <= room // 2, upper=min(self.lines, use.line))
        room -= count(question(size))

        definition = files[use.source].split("\n")[use.first : use.last]

        def defined(size: int) -> str:
            return f"# Path: {use.source}\n" + "".join(f"{line}\n" for line in definition[:size])

        snippet = defined(largest_fit(lambda size: count(defined(size)) <= room // 2, upper=len(definition)))
        place = rng.random()
        others = self._others(use, rng)

        def context(size: int) -> str:
            blocks: list[str] = []
            for path in others:
                shown = files[path].rstrip("\n").split("\n")[: max(size, 0)]
                size -= len(shown) + 1
                if shown:
                    blocks.append(f"# Path: {path}\n" + "".join(f"{line}\n" for line in shown))
            blocks.insert(round(place * len(blocks)), snippet)
            return self.before + "\n".join(blocks) + "\n"

        upper = min(length, sum(files[path].count("\n") + 2 for path in others))
        filled = largest_fit(lambda size: count(context(size)) <= room, upper=upper)
        return Sample(
            context(filled),
            question(size),
            "",
            (answer,),
            self.max_new_tokens,
            reply=answer + "\n",
        )

    def _others(self, use: Use, rng: random.Random) -> list[str]:
        """All other files, those of the same package first."""
        package = use.path.split("/")[0]
        paths = [path for path in held_out_files() if path not in (use.path, use.source)]
        rng.shuffle(paths)
        return sorted(paths, key=lambda path: path.split("/")[0] != package)


def code_tasks() -> tuple[NextLineTask, ...]:
    """With LongBench's instruction, and with none."""
    return (
        NextLineTask("text/next_line", before="Please complete the code given below. \n", after="Next line of code:\n"),
        NextLineTask("mini/next_line"),
    )
