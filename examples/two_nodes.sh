#!/bin/bash
# Two machines with 8 GPUs each, without a scheduler: run this on both, with the number of the machine as its argument.
#
#   first:   MASTER_ADDR=10.0.0.1 bash two_nodes.sh 0
#   second:  MASTER_ADDR=10.0.0.1 bash two_nodes.sh 1
#
# data and run_dir lie on a disk that both see. Run again, it goes on from the newest checkpoint.
set -eu
export MASTER_ADDR=${MASTER_ADDR:?the address of the first machine}
export MASTER_PORT=${MASTER_PORT:-29500}
export NODE_RANK=${1:?0 on the first machine, 1 on the second}

mantis-lite train chat-siglip-llama3-full \
    data=/shared/my.json \
    run_dir=/shared/runs/siglip-llama3-full \
    --gpus 8 --nodes 2
