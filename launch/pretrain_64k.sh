#!/usr/bin/env bash
#SBATCH --job-name=refractor-64k
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Pre-trains the 64k preset on a SLURM cluster; survives its time limit, preemption and node loss.
#
#   sbatch launch/pretrain_64k.sh [--preset NAME] [--corpus PATH] [--out DIR] [HYDRA_OVERRIDES ...]
#   sbatch --nodes=4 --time=4:00:00 launch/pretrain_64k.sh parallel.tp=4 train.steps=20000
#   REFRACTOR_DRY_RUN=1 bash launch/pretrain_64k.sh parallel.tp=4     # prints the commands, runs nothing
#
#   --preset NAME   default: pretrain_64k        --corpus PATH   default: the preset's
#   --out DIR       default: runs/NAME           --help          this text
#
# Submit it from the repository's root, or set REFRACTOR_ROOT; the repository, its .venv, the data and the run folder
# are on storage that every node sees. REFRACTOR_VENV reuses an environment.
#
# SIGUSR1 (sent by SLURM before the time limit, or by `scancel --signal=USR1 --batch JOB`) means: save, leave, queue
# again. SIGTERM (cancel, preemption) means: save if there is time and leave; SLURM itself queues preempted jobs again.
# A job that comes back REFRACTOR_MAX_STALLS times (default 3) without a newer checkpoint stops for good.
#
# REFRACTOR_SAVE_SECONDS   time a save may take before SIGKILL (default 600; below the grace of --signal)
# REFRACTOR_NPROC          processes per node (default: the GPUs that SLURM gave)
#
# torchrun hides its workers' exit codes after a signal, so nothing here depends on them: "done" is read from the
# checkpoints, and "queue again" from the signal. Exit codes: specification/exit_codes.md.
set -uo pipefail

print_help() { awk '/^#!/ || /^#SBATCH/ {next} !/^#/ {exit} {sub(/^# ?/, ""); print}' "$0"; }

say() { printf '[64k] %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

need_value() { [[ $# -ge 2 && -n $2 && $2 != --* ]] || die 2 "$1 needs a value; see bash launch/pretrain_64k.sh --help."; }

# run COMMAND...: in the background, because a trap only runs at once while bash waits. A trap also interrupts `wait`,
# so wait until the command is really gone, and return its own status.
child="" signal="" interrupted=""
run() {
    local status=127 code
    [[ -z $signal ]] || return 75 # asked to leave before this began
    "$@" &
    child=$!
    while :; do
        interrupted=""
        wait "$child"
        code=$?
        ((code == 127)) || status=$code # 127: its status was already collected
        [[ -n $interrupted ]] || break
    done
    child=""
    return "$status"
}

# shellcheck disable=SC2329  # called by the traps
forward() {
    signal="$1" interrupted=yes
    say "SIG$1: asking what runs to save and leave"
    [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

preset=pretrain_64k out="" corpus="" overrides=()
while (($#)); do
    case "$1" in
    --preset) need_value "$@"; preset="$2"; shift 2 ;;
    --corpus) need_value "$@"; corpus="$2"; shift 2 ;;
    --out) need_value "$@"; out="$2"; shift 2 ;;
    --help | -h) print_help; exit 0 ;;
    --) shift ;;
    -*) die 2 "unknown flag '$1'; see bash launch/pretrain_64k.sh --help." ;;
    *=*) overrides+=("$1"); shift ;;
    *) die 2 "'$1' is neither a flag nor a Hydra override such as train.steps=100." ;;
    esac
done

dry="${REFRACTOR_DRY_RUN:-}"
job="${SLURM_JOB_ID:-}"
if [[ -z $job ]]; then
    [[ -n $dry ]] || die 2 "this script runs inside a SLURM job; submit it with sbatch launch/pretrain_64k.sh, or set REFRACTOR_DRY_RUN=1 to see its commands."
    job=0
fi

# SLURM runs a copy of this file from its spool, so the repository is where the job was submitted.
root="${REFRACTOR_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
[[ -f $root/launch/setup_env.sh ]] || die 2 "$root is not the repository; submit from its root or set REFRACTOR_ROOT."
# shellcheck source=launch/setup_env.sh
source "$root/launch/setup_env.sh"
if [[ -n $dry ]]; then
    PYTHON="${REFRACTOR_VENV:-$REFRACTOR_ROOT/.venv}/bin/python"
else
    setup_env
fi
cd "$REFRACTOR_ROOT" || exit 1

out="${out:-runs/$preset}"
[[ $out == /* ]] || out="$REFRACTOR_ROOT/$out"
save_seconds="${REFRACTOR_SAVE_SECONDS:-600}"
restarts="${SLURM_RESTART_COUNT:-0}"
nodes="${SLURM_JOB_NUM_NODES:-1}"
nproc="${REFRACTOR_NPROC:-${SLURM_GPUS_ON_NODE:-8}}"
[[ $nproc =~ ^[1-9][0-9]*$ ]] || die 2 "processes per node is '$nproc'; set REFRACTOR_NPROC to a whole number."

# "LATEST TARGET": the newest complete checkpoint's step (0: none) and the step at which the run is done (0: no config).
progress() {
    "$PYTHON" - "$out" <<'PY'
import sys
from pathlib import Path

import yaml

from refractor_megatron.checkpoint.manifest import latest_step

run = Path(sys.argv[1])
config = run / "config.yaml"
target = yaml.safe_load(config.read_text())["train"]["steps"] if config.exists() else 0
print(latest_step(run / "checkpoints"), target)
PY
}

# Address of the first node; the host name need not resolve, so what SLURM itself connects to is preferred.
head_address() {
    local first address
    first="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)"
    address="$(scontrol show node -o "$first" 2>/dev/null | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)"
    printf '%s\n' "${address:-$first}"
}

# Stops a job that keeps coming back without getting anywhere; the count lives in the run folder.
count_stalls() {
    local latest="$1" file="$out/slurm_progress" before=-1 stalls=0
    if [[ -f $file ]]; then read -r before stalls <"$file"; fi
    if ((restarts > 0 && before == latest)); then stalls=$((stalls + 1)); else stalls=0; fi
    printf '%d %d\n' "$latest" "$stalls" >"$file"
    ((stalls < ${REFRACTOR_MAX_STALLS:-3})) ||
        die 1 "job $job came back $stalls times without a checkpoint newer than step $latest in $out; read the end of its log, mend the cause, then delete $file and submit again."
}

# A run that cannot start and save once before its end would only burn the queue.
check_time_left() {
    local left
    [[ -n ${SLURM_JOB_END_TIME:-} ]] || return 0
    left=$((SLURM_JOB_END_TIME - $(date +%s)))
    ((left > save_seconds + 120)) ||
        die 1 "only $left s are left for job $job and one start and one save need $((save_seconds + 120)) s; submit with a longer --time."
}

if [[ -n $dry ]]; then address=HEAD_NODE; else address="$(head_address)"; fi
prepare=("$PYTHON" -m refractor_megatron.cli pretrain --prepare-only)
finish=("$PYTHON" -m refractor_megatron.cli pretrain) # of a trained run: evaluates and writes the report
arguments=(--preset "$preset" --ranks "$((nodes * nproc))" --out "$out")
[[ -z $corpus ]] || arguments+=(--corpus "$corpus")
((${#overrides[@]} == 0)) || arguments+=(-- "${overrides[@]}")
prepare+=("${arguments[@]}")
finish+=("${arguments[@]}")
# --kill-on-bad-exit=0 and --wait: the first launcher to leave must not take another node's save with it.
train=(srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait="$save_seconds"
    "$PYTHON" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$nproc" --max-restarts=0
    --rdzv-backend=c10d --rdzv-endpoint="$address:$((20000 + job % 20000))" --rdzv-id="$job.$restarts"
    --signals-to-handle 'SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1' --shutdown-timeout "$save_seconds"
    -m refractor_megatron.training.worker "$out")

if [[ -n $dry ]]; then
    for line in prepare train finish; do
        declare -n words="$line"
        printf '+'
        printf ' %q' "${words[@]}"
        printf '\n'
    done
    exit 0
fi

export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}" # every rank would repeat Megatron's and torch's deprecation notes
mkdir -p "$out" || die 6 "the run folder $out cannot be made; choose another with --out."
check_time_left
run "${prepare[@]}"
status=$?
read -r latest target <<<"$(progress)"
if ((status == 0 && latest < target)) && [[ -z $signal ]]; then
    count_stalls "$latest"
    say "job $job restart $restarts: $nodes node(s) x $nproc, from step $latest of $target, $out"
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
    run "${train[@]}"
    status=$?
    read -r latest target <<<"$(progress)"
    # The checkpoint of the last step says that training is done, whatever the launcher made of a late signal.
    ((latest < target)) || status=0
fi
if ((status == 0 && target > 0 && latest >= target)); then
    say "training is done: step $latest of $target in $out"
    run "${finish[@]}"
    status=$?
    ((status != 0)) || exit 0
fi
case "$signal" in
USR1)
    say "saved up to step $latest of $target; queueing job $job again"
    scontrol requeue "$job" ||
        die 1 "job $job could not be queued again; submit the same command once more, it goes on from step $latest."
    exit 0
    ;;
TERM) exit 143 ;;
esac
((target == 0 || latest < target)) ||
    die "$status" "training is done (step $latest) but its evaluation or report failed; the reason is above, and the same command repeats only that."
die "$((status > 0 ? status : 1))" "the run stopped at step $latest of $target (exit status $status); the reason is above, and the same command goes on from step $latest."
