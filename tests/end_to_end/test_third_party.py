"""Load generators and benchmarks that people point at a server, run against the real one."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.end_to_end.server_process import MODEL, ServerProcess

pytestmark = pytest.mark.clients
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" 1", " class"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def program(name: str) -> str:
    found = shutil.which(name, path=str(pathlib.Path(sys.executable).parent))
    assert found, f"{name} is not installed: it comes with the extra `clients`"
    return found


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", "--max-model-len", "256") as process:
        yield process.ready()
        assert process.terminate() == 0, process.log


def test_guidellm_finishes(url, tmp_path):
    report = tmp_path / "report.json"
    command = [program("guidellm"), "run", "--disable-console-interactive"]
    command += ["--backend", f"kind=openai_http,target={url}", "--profile", "kind=concurrent,streams=3"]
    command += ["--constraint", "kind=max_requests,count=12", "--tokenizer", f"kind=hf_auto,model={MODEL}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=60,output_tokens=20"]
    command += ["--output", f"kind=json,path={report}"]
    subprocess.run(command, check=True, env=OFFLINE, timeout=300)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] >= 12
    assert totals["errored"] == 0


@pytest.mark.parametrize(
    ("model", "path", "tasks"),
    [
        ("local-completions", "completions", ["generate", "choose"]),
        ("local-chat-completions", "chat/completions", ["generate"]),
    ],
)
def test_lm_eval_finishes(url, tmp_path, model, path, tasks):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "x = 1\\ny = x +", "answer": " 1"}\n' * 4)
    for name, body in (("generate", GENERATE), ("choose", CHOOSE)):
        head = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {data}}}}}"
        (tmp_path / f"{name}.yaml").write_text(head + body)
    arguments = f"model=kvjax-small,base_url={url}/v1/{path},tokenizer={MODEL},num_concurrent=2"
    command = [program("lm_eval"), "run", "--model", model, "--model_args", arguments]
    command += ["--include_path", str(tmp_path), "--tasks", ",".join(tasks), "--output_path", str(tmp_path / "out")]
    command += ["--apply_chat_template"] if "chat" in model else []
    subprocess.run(command, check=True, env=OFFLINE, timeout=300)
    [report] = (tmp_path / "out").rglob("results*.json")
    results = json.loads(report.read_text())["results"]
    assert set(results) == set(tasks)
