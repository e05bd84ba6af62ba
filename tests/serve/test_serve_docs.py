"""`docs/serving.md` names what there is, all of it and nothing else."""

import pathlib
import re

from prometheus_client.parser import text_string_to_metric_families
from test_serve_security import all_routes

from kvjax.serve.arguments import FILES, OPTIONS

DOCUMENT = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")


def section(title: str) -> str:
    return DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_all_flags():
    known = {f"--{name.replace('_', '-')}" for name in (*OPTIONS, *FILES)}
    table = [line.split("|")[1] for line in section("Flags").splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(--[a-z-]+)`", " ".join(table))) == known
    mentioned = set(re.findall(r"`(--[a-z-]+)", DOCUMENT))
    assert mentioned <= known | {"--help"}


def test_all_metrics(server):
    families = text_string_to_metric_families(server.get("/metrics").text)
    families = [family for family in families if not family.name.endswith("_created")]
    known = {family.name.removeprefix("kvjax:") + "_total" * (family.type == "counter") for family in families}
    table = [line.split("|")[1] for line in section("Metrics").splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([a-z0-9_]+)`", " ".join(table))) == known


def test_all_paths():
    table = [line.split("|")[1] for line in section("Endpoints").splitlines() if line.startswith("| `")]
    written = set(re.findall(r"(/[a-zA-Z0-9_./]*)", " ".join(table)))
    assert written == {path.replace("/fake", "/NAME") for _, path in all_routes()}
