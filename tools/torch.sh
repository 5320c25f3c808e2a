#!/usr/bin/env bash
# Makes target/venv-torch: our Python package beside the system's PyTorch (Debian's python3-torch, for the CPU alone), with what the
# tests need. Exits 3 where there is no such PyTorch.
set -euo pipefail
cd "$(dirname "$0")/.."

python=/usr/bin/python3
venv=target/venv-torch

if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "there is no PyTorch for $python: on Debian, apt install python3-torch" >&2
    exit 3
fi
want=$({ "$python" --version; pwd; cat python/pyproject.toml tools/torch.sh; } | sha256sum)
if [ "$(cat $venv/.made 2>/dev/null)" != "$want" ]; then
    echo "making the Python environment with PyTorch in $venv" >&2
    rm -rf $venv
    "$python" -m venv --system-site-packages $venv
    $venv/bin/pip install --quiet --disable-pip-version-check --editable ./python 'pytest>=8' 'safetensors>=0.4' jsonschema-rs >&2
    printf '%s' "$want" >$venv/.made
fi
