#!/bin/bash
# Pretraining on machines reached by SSH, with the same paths on all of them; the first runs the main process.
#   HOSTS="node1 node2" GPUS=8 examples/launch/ssh_nodes.sh 3b-stage1 dataset=DIR output_dir=DIR
# SSH and ACCELERATE can be set, for instance to a virtual environment's accelerate.
set -euo pipefail

: "${HOSTS:?set HOSTS to the names of the machines}"
read -ra hosts <<<"$HOSTS"
GPUS=${GPUS:-8}
PORT=${PORT:-29500}
# Seconds between SIGTERM and SIGKILL, in which a checkpoint is saved; launchers leave 30 by themselves.
SHUTDOWN=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
SSH=${SSH:-ssh -tt}
ACCELERATE=${ACCELERATE:-accelerate}
LAUNCH_OPTIONS=${LAUNCH_OPTIONS:---config_file examples/configs/accelerate/fsdp2_multinode.yaml}

# Where the launcher restarts processes (--max_restarts, c10d), a new round would share the store of the round before
# (torch 2.13), and its processes may find the addresses of dead ones there.
launcher="TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 $ACCELERATE launch"
arguments=$(printf '%q ' "$@")
children=()
# When one fails, all are ended: the others would wait for it for ever.
trap 'kill "${children[@]}" 2>/dev/null || true' EXIT INT TERM
for rank in "${!hosts[@]}"; do
  command="cd $(printf '%q' "$PWD") && $launcher $LAUNCH_OPTIONS --num_machines ${#hosts[@]} \
    --num_processes $((GPUS * ${#hosts[@]})) --machine_rank $rank --main_process_ip ${MAIN_IP:-${hosts[0]}} \
    --main_process_port $PORT -m tahoex1_hf pretrain $arguments"
  # shellcheck disable=SC2086
  $SSH "${hosts[$rank]}" "$command" &
  children+=($!)
done
for _ in "${hosts[@]}"; do
  wait -n
done
