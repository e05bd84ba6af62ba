"""Everything the OpenAPI document allows and much that it forbids, sent by schemathesis to a real server."""

import os
import pathlib
import subprocess
import sys

import pytest
from fake_engine import FakeEngine

pytestmark = pytest.mark.clients
HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("keys", [[], ["first-key", "second-key"]], ids=["open", "with keys"])
def test_the_server_is_what_its_document_says(serve, keys, tmp_path):
    """No 5xx, no undocumented status or shape, nothing wrong accepted and nothing right refused."""
    pytest.importorskip("schemathesis")
    server = serve(FakeEngine(slots=4, queue=252, max_model_len=4096), api_keys=keys, max_queued=252)
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    document = tmp_path / "openapi.json"
    document.write_bytes(server.get("/openapi.json", headers=headers).content)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", server.url),
        *("--phases", "examples,coverage,fuzzing", "--mode", "all", "--checks", "all"),
        *("--exclude-checks", "positive_data_acceptance"),  # ours is stricter: it looks at the reason
        *("--max-examples", "100", "--seed", "1", "--continue-on-failure", "--no-color"),
        *(part for name, value in headers.items() for part in ("--header", f"{name}: {value}")),
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    said = "\n".join(line[:500] for line in (done.stdout + done.stderr).splitlines())
    assert done.returncode == 0, said
    assert "Tested: 12" in done.stdout, done.stdout
    assert server.engine.stats().finished > 50  # it did get through to the engine
