"""Flags, environment, file: precedence, sizes, and mistakes that are told before anything loads."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

import kvjax
from kvjax.engine.config import ATTENTION_BACKENDS as ENGINE_BACKENDS
from kvjax.serve.__main__ import keep_compiled
from kvjax.serve.arguments import OPTIONS, build_parser, merge, parse
from kvjax.serve.config import ATTENTION_BACKENDS, ServeConfig
from kvjax.serve.loopback import is_loopback
from kvjax.store.sizes import memory, size

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "serve"


def configured(*arguments: str, **environment: str) -> ServeConfig:
    return merge(vars(build_parser().parse_args(arguments)), environment)


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "serve.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_defaults():
    assert configured() == ServeConfig()
    assert ServeConfig().host == "127.0.0.1"
    assert ServeConfig().port == 8000
    assert ServeConfig().shutdown_timeout == 30


def test_the_size_of_host_memory_is_auto_or_a_number():
    assert configured().host_cache_size == "auto"
    assert configured("--host-cache-size", "auto") == ServeConfig()
    assert configured("--host-cache-size", "0").host_cache_size == 0
    assert configured(KVJAX_HOST_CACHE_SIZE="1GiB").store_config(1 << 30).host_cache_auto is False
    assert ServeConfig().store_config(1 << 20).host_cache_auto is True


def test_attention_backends_are_the_engines_kernels():
    assert ATTENTION_BACKENDS == ENGINE_BACKENDS


def test_every_field_has_a_flag():
    assert {"model", *OPTIONS} == set(ServeConfig.__dataclass_fields__)


def test_all_flags(file):
    template = file("{{ messages }}", "chat.jinja")
    config = configured(
        *("org/model", "--served-model-name", "a", "b", "--host", "::1", "--port", "0", "--api-key", "k1"),
        *("--api-key", "k2", "--max-model-len", "32k", "--max-num-seqs", "8", "--max-num-queued-reqs", "0"),
        *("--tensor-parallel-size", "2", "--dtype", "float32", "--kv-cache-dtype", "bfloat16"),
        *("--gpu-memory-utilization", "0.9", "--seed", "7", "--chat-template", template),
        *("--shutdown-timeout", "2.5", "--log-level", "debug", "--compile-cache", "none"),
        *(
            "--method",
            "snapkv",
            "--token-budget",
            "1K",
            "--headroom",
            "64",
            "--when-full",
            "stop",
            "--group-layers",
            "4",
        ),
        *("--host-cache-size", "1.5GiB", "--attention-backend", "auto"),
    )
    assert config == ServeConfig(
        model="org/model",
        served_model_name=("a", "b"),
        host="::1",
        port=0,
        api_key=("k1", "k2"),
        max_model_len=32000,
        max_num_seqs=8,
        max_num_queued_reqs=0,
        tensor_parallel_size=2,
        dtype="float32",
        kv_cache_dtype="bfloat16",
        gpu_memory_utilization=0.9,
        attention_backend="auto",
        seed=7,
        chat_template="{{ messages }}",
        shutdown_timeout=2.5,
        log_level="debug",
        compile_cache="none",
        method="snapkv",
        token_budget=1024,
        headroom=64,
        when_full="stop",
        group_layers=4,
        host_cache_size=3 * 2**29,
    )
    assert configured("--budgets", template).budgets == template


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(file):
    path = file("port: 1\nseed: 1\nmax-num-seqs: 1\nmodel: from-file\n")
    environment = {"KVJAX_PORT": "2", "KVJAX_SEED": "2", "KVJAX_MODEL": "from-environment"}
    config = configured("--config", path, "--port", "3", **environment)
    assert (config.port, config.seed, config.max_num_seqs) == (3, 2, 1)
    assert config.model == "from-environment"
    assert configured("--config", path, "typed", **environment).model == "typed"
    assert configured(KVJAX_CONFIG=path).port == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32768", 32768),
        ("32k", 32000),
        ("32K", 32768),
        ("1.5k", 1500),
        ("1m", 10**6),
        ("2M", 2**21),
        ("1g", 10**9),
        ("1G", 2**30),
        ("131,072", 131072),
        ("131_072", 131072),
    ],
)
def test_sizes(text, value):
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "k", "-1", "1e3", "32 k", "32kb", "1.2345k", "nan", "0x10", "٣"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"not a (size|whole)"):
        size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1000", 1000),
        ("4GiB", 2**32),
        ("4G", 2**32),
        ("4GB", 4 * 10**9),
        ("4g", 4 * 10**9),
        ("512MiB", 2**29),
        ("0.5TiB", 2**39),
        ("3KiB", 3072),
    ],
)
def test_sizes_of_memory(text, value):
    assert memory(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "4 GiB", "4gib", "4Gib", "4PiB", "-1GiB", "0.3KiB", "inf"])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(ValueError, match=r"not a (size of memory: write 4GiB|whole number of bytes)"):
        memory(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-model-length: 4k", "did you mean 'max-model-len'"),
        ("token-budgets: 512", "did you mean 'token-budget'"),
        ("method: [snapkv]", "one value is wanted, not a list"),
        ("budgets: /nowhere", "budgets='/nowhere' cannot be read"),
        ("- port", "holds a list"),
        ("port: [1, 2]", "one value is wanted, not a list"),
        ("port: true", "one value is wanted, not a bool"),
        ("port: eighty", "--port='eighty' from"),
        ("port: 80.5", "not a whole number"),
        ("max-num-seqs: 0", "max_num_seqs=0 is outside [1, 4096]"),
        ("a: [", "is not YAML"),
        ("port: 1\nPORT: 2", "is no flag"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "twice"),
    ],
)
def test_a_file_that_is_wrong(file, text, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("]", r"\]")):
        configured("--config", file(text))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "port=70000 is outside [0, 65535]"),
        (["--port", "http"], "--port='http' from the command line: not a whole number"),
        (["--max-model-len", "lots"], "write 32768, 32k (32,000) or 32K (32,768)"),
        (["--gpu-memory-utilization", "90"], "gpu_memory_utilization=90.0 is outside"),
        (["--gpu-memory-utilization", "nan"], "gpu_memory_utilization=nan is outside"),
        (["--dtype", "int8"], "dtype='int8' is not one of auto, float32"),
        (["--attention-backend", "flash"], "attention_backend='flash' is not one of reference, auto, tpu, gpu"),
        (["--host", "0.0.0.0"], "Set --api-key or --api-key-file"),
        (["--host", "example.com"], "no API key is set"),
        (["--api-key", ""], "an api_key must be printable ASCII"),
        (["--api-key", "a b"], "an api_key must be printable ASCII"),
        (["--api-key-file", "/nowhere"], "api_key_file='/nowhere' cannot be read: No such file"),
        (["--chat-template", "/nowhere"], "chat_template='/nowhere' cannot be read"),
        (["--config", "/nowhere"], "config='/nowhere' cannot be read"),
        (["--served-model-name", "a", "MODEL"], "write MODEL before the flags"),
        (["--token-budget", "8"], "token_budget=8 is outside [16, "),
        (["--token-budget", "some"], "--token-budget='some' from the command line: not a size"),
        (["--method", "full", "--token-budget", "64"], "method='full' keeps everything and takes no token_budget: "),
        (["--method", "full", "--token-budget", "64"], "leave out --token-budget, or choose another --method"),
        (["--method", "full", "--budgets", __file__], "leave out --budgets, or choose another --method"),
        (["--method", "snapkv"], "method='snapkv' needs a budget: add --token-budget, as 256, or --budgets FILE"),
        (["--budgets", "/nowhere"], "budgets='/nowhere' cannot be read: No such file"),
        (["--budgets", "/"], "budgets='/' cannot be read: Is a directory"),
        (["--budgets", __file__, "--token-budget", "64"], "leave out --token-budget or --budgets"),
        (["--headroom", "0"], "room=0 is outside [1, "),
        (["--headroom", "plenty"], "--headroom='plenty' from the command line: not a size"),
        (["--when-full", "explode"], "when_full='explode' is not one of reselect, stop"),
        (["--group-layers", "9"], "group_layers=9 is outside [1, 8]"),
        (["--group-layers", "x"], "--group-layers='x' from the command line: not a whole number"),
        (["--host-cache-size", "plenty"], "--host-cache-size='plenty' from the command line: not a size of memory: "),
        (["--host-cache-size", "plenty"], "write 4GiB, 512MiB or 0"),
        (["--host-cache-size", "-1"], "write 4GiB, 512MiB or 0"),
        (["--disk-cache", "/tmp"], "a disk tier takes both a folder (--disk-cache) and a size (--disk-cache-size)"),
        (["--disk-cache-size", "1G"], "a disk tier takes both a folder"),
        (["--remote-cache", "redis://x", "--host-cache-size", "0"], "every tier pass through host memory"),
        (["--prefetch-policy", "x"], "prefetch_policy='x' must be one of timeout, best_effort, wait_complete"),
        (["--write-policy", "x"], "write_policy='x' must be one of write_through, write_through_selective, write_back"),
        (["--eviction-policy", "x"], "eviction_policy='x' must be one of lru, lfu, fifo, arc"),
        (["--disk-sync", "maybe"], "--disk-sync='maybe' from the command line: neither yes nor no"),
        (["--max-model", "3"], "unrecognized arguments"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_sentence(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        parse(arguments, {})
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_keys_come_from_a_file_too(file):
    path = file("# mine\nk1\n\n  k2  \n", "keys")
    assert configured("--api-key-file", path).api_key == ("k1", "k2")
    assert configured("--api-key", "k0", "--api-key-file", path).api_key == ("k0", "k1", "k2")
    assert configured("--host", "0.0.0.0", "--api-key-file", path).host == "0.0.0.0"
    assert configured(KVJAX_API_KEY_FILE=path).api_key == ("k1", "k2")
    with pytest.raises(ValueError, match="holds no key"):
        configured("--api-key-file", file("# none\n", "empty"))


def test_a_key_is_in_no_message_and_no_repr(file):
    assert "hunter" not in repr(configured("--api-key", "hunter2"))
    for wrong in ("hunter 2", "hunter2ä"):
        with pytest.raises(ValueError, match="api_key") as caught:
            configured("--api-key", wrong)
        assert "hunter" not in str(caught.value)
    with pytest.raises(ValueError, match="api-key") as caught:
        configured("--config", file("api-key: {hunter2: 1}"))
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback(host, local):
    assert is_loopback(host) is local


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path, file):
    config = configured("--config", str(path), KVJAX_API_KEY="k")
    assert config != ServeConfig(api_key=("k",))


def test_there_is_an_example():
    assert list(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "--max-num-queued-reqs"),
        (["--version"], 0, f"kvjax {kvjax.__version__}"),
        (["--port", "x"], 2, "--port='x'"),
        (["--attention-backend", "flash"], 2, "attention_backend='flash' is not one of reference, auto, tpu, gpu"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["--method", "full", "--token-budget", "64"], 2, "leave out --token-budget"),
        (["--budgets", "/nowhere"], 2, "budgets='/nowhere' cannot be read"),
    ],
)
def test_answers_without_importing_jax(arguments, status, said):
    """In a process of its own: what else a test run has imported says nothing."""
    code = (
        "import sys\nfrom kvjax.serve.__main__ import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as ended:\n"
        "    heavy = {'jax', 'numpy', 'fastapi', 'uvicorn', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n    raise\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 20  # generous: other processes may want the cores


def test_the_share_of_memory_is_set_before_jax_is_imported():
    """JAX refuses the older name of the variable beside the newer one."""
    code = (
        "import os, sys, types\n"
        "def run(config):\n"
        "    assert 'jax' not in sys.modules\n"
        "    print(sorted(f'{k}={v}' for k, v in os.environ.items() if k.endswith('MEM_FRACTION')))\n"
        "    return 0\n"
        "sys.modules['kvjax.serve.lifecycle'] = types.SimpleNamespace(run=run)\n"
        "from kvjax.serve.__main__ import main\n"
        "main(sys.argv[1:])\n"
    )
    environment = {
        "PATH": "",
        "KVJAX_COMPILE_CACHE": "none",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5",
        "PYTHONPATH": str(CONFIGS.parents[1]),
    }
    for arguments, said in (
        (["--gpu-memory-utilization", "0.9"], "['XLA_CLIENT_MEM_FRACTION=0.9000']"),
        ([], "['XLA_PYTHON_CLIENT_MEM_FRACTION=.5']"),
    ):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == said, done.stderr


def test_compiled_steps_are_kept_in_a_private_folder(tmp_path, monkeypatch, capsys):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    folder = tmp_path / "a" / "b"
    keep_compiled(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    keep_compiled(tmp_path / "other")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder), "the user's own choice stays"
    (tmp_path / "file").touch()
    keep_compiled(tmp_path / "file" / "x")
    assert "this start compiles anew" in capsys.readouterr().err
