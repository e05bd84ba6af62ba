"""Loaded by schemathesis: which requests that fit the document may be refused all the same.

A JSON Schema cannot compare two numbers or count tokens, and generators give up on a rule of three fields, as the one
of `compress_after`; everything else that it allows must be accepted.
"""

import schemathesis

CODES = {"context_length_exceeded", "too_many_completions"}
PARAMS = {
    "min_tokens",
    "logit_bias",
    "compress_after",
    "token_budget",
    "seed",
}  # the seed's bounds are no doubles, as which they are compared


@schemathesis.check
def accepts_what_the_document_allows(ctx, response, case):
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code < 400:
        return
    if response.status_code == 405 or (response.status_code == 404 and "{model}" in case.operation.path):
        return
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["code"] in CODES or error["param"] in PARAMS, error
