#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU VM slice.
#
#   launch/tpu_vm.sh create --name v5e --type v5litepod-16 --zone us-west4-a [--queued] [--spot]
#   launch/tpu_vm.sh run    --name v5e --zone us-west4-a -- vidgen train --config=... --workdir=/mnt/run
#   launch/tpu_vm.sh ssh    --name v5e --zone us-west4-a [--worker 0]
#   launch/tpu_vm.sh status | delete --name v5e --zone us-west4-a [--queued]
#
# create  creates the slice (--queued requests it and waits until it is active), then runs install.
# install copies the files that git tracks, in their current state, to all workers and installs `.[tpu]` there.
# run     starts the command on all workers at once, in the copied folder; each appends to its ~/vidgen.log.
#         The workers discover one another. The workdir must be a folder that all of them share, such as a
#         bucket mounted with gcsfuse, or Filestore.
#
# Options: --project P; --version V, the VM's software version (default: chosen by the type); --dry-run prints
# the commands and runs none. Needs the gcloud command line tool, logged in.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
die() { echo "tpu_vm.sh: $*" >&2; exit 2; }

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
action=$1; shift
name='' zone='' type='' version='' worker=0 dry='' queued='' flags=() spot=() command=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name | --zone | --type | --version | --project | --worker)
      [[ $# -gt 1 ]] || die "$1 needs a value"
      if [[ $1 == --project ]]; then flags+=("--project=$2"); else printf -v "${1#--}" %s "$2"; fi
      shift 2 ;;
    --queued) queued=1; shift ;;
    --spot) spot=(--spot); shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; command=("$@"); break ;;
    *) die "unknown option \"$1\"; see $0 --help" ;;
  esac
done

run() { # Runs the command; with --dry-run prints it.
  if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
tpu() { run gcloud compute tpus tpu-vm "$@" "--zone=$zone" "${flags[@]}"; }
queue() { run gcloud compute tpus queued-resources "$@" "--zone=$zone" "${flags[@]}"; }
on_all() { tpu ssh "$name" --worker=all "--command=$1"; }

software() { # The VM image that a slice type needs.
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) return 1 ;;
  esac
}

create() {
  [[ $type ]] || die "create needs --type, such as v5litepod-16, v5p-32 or v6e-16"
  [[ $version ]] || version=$(software "$type") || die "no software is known for the type \"$type\": give --version"
  if [[ $queued ]]; then
    queue create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" "${spot[@]}"
    wait_until_active
  else
    tpu create "$name" "--accelerator-type=$type" "--version=$version" "${spot[@]}"
  fi
  install
}

wait_until_active() {
  local state=''
  until [[ $dry || $state == ACTIVE ]]; do
    state=$(queue describe "$name" '--format=value(state.state)')
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED) die "queued resource $name is $state; \`delete --queued\` it and create again" ;;
      *) echo "$(date +%T) queued resource $name is $state" >&2; sleep 60 ;;
    esac
  done
}

install() {
  local archive
  archive=$(mktemp -t vidgen.XXXXXX.tar.gz)
  trap 'rm -f "${archive:-}"' RETURN
  (cd "$(dirname "$0")/.." && git ls-files -z | tar --null --ignore-failed-read -czf "$archive" -T -)
  tpu scp "$archive" "$name:vidgen.tar.gz" --worker=all
  # uv installs its own Python, because the image's is older than 3.11.
  on_all 'set -e; mkdir -p vidgen; tar -xzf vidgen.tar.gz -C vidgen; cd vidgen
    command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
    ~/.local/bin/uv pip install --quiet --python .venv -e ".[tpu]"'
}

case $action in
  -h | --help | help) usage; exit 0 ;;
  create | install | run | ssh | status | delete) [[ $name && $zone ]] || die "$action needs --name and --zone" ;;
  *) die "unknown action \"$action\": create, install, run, ssh, status or delete" ;;
esac
case $action in
  create | install) "$action" ;;
  run)
    [[ ${#command[@]} -gt 0 ]] || die 'run needs a command after "--"'
    on_all "set -o pipefail; cd vidgen && source .venv/bin/activate && JAX_COORDINATOR_ADDRESS=auto$(printf ' %q' "${command[@]}") 2>&1 | tee -a ~/vidgen.log" ;;
  ssh) tpu ssh "$name" "--worker=$worker" ;;
  status) if [[ $queued ]]; then queue describe "$name"; else tpu describe "$name"; fi ;;
  delete) if [[ $queued ]]; then queue delete "$name" --force --quiet; else tpu delete "$name" --quiet; fi ;;
esac
