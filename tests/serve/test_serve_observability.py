"""Metrics, the state for the page, request ids and the one line a request leaves in the log."""

import logging
import re
import time

import pytest
from fake_engine import FakeEngine
from live_server import PAGE, wait_until
from prometheus_client.parser import text_string_to_metric_families
from test_serve_load import COMPLETION, posted

import kvjax
from kvjax.engine.request import Finish, Timing
from kvjax.serve.replies import ModelCard, ModelList, State
from kvjax.serve.tally import StreamTally, summary

LATENCIES = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
)


def scrape(server) -> dict[str, float]:
    """Samples by name; of one name with several labels, by name and the label that differs."""
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name in ("finished_reason", "source")]
            samples["/".join([sample.name.removeprefix("kvjax:"), *labels])] = sample.value
    return samples


class TestMetrics:
    def test_everything_is_there_at_zero(self, serve):
        samples = scrape(serve())
        for name in ("num_requests_running", "num_requests_waiting"):
            assert samples[name] == 0
        for name in ("prompt_tokens", "prompt_tokens_cached", "generation_tokens", "compiles_after_warmup"):
            assert samples[f"{name}_total"] == 0
        for reason in ("stop", "length", "abort", "error"):
            assert samples[f"request_success_total/{reason}"] == 0
        assert samples["prompt_tokens_by_source_total/computed"] == 0
        for name in LATENCIES:
            assert samples[f"{name}_count"] == 0
        assert samples["ready"] == 1
        assert samples["num_slots"] == 2

    def test_a_request_is_counted(self, serve):
        server = serve(FakeEngine(prefill_seconds=0.05, token_seconds=0.005))
        server.post("/v1/completions", COMPLETION)
        samples = scrape(server)
        assert samples["prompt_tokens_total"] == 2
        assert samples["generation_tokens_total"] == 20
        assert samples["request_success_total/stop"] == 1
        assert samples["prompt_tokens_by_source_total/computed"] == 2
        assert samples["inter_token_latency_seconds_count"] == 19
        for name in LATENCIES:
            if name != "inter_token_latency_seconds":
                assert samples[f"{name}_count"] == 1, name
        assert samples["request_prefill_time_seconds_sum"] >= 0.05
        assert samples["time_to_first_token_seconds_sum"] >= 0.05
        assert samples["request_decode_time_seconds_sum"] >= 0.09
        assert samples["e2e_request_latency_seconds_sum"] >= 0.14
        assert samples["request_generation_tokens_sum"] == 20

    def test_scoring_a_prompt_has_no_first_token(self, serve):
        server = serve()
        server.post("/v1/completions", COMPLETION | {"max_tokens": 0, "echo": True})
        samples = scrape(server)
        assert samples["time_to_first_token_seconds_count"] == 0
        assert samples["request_success_total/length"] == 1

    def test_failures_and_clients_that_left(self, serve):
        server = serve(FakeEngine(fail_after=2))
        server.post("/v1/completions", COMPLETION)
        assert scrape(server)["request_success_total/error"] == 1
        server.engine.fail_after, server.engine.prefill_seconds = None, 30
        with posted(server, "/v1/completions", COMPLETION):
            wait_until(lambda: scrape(server)["num_requests_running"] == 1)
        wait_until(lambda: scrape(server)["request_success_total/abort"] == 1)
        text = server.get("/metrics").text
        assert 'kvjax:http_requests_total{method="POST",path="/v1/completions",status="499"} 1.0' in text

    def test_no_label_holds_what_a_user_wrote(self, server):
        server.post("/v1/completions", COMPLETION | {"prompt": "SECRET", "cache_salt": "SECRET"})
        server.post("/SECRET", {})
        server.get("/v1/models/SECRET")
        server.post("/v1/completions", {"prompt": "x", "model": "SECRET"})
        text = server.get("/metrics").text
        assert "SECRET" not in text
        assert 'path="unknown"' in text


class TestState:
    def test_its_shape(self, server):
        server.post("/v1/completions", COMPLETION)
        state = server.get("/state").json()
        State.model_validate(state)
        assert state["phase"] == "ready"
        assert state["model"] == "fake"
        assert state["version"] == kvjax.__version__
        assert state["max_model_len"] == 512
        assert [slot["state"] for slot in state["slots"]] == ["free", "free"]
        assert state["requests"]["finished"] >= 1
        assert state["ttft_ms"]["p95"] >= state["ttft_ms"]["p50"] >= 0

    def test_nothing_happened_yet(self, serve):
        state = serve(FakeEngine(phase="loading")).get("/state").json()
        State.model_validate(state)
        assert state["ttft_ms"] == {"p50": None, "p95": None}
        assert state["tokens_per_second"] == 0

    def test_a_running_request_shows(self, serve):
        server = serve(FakeEngine(token_seconds=0.05))
        with posted(server, "/v1/completions", COMPLETION):
            wait_until(lambda: server.get("/state").json()["slots"][0]["state"] == "decode")
            state = server.get("/state").json()
            assert (state["running"], state["waiting"]) == (1, 0)
            wait_until(lambda: server.get("/state").json()["tokens_per_second"] > 5)
            wait_until(lambda: any(second["running"] for second in server.get("/state").json()["history"]))


def test_the_page(server):
    answer = server.get("/")
    assert answer.text == PAGE
    assert answer.headers["content-type"].startswith("text/html")


def test_a_build_without_a_page_says_so(serve):
    answer = serve(page=None).get("/")
    assert answer.status_code == 404
    assert "no page" in answer.json()["error"]["message"]


class TestModels:
    def test_cards(self, serve):
        server = serve(names=["one", "org/two"])
        answer = server.get("/v1/models").json()
        ModelList.model_validate(answer)
        assert [card["id"] for card in answer["data"]] == ["one", "org/two"]
        assert answer["data"][0]["max_model_len"] == 512
        ModelCard.model_validate(server.get("/v1/models/org/two").json())

    def test_an_answer_has_the_name_it_was_asked_by(self, serve):
        server = serve(names=["one", "org/two"])
        for asked, said in (("org/two", "org/two"), ("one", "one"), (None, "one")):
            body = COMPLETION | {"model": asked}
            assert server.post("/v1/completions", body).json()["model"] == said
        assert server.post("/v1/completions", COMPLETION | {"model": "fake"}).status_code == 404

    def test_version(self, server):
        assert server.get("/version").json() == {"version": kvjax.__version__}


class TestRequestId:
    def test_a_safe_one_is_kept(self, server):
        answer = server.post("/v1/completions", COMPLETION, headers={"X-Request-Id": "run-7:a.b_c"})
        assert answer.headers["x-request-id"] == "run-7:a.b_c"
        assert answer.json()["id"] == "cmpl-run-7:a.b_c"

    @pytest.mark.parametrize("bad", ["a b", "a" * 129, "a\tb", "ä", "<script>", ""])
    def test_another_is_replaced(self, server, bad):
        answer = server.get("/live", headers={"X-Request-Id": bad.encode()})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

    def test_every_answer_has_one(self, server):
        for path in ("/nope", "/", "/health", "/metrics"):
            assert server.get(path).headers["x-request-id"]


class TestLog:
    @pytest.fixture
    def lines(self, caplog):
        caplog.set_level(logging.INFO, "kvjax.serve")
        return lambda: [record.getMessage() for record in caplog.records if record.name == "kvjax.serve"]

    def test_one_line_a_request(self, server, lines):
        for stream in (False, True):
            headers = {"X-Request-Id": f"r{stream:d}"}
            server.post("/v1/completions", COMPLETION | {"stream": stream}, headers=headers)
        wait_until(lambda: len(lines()) == 2)
        first, second = lines()
        assert re.fullmatch(
            r"cmpl-r0 200 \| prompt 2 tok: computed 2 \| generated 20 tok, stop \| TTFT \d+\.\d\d s "
            r"\| [\d.]+ tok/s \| view 100% of full KV",
            first,
        )
        assert second.startswith("cmpl-r1 200 | prompt 2 tok")

    def test_refusals_and_failures(self, serve, lines):
        server = serve(FakeEngine(fail_after=1))
        server.post("/v1/completions", {"prompt": ""}, headers={"X-Request-Id": "a"})
        server.post("/v1/completions", {"prompt": [1] * 600}, headers={"X-Request-Id": "b"})
        server.post("/v1/completions", COMPLETION | {"stream": True}, headers={"X-Request-Id": "c"})
        wait_until(lambda: len(lines()) == 3)
        assert lines() == [
            "a 400 | invalid_request_error",
            "b 400 | invalid_request_error context_length_exceeded",
            "cmpl-c 200 | server_error generation_failed",
        ]

    def test_a_client_that_left(self, serve, lines):
        server = serve(FakeEngine(token_seconds=0.05))
        for stream in (True, False):
            with posted(server, "/v1/completions", COMPLETION | {"stream": stream}):
                wait_until(lambda: server.engine.stats().running)
            wait_until(lambda: not server.engine.stats().running)
        wait_until(lambda: len(lines()) == 2)
        assert all(re.match(r"cmpl-\w+ 499 \| prompt 2 tok", line) for line in lines())

    @pytest.mark.parametrize("phase", ["ready", "compiling"])
    def test_probes_are_quiet(self, serve, lines, phase):
        server = serve(FakeEngine(phase=phase))
        for path in ("/health", "/live", "/metrics", "/state", "/"):
            server.get(path)
        time.sleep(0.1)
        assert lines() == []

    def test_nothing_a_user_wrote_is_in_it(self, server, caplog):
        with caplog.at_level(logging.DEBUG, "kvjax"):
            server.post("/v1/completions", {"prompt": "SECRET", "cache_salt": "SECRET", "user": "SECRET"})
            server.post("/v1/completions", {"prompt": "x", "stop": "SECRET", "n": "SECRET"})
            server.post("/v1/completions", {"prompt": "x", "logit_bias": {"SECRET": 1}})
            server.post("/v1/completions", {"prompt": "x", "model": "SECRET"})
            server.post("/SECRET?SECRET", {"SECRET": 1})
            wait_until(lambda: len(caplog.records) >= 5)  # a line is written once its answer has left
        assert not any("SECRET" in record.getMessage() for record in caplog.records)


class TestSummary:
    def test_every_part(self):
        timing = Timing(0.0, 0.1, 0.21, 1.52, 0.023, {"computed": 512, "host": 4096, "disk": 8192})
        stream = StreamTally(12800, True, generated=64, finish=Finish.STOP, timing=timing)
        assert summary([stream]) == (
            "prompt 12,800 tok: host 4,096 + disk 8,192 + computed 512 | generated 64 tok, stop "
            "| TTFT 0.21 s | 48.1 tok/s | view 2.3% of full KV"
        )

    def test_several_choices(self):
        timing = Timing(0.0, 0.0, 1.0, 2.0, prefix={"computed": 10})
        streams = [
            StreamTally(10, index == 0, generated=5, finish=finish, timing=timing)
            for index, finish in enumerate((Finish.STOP, Finish.LENGTH, Finish.STOP))
        ]
        assert summary(streams) == (
            "prompt 10 tok: computed 10 | generated 15 tok, 2 stop, 1 length | TTFT 1.00 s | 12.0 tok/s "
            "| view 100% of full KV"
        )

    def test_one_that_went_on_after_a_restart(self):
        """What had been generated before came at once: the rate is that of the others."""
        timing = Timing(0.0, 0.1, 0.21, 1.21, prefix={"suspended": 512, "computed": 0}, resumed=40)
        stream = StreamTally(512, True, generated=64, finish=Finish.LENGTH, timing=timing)
        assert summary([stream]) == (
            "prompt 512 tok: suspended 512 | generated 64 tok, length | resumed after 40 tokens "
            "| TTFT 0.21 s | 24.0 tok/s | view 100% of full KV"
        )

    def test_one_that_never_left_the_queue(self):
        assert summary([StreamTally(7, True)]) == "prompt 7 tok | generated 0 tok"
