#!/usr/bin/env bash
# Short runs over a list of settings and rank counts, and one table of what each reached.
#
#   bash launch/scale_test.sh [FLAGS] [SETTINGS ...]
#
#   SETTINGS         each one quoted list of Hydra overrides, e.g. "train.micro_batch=2 parallel.tp=2"
#                    (default: one run of the preset as it is)
#   --preset NAME    default: nano                 --steps N      default: 20
#   --ranks "N ..."  rank counts (default: "1")    --corpus PATH  default: the preset's
#   --out DIR        runs and table.md go there (default: runs/scale)
#   --sbatch         print one sbatch line for each run instead of running it; --ranks then counts nodes
#   --table          run nothing, only make the table again from what is in --out
#   --help           this text
#
# Example:
#   bash launch/scale_test.sh --ranks "1 2" "parallel.tp=1" "train.seq_len=512 train.micro_batch=2"
#
# A setting that fails (or that the rank count does not allow) is a row that says so; the exit code is then 1.
# A run folder that is already complete is not run again. Exit codes: specification/exit_codes.md.
set -euo pipefail

print_help() { awk '/^#!/ {next} !/^#/ {exit} {sub(/^# ?/, ""); print}' "$0"; }

usage_error() { printf 'error: %s; see bash launch/scale_test.sh --help.\n' "$1" >&2; exit 2; }

need_value() { [[ $# -ge 2 && -n $2 && $2 != --* ]] || usage_error "$1 needs a value"; }

absolute() {
    case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$PWD" "$1" ;;
    esac
}

preset=nano steps=20 ranks="1" out="" corpus=() mode=run settings=()
while (($#)); do
    case "$1" in
    --preset) need_value "$@"; preset="$2"; shift 2 ;;
    --steps) need_value "$@"; steps="$2"; shift 2 ;;
    --ranks) need_value "$@"; ranks="$2"; shift 2 ;;
    --corpus) need_value "$@"; corpus=(--corpus "$(absolute "$2")"); shift 2 ;;
    --out) need_value "$@"; out="$(absolute "$2")"; shift 2 ;;
    --sbatch) mode=sbatch; shift ;;
    --table) mode=table; shift ;;
    --help | -h) print_help; exit 0 ;;
    -*) usage_error "unknown flag '$1'" ;;
    *=*) settings+=("$1"); shift ;;
    *) usage_error "'$1' is neither a flag nor a list of Hydra overrides" ;;
    esac
done
((${#settings[@]})) || settings=("")
[[ $steps =~ ^[1-9][0-9]*$ ]] || usage_error "--steps needs a whole number of at least 1, not '$steps'"
for n in $ranks; do
    [[ $n =~ ^[1-9][0-9]*$ ]] || usage_error "--ranks needs whole numbers of at least 1, not '$n'"
done

# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$REFRACTOR_ROOT"
out="${out:-$REFRACTOR_ROOT/runs/scale}"
if [[ $mode != sbatch ]]; then setup_env; fi

# A folder name that says what the run is: "tp=2,seq_len=512.r2".
folder_of() {
    local word key name=""
    for word in $1; do
        key="${word%%=*}"
        name+="${name:+,}${key##*.}=${word#*=}"
    done
    name="${name:-default}"
    printf '%s/%s.r%s\n' "$out" "${name//\//_}" "$2"
}

failures=0
for setting in "${settings[@]}"; do
    read -r -a overrides <<<"$setting"
    for n in $ranks; do
        folder="$(folder_of "$setting" "$n")"
        case "$mode" in
        sbatch)
            printf 'sbatch --nodes=%q --time=00:30:00 launch/pretrain_64k.sh --preset %q --out %q' "$n" "$preset" "$folder"
            printf ' %q' "${corpus[@]}" "train.steps=$steps" "${overrides[@]}"
            printf '\n'
            ;;
        run)
            printf '[scale] %s, %s rank(s): %s\n' "${setting:-preset as it is}" "$n" "$folder" >&2
            mkdir -p "$folder"
            # The last line of the log is the sentence that the table shows for a run that failed.
            refractor pretrain --preset "$preset" --steps "$steps" --ranks "$n" --out "$folder" "${corpus[@]}" \
                -- "${overrides[@]}" >"$folder/scale.log" 2>&1 || failures=$((failures + 1))
            ;;
        esac
    done
done
[[ $mode != sbatch ]] || exit 0
"$PYTHON" "$REFRACTOR_ROOT/launch/scale_table.py" "$out" --command "bash launch/scale_test.sh --preset $preset --steps $steps --ranks \"$ranks\"$(printf ' "%s"' "${settings[@]}")"
((failures == 0)) || exit 1
