#!/usr/bin/env bash
# Trains a model on this machine, from nothing: environment, data, training, evaluation, report.
#
#   bash launch/pretrain_local.sh [FLAGS] [-- HYDRA_OVERRIDES]
#
#   --preset NAME   model and training preset: nano, pilot, small, ... (default: pilot)
#   --steps N       optimiser steps (default: the preset's)
#   --corpus PATH   a folder or file of .txt .md .jsonl .jsonl.gz .jsonl.zst .parquet
#                   (default: Debian documentation packages, else the text of the installed Python packages)
#   --ranks N       processes on this machine (default: 1); how they are used is set by overrides, e.g. parallel.tp=2
#   --out DIR       run folder (default: runs/NAME in the repository)
#   --help          this text
#
# Examples:
#   bash launch/pretrain_local.sh --preset nano --steps 50
#   bash launch/pretrain_local.sh --corpus ~/notes --ranks 2 -- parallel.tp=2 train.optimizer.lr=1e-3
#
# The same command again installs nothing, rebuilds nothing and resumes, or says that the run is done.
# Exit codes: specification/exit_codes.md.
set -euo pipefail

print_help() { awk '/^#!/ {next} !/^#/ {exit} {sub(/^# ?/, ""); print}' "$0"; }

usage_error() { printf 'error: %s; see bash launch/pretrain_local.sh --help.\n' "$1" >&2; exit 2; }

need_value() { [[ $# -ge 2 && -n $2 && $2 != --* ]] || usage_error "$1 needs a value"; }

need_count() { [[ $2 =~ ^[1-9][0-9]*$ ]] || usage_error "$1 needs a whole number of at least 1, not '$2'"; }

# The run folder and the corpus are named relative to where the user stands.
absolute() {
    case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$PWD" "$1" ;;
    esac
}

preset=pilot
arguments=()
overrides=()
while (($#)); do
    case "$1" in
    --preset) need_value "$@"; preset="$2"; shift 2 ;;
    --steps | --ranks) need_value "$@"; need_count "$1" "$2"; arguments+=("$1" "$2"); shift 2 ;;
    --corpus | --out) need_value "$@"; arguments+=("$1" "$(absolute "$2")"); shift 2 ;;
    --help | -h) print_help; exit 0 ;;
    --) shift; overrides=("$@"); break ;;
    *=*) usage_error "'$1' looks like a Hydra override and those come after --" ;;
    *) usage_error "unknown flag '$1'" ;;
    esac
done

# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env
cd "$REFRACTOR_ROOT"

command=("$PYTHON" -m refractor_megatron.cli pretrain --preset "$preset" "${arguments[@]}")
if ((${#overrides[@]})); then
    command+=(-- "${overrides[@]}")
fi
exec "${command[@]}"
