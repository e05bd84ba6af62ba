"""From a clean clone to the first streamed token: `make serve` in a new folder, with the seconds of each phase.

    python -m benchmarks.serving.first_token

Needs nothing but Python's standard library and git. Packages that pip or uv have cached are not downloaded again; on
a machine that has none, the phase "install" is the download.
"""

import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import threading
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 300.0
PROMPT = "The code for apple is 4719. The code for tiger is 2036.\nWhat is the code for apple?\nThe code for apple is"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def first_token(port: int) -> str:
    """The text of the first event of a streamed completion."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
    line = next(line for line in response if line.startswith(b"data: {"))
    connection.close()
    return json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def main() -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, f"{folder}/kvjax"], check=True)
        print(f"{time.monotonic() - began:7.2f} s  cloned", flush=True)
        arguments = f"ARGS=--port {port} --compile-cache none"
        process = subprocess.Popen(
            ["make", "serve", arguments],
            cwd=f"{folder}/kvjax",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

        def show() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if "==>" in line or "INFO" in line:
                    print(f"{time.monotonic() - began:7.2f} s  {line.rstrip()}", flush=True)

        threading.Thread(target=show, daemon=True).start()
        try:
            while not ready(port):
                if process.poll() is not None or time.monotonic() - began > PATIENCE:
                    raise SystemExit("the server did not start")
                time.sleep(0.05)
            text = first_token(port)
            print(f"{time.monotonic() - began:7.2f} s  first streamed token: {text!r}")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


if __name__ == "__main__":
    main()
