#!/usr/bin/env bash
# Makes a virtual environment and installs Octavo into it, editable: setup.sh VENV base|dev
#
# Says in one line what is missing and how to get it. Progress is one moving line on a terminal; the whole log of pip
# is kept in VENV/install.log and shown when it fails. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

venv=$1
extras=$2
started=$SECONDS

say() { printf '%s\n' "$*" >&2; }
die() {
  say "octavo: $1"
  say "        $2"
  exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  local found
  found=$(command -v "${PYTHON:-python3}") || die "no Python found" "install Python 3.11 or newer, e.g.: sudo apt install python3 python3-venv"
  die "Python 3.11 or newer is needed; $found is $("$found" -V 2>&1 | tr -d '\n')" \
    "install a newer one and say which: make ${MAKECMDGOALS:-serve} PYTHON=/path/to/python3.12"
}

check_compiler() {
  if [[ -n ${CXX:-} ]]; then
    command -v "${CXX%% *}" >/dev/null || die "CXX is set to '$CXX', which is not there" "unset it, or name an installed C++ compiler"
    return
  fi
  local candidate
  for candidate in c++ g++ clang++; do
    command -v "$candidate" >/dev/null && return
  done
  local install='sudo apt install g++   (Fedora: sudo dnf install gcc-c++; macOS: xcode-select --install)'
  die "no C++ compiler found (looked for c++, g++, clang++); the kernels are compiled on this machine" "$install"
}

make_venv() {
  [[ -x $venv/bin/python ]] && is_new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
  local python
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$("$python" -V 2>&1) has no venv module" "install it: sudo apt install python3-venv (or make setup PYTHON=another python)"
  say "Making $venv with $("$python" -V 2>&1) ($python)"
  "$python" -m venv --clear "$venv"
}

# Shows the last line of what goes by, in place; the log keeps all of it.
show_progress() {
  local line
  while IFS= read -r line; do
    printf '%s\n' "$line" >>"$venv/install.log"
    [[ -t 2 ]] && printf '\r\033[K  %3ds  %.*s' $((SECONDS - started)) $((${COLUMNS:-80} - 9)) "$line" >&2
  done
  [[ -t 2 ]] && printf '\r\033[K' >&2
  return 0
}

# The PyPI wheel of torch for Linux carries gigabytes of CUDA; tests need the CPU one, where its index can be reached.
torch_index() {
  [[ $extras == dev && $(uname -s) == Linux ]] || return 0
  local index=https://download.pytorch.org/whl/cpu
  if "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=4)" 2>/dev/null; then
    printf -- '--extra-index-url %s' "$index"
  fi
}

install() {
  local target=. what="Octavo"
  [[ $extras == dev ]] && target='.[dev]' && what="Octavo and what its tests need"
  say "Installing $what into $venv (compiles the native kernels; log: $venv/install.log)"
  : >"$venv/install.log"
  # shellcheck disable=SC2046
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check $(torch_index) -e "$target" 2>&1 | show_progress; then
    tail -n 25 "$venv/install.log" >&2
    die "pip could not install Octavo; the lines above say why" "whole log: $venv/install.log; try again: make ${MAKECMDGOALS:-setup}"
  fi
  "$venv/bin/python" -m compileall -q octavo # as pip does with what is not editable: 0.1 s of each process less
}

check_compiler
make_venv
install
touch "$venv/.installed"
[[ $extras == dev ]] && touch "$venv/.installed-dev"
say "Installed in $((SECONDS - started)) s"
