#!/usr/bin/env bash
# Print the Python that this checkout works with:
#   1. $KVBM_PYTHON, when set;
#   2. the active virtual environment's (venv or conda), when vLLM is installed there;
#   3. .venv's, which scripts/setup.sh makes.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
has_vllm='import importlib.util as u, sys; s = u.find_spec("vllm"); sys.exit(not (s and s.origin))'

if [[ -n ${KVBM_PYTHON:-} ]]; then
    command -v "$KVBM_PYTHON"
    exit
fi
for env in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [[ -n $env && ! $env -ef $root/.venv && -x $env/bin/python ]] &&
        "$env/bin/python" -c "$has_vllm" 2>/dev/null; then
        echo "$env/bin/python"
        exit
    fi
done
echo "$root/.venv/bin/python"
