"""A profile that ships, served: the server writes the replies that the search counted as right, and no others."""

from pathlib import Path

import httpx
import pytest

from kvjax.engine.text.tokenizer import Tokenizer
from kvjax.eval.tasks import find_task
from kvjax.search.result import SearchResult
from kvjax.search.samples import draw_sets
from tests.end_to_end.server_process import MODEL, ROOT, ServerProcess

PROFILE = ROOT / "configs/budgets/needles.json"
ASKED = 16


@pytest.mark.slow  # a server starts and compiles
def test_the_server_writes_what_the_search_judged(tmp_path: Path):
    result = SearchResult.from_json(PROFILE.with_suffix(".search.json").read_text())
    config, tokenizer = result.config, Tokenizer.from_pretrained(MODEL)
    tasks = [find_task(name) for name in config.tasks]
    sets = draw_sets(
        tasks, tokenizer.encode, config.length, (config.samples, config.selection, ASKED), query_aware=False
    )
    said = []
    flags = ("--max-model-len", str(2 * config.length), "--max-num-seqs", "2", "--budgets", str(PROFILE))
    with ServerProcess(tmp_path / "log", *flags, model=str(MODEL)) as process:
        url = process.ready()
        for case in sets.test:
            body = {
                "prompt": [*case.prompt, *case.tail[: -case.reply]],
                "compress_after": len(case.prompt),
                "max_tokens": case.reply,
                "temperature": 0,
                "ignore_eos": True,
            }
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status().json()
            said.append(answer["choices"][0]["text"] == tokenizer.decode(list(case.tail[-case.reply :])))
    assert f"budgets of {PROFILE}" in process.log
    assert [float(right) for right in said] == list(result.chosen.each[:ASKED])
    assert sum(said) > 0
