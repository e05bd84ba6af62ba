"""The real life cycle with a fake engine: `python serve_fake.py '{"options": of FakeEngine}' [flags]`."""

import json
import pathlib
import sys
import threading
import time
import types


def build(config):
    from fake_engine import FakeEngine

    options = json.loads(sys.argv[1])
    start_seconds, fails = options.pop("start_seconds", 0), options.pop("fails", None)
    engine = FakeEngine(phase="loading", **options)
    engine.start_seconds = start_seconds
    if fails == "for memory":
        engine.failure = MemoryError("the weights need 9 GiB; 4 GiB are free")
    if fails == "at start":
        engine.failure = RuntimeError("the device is gone")
    if fails == "when asked":

        def die():
            while not engine.asked:
                time.sleep(0.01)
            engine.phase, engine.failure = "failed", RuntimeError("the device is gone")

        threading.Thread(target=die, daemon=True).start()
    print("building", flush=True)
    return engine, ("fake",)


def main() -> int:
    # The fake engine needs the request types of kvjax.engine but not what that package imports: jax takes seconds.
    package = sys.modules["kvjax.engine"] = types.ModuleType("kvjax.engine")
    package.__path__ = [str(pathlib.Path(__file__).parents[2] / "kvjax" / "engine")]

    from kvjax.serve.arguments import parse
    from kvjax.serve.lifecycle import run

    return run(parse(["--port", "0", *sys.argv[2:]], {}), build)


if __name__ == "__main__":
    sys.exit(main())
