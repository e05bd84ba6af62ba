"""`token_budget` in a request: it reaches the engine, or is refused with what is allowed."""

import pytest
from test_serve_errors import error_of

PATHS = {
    "/v1/completions": {"prompt": [7] * 40, "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x" * 30}], "max_tokens": 4},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("budget", [32, 64, 48.0, None])
def test_it_reaches_the_engine(server, path, budget):
    assert server.post(path, PATHS[path] | {"token_budget": budget, "n": 2}).status_code == 200
    assert [params.token_budget for _, params, *_ in server.engine.asked] == [budget, budget]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [16, 65])
def test_what_the_engine_does_not_serve_is_refused_before_it_is_tokenised(server, path, budget, stream):
    before = server.engine.tokenizer.encoded
    error = error_of(server.post(path, PATHS[path] | {"token_budget": budget, "stream": stream}), 400)
    assert error["param"] == "token_budget"
    assert f"token_budget={budget} is outside [32, 64]" in error["message"]
    assert server.engine.tokenizer.encoded == before
    assert not server.engine.asked


@pytest.mark.parametrize("value", [0, 15, -1, 32.5, "32", True, 2**31, [64]])
def test_what_is_no_budget(server, value):
    error = error_of(server.post("/v1/completions", PATHS["/v1/completions"] | {"token_budget": value}), 400)
    assert error["param"] == "token_budget"
