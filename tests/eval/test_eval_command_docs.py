"""`docs/evaluation.md` names the flags there are, all of them and no other."""

import re

from kvjax.eval.arguments import KINDS, build_parser
from tests.end_to_end.server_process import ROOT

DOCUMENT = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
RUNNING = DOCUMENT.partition("\n## Running it\n")[2].partition("\n## ")[0]


def test_all_flags():
    known = {flag for action in build_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    table = [line.split("|")[1] for line in RUNNING.splitlines() if line.startswith("| `--")]
    assert set(re.findall(r"`(--[a-z-]+)`", " ".join(table))) == known - {"--help", "--version"}
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", RUNNING)) <= known


def test_all_kinds_of_files_are_told():
    for kind in KINDS:
        assert f"| `{kind}` |" in DOCUMENT


def test_the_program_in_python_runs_as_far_as_names_go():
    [source] = re.findall(r"```python\n(.*?)```", RUNNING, re.DOTALL)
    imports = "\n".join(line for line in source.splitlines() if line.startswith("from "))
    names: dict[str, object] = {}
    exec(imports, names)
    compile(source, "docs/evaluation.md", "exec")
    assert {"Case", "Conduct", "EngineTarget", "evaluate", "find_task", "Engine"} <= set(names)
