"""What the README shows of the model that ships is what its code prints."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.heavy
def test_the_model_answers_as_the_readme_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    [(code, answers)] = re.findall(
        r"## The model that ships\n.*?```python\n(.*?)```\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    exec(code, {})
    assert capsys.readouterr().out == answers
