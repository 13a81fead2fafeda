#!/usr/bin/env bash
# Set everything up and run the tests, on all cores. Arguments go to pytest: scripts/test.sh -k awq
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh report test lint
exec .venv/bin/python -m pytest --numprocesses auto "$@"
