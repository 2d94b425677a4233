# Sourced by reproduce, test and docs, which first go to the project's folder: makes
# .venv and installs the project with the extras in $extras, unless that was done.
# shellcheck shell=sh disable=SC2154

python=${PYTHON:-python3}
fail() {
    echo "error: $1" >&2
    exit 2
}

command -v "$python" >/dev/null 2>&1 ||
    fail "$python: not found; install Python 3.11 or newer, or name it: PYTHON=… $0"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; install Python 3.11 or newer, or name it: PYTHON=… $0"

if ! [ -x .venv/bin/python ]; then
    echo "making .venv" >&2
    "$python" -m venv .venv ||
        fail "cannot make .venv; install Python's venv module (Debian: apt install python3-venv), and delete .venv"
fi

# What was installed is remembered by what decides it, so that a change installs again;
# so does a copy of the clone, whose .venv would run the original's code.
wanted="$PWD $extras $(cksum pyproject.toml constraints.txt)"
stamp=".venv/installed-${extras:-plain}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing ae_jax${extras:+ with $extras} (once, a minute or two)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extras:+[$extras]}" ||
        fail "pip could not install; look above, and give the same command again"
    echo "$wanted" >"$stamp"
fi
