#!/bin/sh
# Makes build/packaging, the environment with what builds our packages (tools.txt); nothing, if it is there.
set -eu
cd "$(dirname "$0")/.."
stamp=build/packaging/tools.txt
cmp -s packaging/tools.txt "$stamp" && exit 0
rm -rf build/packaging
"${PYTHON:-python3}" -m venv build/packaging
build/packaging/bin/python -m pip install --quiet --disable-pip-version-check --requirement packaging/tools.txt
cp packaging/tools.txt "$stamp"
