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

arguments=$(printf '%q ' "$@")
children=()
# When one fails, all are ended: the others would wait for it for ever.
trap 'kill "${children[@]}" 2>/dev/null || true' EXIT INT TERM
for rank in "${!hosts[@]}"; do
  command="cd $(printf '%q' "$PWD") && TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN \
    $ACCELERATE launch $LAUNCH_OPTIONS --num_machines ${#hosts[@]} --num_processes $((GPUS * ${#hosts[@]})) \
    --machine_rank $rank --main_process_ip ${MAIN_IP:-${hosts[0]}} --main_process_port $PORT \
    -m tahoex1_hf pretrain $arguments"
  # shellcheck disable=SC2086
  $SSH "${hosts[$rank]}" "$command" &
  children+=($!)
done
for _ in "${hosts[@]}"; do
  wait -n
done
