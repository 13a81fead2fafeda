#!/usr/bin/env bash
# Create .venv and install the package into it, with the versions of constraints.txt.
# Usage: scripts/setup.sh [report | GROUP ...]   `report` is the package's extra, GROUPs are pyproject.toml's.
# The second time it sees that nothing has changed and does nothing. From the environment:
#   PYTHON       the interpreter to build on (3.11 or newer; default python3)
#   VENV         the directory (default .venv), CONSTRAINTS the file of versions (default constraints.txt)
#   PIP_...      pip's own settings. PyTorch comes with several gigabytes of CUDA libraries unless a build without
#                them is offered: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}
extra=
groups=()
for name in "$@"; do
    if [[ $name == report ]]; then extra='[report]'; else groups+=(--group "$name"); fi
done

# One stamp for each name: what is in it was installed from these files.
wanted="$PWD $(cat pyproject.toml "$constraints" scripts/setup.sh | cksum)"
current() {
    local name
    for name in base "$@"; do
        [[ -f $venv/.setup-$name && $(<"$venv/.setup-$name") == "$wanted" ]] || return 1
    done
}
if [[ -x $venv/bin/python ]] && current "$@"; then
    exit 0
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "scripts/setup.sh: $python is not Python 3.11 or newer; name one: PYTHON=python3.11 $0" >&2
    exit 1
fi
echo "Setting up $venv with $("$python" --version) (the first time this downloads PyTorch)"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv"
fi
pip() {
    # setuptools warns that all of the checkout can be imported: so it is meant.
    PYTHONWARNINGS=ignore:Editable "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
# Python 3.11 and 3.12 bring a pip that does not know groups.
too_old='import pip, sys; sys.exit([int(part) for part in pip.__version__.split(".")[:2]] >= [25, 1])'
if "$venv/bin/python" -c "$too_old"; then pip --upgrade 'pip>=25.1'; fi
pip --constraint "$constraints" --editable ".$extra" "${groups[@]}"
for name in base "$@"; do
    echo "$wanted" >"$venv/.setup-$name"
done
