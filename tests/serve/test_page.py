"""The page: what it may hold, what it reads of the API, and what it does in a real browser (marker `clients`)."""

import contextlib
import html.parser
import json
import re
import shutil
import threading
import time
import typing
from collections.abc import Callable

import pydantic
import pytest
from browser import Browser, Tab
from fake_engine import EOS, REPLY, FakeEngine
from live_server import LiveServer, wait_until

from kvjax.eval.tasks.surface import MINI
from kvjax.eval.tasks.words import ADJECTIVES, NOUNS, PLACES, VERBS
from kvjax.serve.errors import ErrorDetail, ErrorReply
from kvjax.serve.probes import read_page
from kvjax.serve.replies import (
    ChatChunkChoice,
    ChatCompletionChunk,
    CompletionChoice,
    CompletionChunk,
    Extension,
    RetainedReply,
    Second,
    SlotState,
    State,
    Tokenized,
    Usage,
)

PAGE = read_page() or ""
SCRIPT = "".join(re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL))
STYLE = "".join(re.findall(r"<style>(.*?)</style>", PAGE, re.DOTALL))


class Tags(html.parser.HTMLParser):
    """All tags of the page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


TAGS = Tags().found


class TestSelfContained:
    def test_it_names_no_other_place(self):
        assert not re.search(r"(?i)\b(https?|wss?|ftp):|[\"'(]//|@import|url\(", PAGE)

    def test_no_tag_loads_anything(self):
        loading = {"src", "srcset", "href", "action", "formaction", "poster", "data", "srcdoc", "background"}
        addresses = [value for _, attributes in TAGS for name, value in attributes.items() if name in loading]
        assert addresses == ["data:,"]  # no icon, so that the browser asks for none
        assert not {tag for tag, _ in TAGS} & {"base", "iframe", "object", "embed", "img", "audio", "video"}

    def test_one_script_and_one_style(self):
        """Then a policy may name both by their hashes; attributes would need more."""
        assert [tag for tag, _ in TAGS].count("script") == [tag for tag, _ in TAGS].count("style") == 1
        names = {name for _, attributes in TAGS for name in attributes}
        assert not [name for name in names if name == "style" or name.startswith("on")]

    def test_nothing_becomes_html_or_code(self):
        sinks = r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|createContextualFragment"
        assert not re.search(rf"{sinks}|\beval\(|\bFunction\(|setAttribute\(\"(on|style|src|href)|javascript:", SCRIPT)

    def test_the_key_goes_nowhere_but_the_session(self):
        assert not re.search(r"localStorage|document\.cookie|indexedDB|sendBeacon|postMessage|location\.", SCRIPT)
        assert set(re.findall(r"sessionStorage\.(\w+)\(\"(\w+)\"", SCRIPT)) == {("getItem", "key"), ("setItem", "key")}

    def test_it_knows_light_and_dark(self):
        colours = re.findall(r"--([\w-]+): #", STYLE)
        assert len(colours) == 2 * len(set(colours)), "each colour has a light and a dark value"
        assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) == set(colours)


class TestNames:
    """What the script calls things is what the page and the server call them."""

    def test_elements(self):
        identifiers = [attributes["id"] for _, attributes in TAGS if "id" in attributes]
        assert len(identifiers) == len(set(identifiers))
        quoted = re.findall(r"(?:\$|field)\(\"([\w-]+)\"\)", SCRIPT)
        assert len(quoted) > 50
        assert not set(quoted) - set(identifiers)

    def test_every_field_of_every_control_has_a_label(self):
        """A control's label is around it, points at it or is written on it."""
        pointed_at = {attributes["for"] for tag, attributes in TAGS if tag == "label" and "for" in attributes}
        inside = set(re.findall(r"<label>[^<]+<input id=\"([\w-]+)\"", PAGE))
        controls = [attributes for tag, attributes in TAGS if tag in ("input", "textarea")]
        assert len(controls) == 10
        for attributes in controls:
            assert "aria-label" in attributes or attributes["id"] in pointed_at | inside

    @pytest.mark.parametrize(
        ("variable", "models", "least"),
        [
            ("state", [State], 20),
            ("slot", [SlotState], 3),
            ("second", [Second], 1),
            ("tokenized", [Tokenized], 2),
            ("usage", [Usage], 3),
            ("chunk", [ChatCompletionChunk, CompletionChunk, ErrorReply], 4),
            ("choice", [ChatChunkChoice, CompletionChoice], 4),
            ("extension", [Extension], 2),
            ("retained", [RetainedReply], 3),
            ("detail", [ErrorDetail], 2),
        ],
    )
    def test_fields(self, variable, models, least):
        """Objects of the API have one name each in the script."""
        read = re.findall(rf"(?<![\w.]){variable}\??((?:\.\w+\??)+)", SCRIPT)
        paths = {path.replace("?", "").strip(".") for path in read}
        assert len(paths) >= least
        unknown = {path for path in paths if not any(has_field(model, path) for model in models)}
        assert not unknown, f"the script reads {variable}.{unknown}, which the server does not send"


def has_field(model: type[pydantic.BaseModel], path: str) -> bool:
    """Whether `a.b` is a field of a field of the model; of a list, `map` and `length` may be read."""
    name, _, rest = path.partition(".")
    if name not in model.model_fields:
        return False
    kind = model.model_fields[name].annotation
    if typing.get_origin(kind) is list:
        return rest in ("", "map", "length")
    nested = next((each for each in (kind, *typing.get_args(kind)) if hasattr(each, "model_fields")), None)
    return not rest or (nested is not None and has_field(nested, rest))


def test_fields_that_are_not_there_are_seen():
    assert has_field(State, "ttft_ms.p50")
    assert not has_field(State, "ttft_ms.p99")
    assert not has_field(State, "tokens")
    assert not has_field(Usage, "prompt_tokens_details.cached")


def test_the_needle_is_made_of_words_the_small_model_knows():
    for name, known in (("NOUNS", NOUNS), ("ADJECTIVES", ADJECTIVES), ("VERBS", VERBS), ("PLACES", PLACES)):
        [words] = re.findall(rf"const {name} = \"([a-z ]+)\"", SCRIPT)
        assert len(words.split()) >= 8
        assert not set(words.split()) - set(known)


def test_it_is_served_without_a_key(serve):
    server = serve(page=PAGE, api_keys=["secret"])
    answer = server.get("/")
    assert (answer.status_code, answer.text) == (200, PAGE)
    for directive in ("default-src 'none'", "script-src 'unsafe-inline'", "connect-src 'self'", "img-src data:"):
        assert directive in answer.headers["content-security-policy"]
    assert server.get("/state").status_code == 401


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None:
        pytest.skip(f"no Chromium is installed (looked for {', '.join(programs)})")
    started = Browser(program, str(tmp_path_factory.mktemp("profile")))
    yield started
    started.close()


@pytest.fixture
def visit(browser, serve):
    """`visit(FakeEngine(...), width=390, ...)`: a tab that shows a server's page, and the server."""
    with contextlib.ExitStack() as stack:

        def start(engine: FakeEngine | None = None, width: int = 1280, **options) -> tuple[Tab, LiveServer]:
            server = serve(engine, page=PAGE, **options)
            tab = Tab(browser, server.url, width)
            stack.callback(tab.close)
            return tab, server

        yield start


def says(text: str) -> Callable[[list[int], object], list[int]]:
    return lambda prompt, params: [*text.encode(), EOS]


@pytest.mark.clients
class TestInABrowser:
    def test_a_chat_streams(self, visit):
        tab, server = visit(FakeEngine(token_seconds=0.05))
        tab.type("#message", "Hi there")
        tab.press("Enter")
        tab.until("document.querySelector('#log .said:not(.user)')?.textContent.length > 2")
        early = tab.run("document.querySelector('#log .said:not(.user)').textContent")
        assert REPLY.startswith(early)
        assert len(early) < len(REPLY)
        tab.idle()
        assert tab.run("document.querySelector('#log .said:not(.user)').textContent") == REPLY
        figures = ", ".join(tab.text("#log .figures").splitlines())
        told = r"TTFT \d\.\d\d s, (\d+\.\d) tokens/s, prompt 27, cached 0, generated 20, ended by itself"
        assert 5 < float(re.fullmatch(told, figures)[1]) < 21  # one in 0.05 s, or slower on a busy machine
        assert tab.run("document.querySelector('#message').value") == ""

        tab.type("#message", "And again")
        tab.press("Enter")
        tab.until("document.querySelectorAll('#log article').length === 4")
        tab.idle()
        prompt = server.engine.tokenizer.decode(server.engine.asked[-1][0])
        assert prompt == f"<user>Hi there\n<assistant>{REPLY}\n<user>And again\n<assistant>"
        assert all(url.startswith((server.url, "data:")) for url in tab.requests())
        assert tab.complaints() == []

    def test_what_the_model_writes_is_text(self, visit):
        attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;"
        tab, _ = visit(FakeEngine(script=says(attack)))
        for box, answer in (("#message", "#log .said:not(.user)"), ("#prompt", "#answers .said")):
            tab.run("document.title = 'safe'")
            tab.type(box, attack)
            tab.click("#send")
            tab.until(f"document.querySelector('{answer}')?.textContent.length === {len(attack)}")
            tab.idle()
            assert tab.run(f"document.querySelector('{answer}').textContent") == attack
            assert tab.run("document.images.length + document.scripts.length") == 1
            assert tab.run("document.title") == "safe"
            tab.click("#tab-completion")
        assert tab.complaints() == []

    def test_enter_shift_enter_and_escape(self, visit):
        tab, server = visit(FakeEngine(token_seconds=0.2))
        tab.type("#message", "one")
        tab.press("Enter", modifiers=8)
        tab.type("#message", "two")
        assert tab.run("document.querySelector('#message').value") == "one\ntwo"
        assert server.engine.asked == []
        tab.press("Enter")
        tab.until("document.querySelector('#log .said:not(.user)')?.textContent.length > 0")
        assert not tab.run("document.querySelector('#stop').disabled")
        tab.press("Escape")
        tab.idle()
        wait_until(lambda: server.engine.cancelled)
        assert "Stopped." in tab.text("#log")
        assert "generated" in tab.text("#log .figures")

    def test_parameters_reach_the_engine(self, visit):
        tab, server = visit()
        tab.click("#tab-completion")
        given = {"max-tokens": "7", "temperature": "0.5", "top-p": "0.9", "seed": "3", "stop-strings": r"END|\n"}
        for name, value in given.items():
            tab.run(f"document.getElementById('{name}').value = {json.dumps(value)}")
        tab.type("#prompt", "Once")
        tab.press("Enter", modifiers=2)
        tab.until("document.querySelector('#answers .figures')?.innerText.includes('max tokens')")
        [(prompt, params, _, _)] = server.engine.asked
        assert server.engine.tokenizer.decode(prompt) == "Once"
        assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (7, 0.5, 0.9, 3)
        assert params.stop == ("END", "\n")
        tab.run("document.getElementById('temperature').value = -1")
        tab.click("#send")
        assert tab.run("document.activeElement.id") == "temperature"
        assert len(server.engine.asked) == 1

    def test_the_system_prompt_comes_first(self, visit):
        tab, server = visit()
        tab.run("document.querySelector('#system').value = 'Be brief'")
        tab.type("#message", "Hi")
        tab.click("#send")
        wait_until(lambda: server.engine.asked)
        prompt = server.engine.tokenizer.decode(server.engine.asked[0][0])
        assert prompt == "<system>Be brief\n<user>Hi\n<assistant>"
        tab.idle()
        tab.click("#clear")
        assert tab.run("document.querySelector('#log').childElementCount") == 0

    def test_tokens_of_the_prompt_are_counted(self, visit):
        tab, _ = visit()
        tab.click("#tab-completion")
        tab.type("#prompt", "four")
        tab.until("document.querySelector('#count').innerText === 'Prompt: 5 of 512 tokens'")
        tab.type("#prompt", "x" * 495)
        tab.until("document.querySelector('#count').innerText.includes('no room for max tokens')")

    @pytest.mark.parametrize("found", [True, False])
    def test_a_needle(self, visit, found):
        def recall(prompt: list[int], params: object) -> list[int]:
            text = bytes(token for token in prompt if token < 256).decode()
            [value] = re.findall(r"The code for \w+ is (\d{4})\.", text)
            return [*f" {value if found else 'lost'}.".encode(), EOS]

        tab, server = visit(FakeEngine(script=recall, max_model_len=4096))
        tab.until("document.querySelector('#phase').innerText === 'ready'")
        tab.click("#needle")
        tab.until("document.querySelector('.found, .missed')")
        [(prompt, params, _, _)] = server.engine.asked
        assert 0.72 < len(prompt) / 4096 < 0.78
        assert params.temperature == 0
        text = server.engine.tokenizer.decode(prompt)
        [(key, value)] = re.findall(r"The code for (\w+) is (\d{4})\.", text)
        question = MINI.ask({key: (value,)}, "number")
        assert MINI.needle(key, value, "number") in text
        assert text.endswith(f".\n{question.question}{question.answer_prefix}")
        verdict = tab.text(".found" if found else ".missed")
        assert re.fullmatch(rf". (Found|Missed) {value}, hidden \d+% into {len(prompt):,} tokens\.", verdict)
        share = text.index(MINI.needle(key, value, "number")) / len(text)
        assert abs(share - int(re.findall(r"(\d+)%", verdict)[0]) / 100) < 0.04

    def test_it_asks_for_the_key(self, visit):
        tab, _ = visit(api_keys=["right"])
        tab.until("document.querySelector('#phase').innerText === 'locked'")
        tab.until("document.activeElement.id === 'key'")
        tab.type("#key", "wrong")
        tab.press("Enter")
        tab.until("document.querySelector('#key-note').innerText.includes('not accepted')")
        tab.type("#key", "right")
        tab.press("Enter")
        tab.until("document.querySelector('#phase').innerText === 'ready'")
        assert tab.run("document.querySelector('#key-form').hidden")
        assert tab.run("Object.keys(localStorage).length") == 0
        assert tab.run("document.cookie") == ""
        tab.type("#message", "Hi")
        tab.press("Enter")
        tab.until(f"document.querySelector('#log').innerText.includes({json.dumps(REPLY)})")
        assert not [url for url in tab.requests() if "right" in url]

    def test_errors_are_the_servers_words(self, visit):
        tab, server = visit(FakeEngine(fail_after=3))
        tab.type("#message", "Hi")
        tab.press("Enter")
        tab.until("document.querySelector('#log .error')")
        assert tab.text("#log .error") == "the device ran out of something"
        assert tab.run("document.querySelector('#log .said:not(.user)').textContent") == REPLY[:3]
        tab.click("#tab-completion")
        tab.type("#prompt", "x" * 600)
        tab.click("#send")
        tab.until("document.querySelector('#answers .error')")
        body = {"prompt": "x" * 600, "max_tokens": 128}
        assert tab.text("#answers .error") == server.post("/v1/completions", body).json()["error"]["message"]

    def test_a_refused_message_may_be_sent_again(self, visit):
        engine = FakeEngine()
        tab, server = visit(engine)
        tab.until("document.querySelector('#phase').innerText === 'ready'")
        engine.phase = "draining"
        tab.type("#message", "Hi")
        tab.press("Enter")
        tab.until("document.querySelector('#log .error')?.innerText.includes('shutting down')")
        tab.until("document.querySelector('#phase').innerText === 'draining'")
        assert tab.run("document.querySelector('#message').value") == "Hi"
        engine.phase = "ready"
        tab.press("Enter")
        tab.until(f"document.querySelector('#log').innerText.includes({json.dumps(REPLY)})")
        assert server.engine.tokenizer.decode(engine.asked[0][0]) == "<user>Hi\n<assistant>"

    def test_a_model_that_cannot_chat(self, visit):
        tab, server = visit(FakeEngine(chat_template=False))
        tab.until("document.querySelector('#tab-completion').ariaSelected === 'true'")
        tab.run("document.querySelector('#tab-chat').focus()")
        tab.press("ArrowRight")
        tab.click("#tab-chat")
        tab.until("document.querySelector('#no-chat').offsetHeight > 0")
        body = {"messages": [{"role": "user", "content": "?"}]}
        assert tab.text("#no-chat") == server.post("/tokenize", body).json()["error"]["message"]
        assert tab.run("document.querySelector('#message').offsetHeight") == 0

    def test_the_live_state(self, visit):
        engine = FakeEngine(slots=2)
        engine.hold = threading.Event()
        tab, server = visit(engine)
        tab.until("document.querySelectorAll('#slots [data-state=free]').length === 2")
        body = {"prompt": "x" * 30, "max_tokens": 5, "n": 3, "stream": True}
        asking = threading.Thread(target=server.post, args=("/v1/completions", body))
        asking.start()
        tab.until("document.querySelectorAll('#slots [data-state=prefill]').length === 2")
        assert tab.text("#slots li") == "prefill 0%\n31 tokens"
        assert tab.text("#busy") == "2 of 2 busy"
        assert tab.text("#figures").splitlines()[:2] == ["Waiting in the queue", "1"]
        engine.hold.set()
        asking.join()
        tab.until("document.querySelector('#figures').innerText.includes('Requests finished\\n3')")
        tab.until("parseFloat(document.querySelector('#rate').innerText) > 0")
        assert len(tab.run("document.querySelector('#sparkline polyline').getAttribute('points')").split()) >= 1
        assert tab.text("#model") == "fake"
        assert tab.text("#context") == "512 tokens of context"

    def test_the_tiers_of_stored_kv(self, visit):
        tab, _ = visit()
        tab.until("document.querySelectorAll('#tiers li').length === 3")
        assert tab.run("[...document.querySelectorAll('#tiers li')].map((tier) => tier.textContent)") == [
            "host3 MiB of 8 MiB1,280 tokens found, 3 blocks written",
            "disk3 MiB of 8 MiB512 tokens found, 0 blocks written, 1 error",
            "remotesize unknown0 tokens found, 0 blocks written, 4 errors, left alone for now",
        ]
        assert (
            tab.run("[...document.querySelectorAll('#tiers meter')].map((bar) => bar.value / bar.max)") == [3 / 8] * 2
        )
        assert tab.run("document.querySelectorAll('#tiers .warning').length") == 2

    def test_a_hidden_page_asks_nothing(self, visit):
        tab, server = visit()
        polls = lambda: tab.requests().count(f"{server.url}/state")  # noqa: E731
        wait_until(lambda: polls() >= 2)
        hide = "Object.defineProperty(document, 'hidden', {get: () => %s, configurable: true});"
        changed = "document.dispatchEvent(new Event('visibilitychange'));"
        tab.run(hide % "true" + changed)
        time.sleep(0.3)  # one may be under way
        before = polls()
        time.sleep(2.5)
        assert polls() == before
        tab.run(hide % "false" + changed)
        wait_until(lambda: polls() >= before + 2)

    def test_a_server_that_is_gone(self, visit):
        tab, server = visit()
        tab.until("document.querySelector('#phase').innerText === 'ready'")
        server.stop()
        tab.until("document.querySelector('#phase').innerText === 'unreachable'")
        tab.type("#message", "Hi")
        tab.press("Enter")
        tab.until("document.querySelector('#log .error')?.innerText === 'the server does not answer'")

    @pytest.mark.parametrize("path", ["chat", "completion"])
    def test_what_was_kept(self, visit, path):
        engine = FakeEngine()
        engine.view_fraction = 0.25
        tab, _ = visit(engine)
        tab.click(f"#tab-{path}")
        tab.click("#return-kept")
        tab.type("#message" if path == "chat" else "#prompt", "x" * 300)
        tab.click("#send")
        tab.until("document.querySelector('.kept canvas')")
        tab.idle()
        [(prompt, params, _, _)] = engine.asked
        assert params.retained
        count = len(prompt)
        assert tab.run("[document.querySelector('canvas').width, document.querySelector('canvas').height]") == [256, 2]
        # of the fake engine's two layers one keeps the last tokens, the other half of each
        shades = tab.run(
            "(() => { const pen = document.querySelector('canvas').getContext('2d');"
            "return [[0, 0], [255, 0], [0, 1], [255, 1]].map(([x, y]) => pen.getImageData(x, y, 1, 1).data[3]); })()"
        )
        assert shades[:2] == [0, 255]
        assert shades[2] == shades[3] == pytest.approx(128, abs=1)
        told = tab.run("document.querySelector('canvas').getAttribute('aria-label')")
        assert told.endswith(f"layer 1 {float(f'{800 / count:.3g}'):g}%, layer 2 50%")
        said = " ".join(tab.text(".kept").split())
        for part in ("layer 1", f"position in the prompt ({count} tokens)", f"{count - 1}", "kept 0%", "100%"):
            assert part in said
        assert "the views keep 25% of the full cache's bytes" in said
        assert "Method\nrocketkv, 64 tokens" in tab.text("#figures")
        tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        colour = "[...document.querySelector('canvas').getContext('2d').getImageData(255, 0, 1, 1).data]"
        tab.until(f"{colour}.join() === '108,195,204,255'")
        tab.click("#return-kept")
        tab.click("#clear")
        tab.type("#message" if path == "chat" else "#prompt", "y")
        tab.click("#send")
        wait_until(lambda: len(engine.asked) == 2)
        tab.idle()
        assert not engine.asked[1][1].retained
        assert tab.run("document.querySelector('canvas')") is None
        # the test itself reads the canvas so often that the browser remarks on it
        assert [text for text in tab.complaints() if not text.startswith("Canvas2D: ")] == []

    @pytest.mark.parametrize("width", [390, 1280])
    def test_it_fits_the_screen(self, visit, width):
        tab, _ = visit(FakeEngine(slots=12, script=says("W" * 300)), width=width)
        tab.type("#message", "x" * 300)
        tab.click("#send")
        tab.until("document.querySelector('#log .said:not(.user)')?.textContent.length === 128")
        tab.until("document.querySelectorAll('#slots li').length === 12")
        assert tab.run("innerWidth") == width
        assert tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
