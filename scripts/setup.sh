#!/usr/bin/env bash
# Create .venv and install the package into it, with the versions of constraints.txt.
# Usage: scripts/setup.sh [EXTRA,...]   The second time it sees that nothing has changed and does nothing.
# PYTHON names the interpreter to build on (3.11 or newer; default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
wanted="$PWD $(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)"
stamp=.venv/.setup-${extras:-base}
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "scripts/setup.sh: $python is not Python 3.11 or newer; name one: PYTHON=python3.11 $0" >&2
    exit 1
fi
echo "Setting up .venv with $("$python" --version) (the first time this downloads PyTorch)"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
echo "$wanted" >.venv/.setup-base # every extra includes the package itself
