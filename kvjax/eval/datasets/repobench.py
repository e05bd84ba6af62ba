"""RepoBench-P's own data (version 1.1, `.parquet`, or its records as JSON); LongBench's excerpt is LongBench's.

Fields relied on: `context`, a list of `path` and `snippet`; `file_path`, `import_statement`, `cropped_code` (`code` in
version 1.0), `next_line`. Version 1.0 was published as pickles, which are never read.
"""

from pathlib import Path

from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.datasets.rows import Row, read_rows
from kvjax.eval.tasks import Sample


def load_repobench(path: Path) -> DataSet:
    """The next lines of a file's records: other files' snippets first, then the imports and the code before the line.

    Raises:
        LoadError: a field is missing.
    """
    return DataSet(f"repobench/{path.stem}", "edit_similarity", tuple(map(_sample, read_rows(path))))


def _sample(row: Row) -> Sample:
    file = row.text("file_path")
    mark = "#" if file.endswith(".py") else "//"
    snippets = [f"{mark} Path: {one.text('path')}\n{one.text('snippet')}\n\n" for one in row.rows("context")]
    code = f"{mark} Path: {file}\n{row.text('import_statement')}\n\n{row.text('cropped_code', 'code')}"
    line = row.text("next_line")
    return Sample("".join(snippets), code.rstrip("\n") + "\n", "", (line,), 64, reply=line + "\n")
