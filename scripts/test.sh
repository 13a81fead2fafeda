#!/usr/bin/env bash
# Set everything up and run the tests, on all cores. Arguments go to pytest: scripts/test.sh -k awq
# Which lines and branches of the package the tests run (compiled kernels are not traced): scripts/test.sh --cov
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh report test lint
exec .venv/bin/python -m pytest --numprocesses auto "$@"
