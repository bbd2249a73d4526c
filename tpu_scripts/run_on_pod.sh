#!/usr/bin/env bash
# Starts the same `mlm-jax run` on every worker of a TPU VM, from your own machine.
#
#   1. tpu_scripts/run_on_pod.sh --setup my-pod us-central2-b https://github.com/you/mlm_jax     clones, or updates, and installs
#   2. tpu_scripts/run_on_pod.sh --doctor my-pod us-central2-b --out gs://BUCKET/runs            says whether the pod is fit to train
#   3. tpu_scripts/run_on_pod.sh my-pod us-central2-b experiments/gpt2_124m.py                   starts, and returns
#   4. tpu_scripts/run_on_pod.sh --log my-pod us-central2-b                                      shows the end of every worker's log
#
# Needs gcloud, logged in, and a TPU VM that is up. The run goes on when you log out: on each worker it is a tmux session named
# mlm_jax, its output in ~/mlm_jax/pod.log. The processes find each other by themselves (--distributed). With several workers, --out
# has to be a folder that all of them see, or gs://BUCKET/FOLDER; then step 3, done again after a preemption, resumes the run.
set -euo pipefail

usage() {
    cat <<'END'
Usage: run_on_pod.sh [--dry-run] TPU ZONE EXPERIMENT [ARGUMENT ...]   start `mlm-jax run EXPERIMENT --distributed ARGUMENT ...`
       run_on_pod.sh [--dry-run] --setup TPU ZONE REPOSITORY [BRANCH] clone or update ~/mlm_jax and install it (BRANCH: main)
       run_on_pod.sh [--dry-run] --doctor TPU ZONE [ARGUMENT ...]     execute `mlm-jax doctor --distributed ARGUMENT ...`
       run_on_pod.sh [--dry-run] --log TPU ZONE                       print the end of ~/mlm_jax/pod.log
       run_on_pod.sh [--dry-run] --stop TPU ZONE                      end the run
Each on every worker of the TPU VM. --dry-run prints the gcloud command and runs nothing.
END
}

wrong() {
    echo "run_on_pod.sh: $1" >&2
    usage >&2
    exit 2
}

dry_run=false
action=start
while [[ ${1-} == -* ]]; do
    case $1 in
        --dry-run) dry_run=true ;;
        --setup | --doctor | --log | --stop) action=${1#--} ;;
        -h | --help) usage; exit 0 ;;
        *) wrong "$1: no such option. Options of mlm-jax go after EXPERIMENT." ;;
    esac
    shift
done
case $action in
    start) [[ $# -ge 3 ]] || wrong "TPU, ZONE and EXPERIMENT are needed, $# given." ;;
    setup) [[ $# -eq 3 || $# -eq 4 ]] || wrong "TPU, ZONE and REPOSITORY are needed, and BRANCH if not main; $# given." ;;
    doctor) [[ $# -ge 2 ]] || wrong "TPU and ZONE are needed, $# given." ;;
    *) [[ $# -eq 2 ]] || wrong "TPU and ZONE are needed, $# given." ;;
esac
tpu=$1 zone=$2
shift 2
[[ $tpu =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || wrong "TPU = $tpu: not a name that a TPU can have (a-z, 0-9 and -)."
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || wrong "ZONE = $zone: not a zone. Write, for example, us-central2-b."

# What a worker executes, quoted once here for its shell; tmux hands its argument to a shell of its own, so that part is quoted twice.
there="cd ~/mlm_jax && PATH=\$PWD/.venv/bin:\$PATH"
case $action in
    setup)
        printf -v remote 'set -e; [ -d ~/mlm_jax ] || git clone %q ~/mlm_jax; cd ~/mlm_jax; git fetch %q %q; git checkout --detach FETCH_HEAD; ' "$1" "$1" "${2-main}"
        # uv, because the images of TPU VMs carry a Python that is too old
        remote+='uv=~/.local/bin/uv; [ -x $uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh; [ -d .venv ] || $uv venv --quiet --python 3.12; '
        remote+='$uv pip install --quiet -e ".[tpu,gcs]"; git log -1 --oneline'
        ;;
    doctor)
        printf -v run '%q ' mlm-jax doctor --distributed "$@"
        remote="$there $run"
        ;;
    start)
        printf -v run '%q ' mlm-jax run "$1" --distributed "${@:2}"
        run="$there $run> pod.log 2>&1; echo \"exit status \$?\" >> pod.log"
        printf -v remote 'tmux new-session -d -s mlm_jax %q && echo started' "$run"
        ;;
    log) remote='hostname; tail -n 20 ~/mlm_jax/pod.log' ;;
    stop) remote='tmux kill-session -t mlm_jax && echo ended' ;;
esac
command=(gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker=all --command "$remote")
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
else
    command -v gcloud > /dev/null || { echo "run_on_pod.sh: gcloud is not installed. See https://cloud.google.com/sdk/docs/install" >&2; exit 1; }
    exec "${command[@]}"
fi
