# shellcheck shell=bash
# One environment for the launchers and the tests. Source this file, then call `setup_env`.
#
# setup_env            makes or reuses the environment and sets PYTHON (its interpreter) and REFRACTOR_ROOT.
# refractor ARGS...    runs the command line in that environment; works from any directory.
#
# REFRACTOR_PYTHON     interpreter that makes the environment (default: the first of python3, python3.13 ... python3.11
#                      that is 3.11 or newer)
# REFRACTOR_VENV       an existing environment to use as it is: nothing is installed, missing packages are named
# REFRACTOR_TORCH      what is installed first (default: torch==2.13.0); another build or version of torch goes here
# REFRACTOR_EXTRAS     extras of the project to install (default: dev)

REFRACTOR_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# The working tree counts, whether or not the environment holds an editable install of it.
export PYTHONPATH="$REFRACTOR_ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Idle OpenMP threads sleep instead of spinning: on cores shared with other work a spinning thread keeps the core from
# the one it waits for (measured: steps 30 times slower, see specification/lab_log.md).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

_env_say() { printf '[setup] %s\n' "$*" >&2; }

_env_die() { printf 'error: %s\n' "$*" >&2; exit 5; }

_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the interpreter to build with, or ends with one sentence.
_find_python() {
    local candidate
    if [[ -n ${REFRACTOR_PYTHON:-} ]]; then
        _is_new_enough "$REFRACTOR_PYTHON" ||
            _env_die "REFRACTOR_PYTHON=$REFRACTOR_PYTHON is not a working Python 3.11 or newer; point it at one."
        printf '%s\n' "$REFRACTOR_PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 && _is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    _env_die "Python 3.11 or newer is needed and none is on the PATH (python3 is $(python3 -V 2>/dev/null || echo absent)); install one or set REFRACTOR_PYTHON=/path/to/python3.11."
}

# Everything that decides what an install makes; a changed value means: install again.
_env_stamp() {
    {
        cat "$REFRACTOR_ROOT/pyproject.toml"
        "$1" -c 'import sys; print(sys.version, sys.base_prefix)'
        printf '%s\n' "$REFRACTOR_ROOT" "$torch" "$extras"
    } | sha256sum | cut -d' ' -f1
}

_env_install() {
    local venv="$1" base="$2" started=$SECONDS
    if [[ ! -x $venv/bin/python ]] || ! _is_new_enough "$venv/bin/python"; then
        _env_say "making $venv with $("$base" -V)"
        "$base" -m venv --clear "$venv" ||
            _env_die "$base cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt-get install python3-venv) or set REFRACTOR_VENV to an environment you made."
    fi
    _env_say "installing $torch (first, so that nothing later picks another build)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" ||
        _env_die "pip could not install $torch; see its message above, then run the same command again, or name a build that fits in REFRACTOR_TORCH."
    _env_say "installing refractor[$extras] from $REFRACTOR_ROOT/pyproject.toml"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" -e "${REFRACTOR_ROOT}[$extras]" ||
        _env_die "pip could not install the project; see its message above, then run the same command again."
    _env_say "installed in $((SECONDS - started)) s"
}

# An environment that somebody else made: used, checked, never changed.
_env_reuse() {
    local missing
    [[ -x $1/bin/python ]] || _env_die "REFRACTOR_VENV=$1 has no bin/python; point it at a virtual environment or unset it."
    _is_new_enough "$1/bin/python" || _env_die "REFRACTOR_VENV=$1 has a Python older than 3.11; point it at a newer environment or unset it."
    missing="$("$1/bin/python" - "$REFRACTOR_ROOT/pyproject.toml" <<'PY'
import re, sys, tomllib
from importlib import metadata

missing = []
for line in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    name = re.match(r"[A-Za-z0-9._-]+", line)[0]
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(name)
print(" ".join(missing))
PY
)"
    [[ -z $missing ]] || _env_die "REFRACTOR_VENV=$1 lacks $missing; install them there or unset REFRACTOR_VENV."
}

setup_env() {
    local torch="${REFRACTOR_TORCH:-torch==2.13.0}" extras="${REFRACTOR_EXTRAS:-dev}"
    local venv="$REFRACTOR_ROOT/.venv" base stamp
    if [[ -n ${REFRACTOR_VENV:-} ]]; then
        venv="$(cd "$REFRACTOR_VENV" 2>/dev/null && pwd)" || _env_die "REFRACTOR_VENV=$REFRACTOR_VENV does not exist; make it or unset it."
        _env_reuse "$venv"
    else
        base="$(_find_python)" || exit $?
        stamp="$(_env_stamp "$base")"
        if [[ "$(cat "$venv/.refractor-stamp" 2>/dev/null)" != "$stamp" ]]; then
            (
                # Two launchers at once: the second waits, then finds the stamp.
                if command -v flock >/dev/null 2>&1; then flock 9; fi
                if [[ "$(cat "$venv/.refractor-stamp" 2>/dev/null)" != "$stamp" ]]; then
                    _env_install "$venv" "$base"
                    printf '%s\n' "$stamp" >"$venv/.refractor-stamp"
                fi
            ) 9>"$REFRACTOR_ROOT/.venv.lock" || exit $?
        fi
    fi
    PYTHON="$venv/bin/python"
    export PYTHON
    export PATH="$venv/bin:$PATH"
}

refractor() { "$PYTHON" -m refractor_megatron.cli "$@"; }
