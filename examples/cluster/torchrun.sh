#!/bin/bash
# The same command on every node, NODE_RANK counting from 0; MASTER_ADDR is the node of rank 0.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-0 examples/cluster/torchrun.sh --config run.yaml
set -euo pipefail
DEVICES="${DEVICES:-8}"

exec torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$DEVICES" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
    -m lightrft.cli fit "$@" --trainer.devices "$DEVICES" --trainer.num_nodes "$NNODES"
