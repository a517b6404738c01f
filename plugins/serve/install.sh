#!/bin/sh
# Creates a virtual environment that contains the server, using only wheels: install.sh FOLDER [INDEX OF PYTORCH'S BUILDS]
set -eu
source=$(cd "$(dirname "$0")/../.." && pwd)
python3 -m venv "$1"
pip() {
  "$folder/bin/python" -m pip install -q --no-cache-dir --disable-pip-version-check --only-binary :all: -c "$source/constraints.txt" "$@"
}
folder=$1
pip torch ${2:+--index-url "$2"}
pip "$source" "$source/plugins/serve"
