#!/usr/bin/env bash
# The test command.
#
#   bash tests/run.sh              lint, types, floors, shell, then every test
#   bash tests/run.sh fast         ruff and the tests that are neither slow nor multi-rank (at most 90 s)
#   bash tests/run.sh lint         only the checks that run no test
#   bash tests/run.sh ARGS...      pytest with these arguments, e.g. tests/unit/config -k unknown
#
# Makes or reuses the launchers' environment (see launch/setup_env.sh; REFRACTOR_VENV names another one).
set -uo pipefail

case "${1:-}" in
-h | --help)
    sed -n '2,9{s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
esac

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=launch/setup_env.sh
source "$here/../launch/setup_env.sh"
setup_env
cd "$REFRACTOR_ROOT" || exit 1

# One thread per process: results do not depend on the machine, and two workers do not fight for two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export WANDB_MODE="${WANDB_MODE:-offline}"
workers="${REFRACTOR_TEST_WORKERS:-2}"
failed=()

# check NAME COMMAND...: runs it, says how long it took, remembers a failure and goes on.
check() {
    local name="$1" started=$SECONDS
    shift
    if "$@"; then
        printf '[tests] %-18s ok      %3d s\n' "$name" $((SECONDS - started))
    else
        printf '[tests] %-18s FAILED  %3d s   %s\n' "$name" $((SECONDS - started)) "$*"
        failed+=("$name")
    fi
}

finish() {
    if ((${#failed[@]})); then
        printf '[tests] failed: %s\n' "${failed[*]}"
        exit 1
    fi
    printf '[tests] all passed in %d s\n' "$SECONDS"
}

lint_light() {
    check "ruff check" "$PYTHON" -m ruff check --quiet .
    check "ruff format" "$PYTHON" -m ruff format --check --quiet .
}

lint_all() {
    lint_light
    check "mypy" "$PYTHON" -m mypy
    check "import floors" "$(dirname "$PYTHON")/lint-imports" --no-logo
    check "shellcheck" "$(dirname "$PYTHON")/shellcheck" -x launch/*.sh tests/run.sh .ci/run
}

# In the order of collection, which begins with the slowest files (tests/conftest.py): xdist's own, by the number of
# tests, leaves them to the end and one worker idle.
pytest_parallel() { "$PYTHON" -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder "$@"; }

case "${1:-}" in
"")
    lint_all
    check "tests" pytest_parallel -m "not gloo"
    # Multi-rank tests start their own processes, so they come one after another.
    check "multi-rank tests" "$PYTHON" -m pytest -q -m gloo
    finish
    ;;
fast)
    shift
    lint_light
    check "fast tests" pytest_parallel -m "not slow and not gloo" "$@"
    finish
    ;;
lint)
    lint_all
    finish
    ;;
*)
    exec "$PYTHON" -m pytest "$@"
    ;;
esac
