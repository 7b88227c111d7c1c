#!/usr/bin/env bash
# Train one model of the paper's size on all GPUs of one machine. The same command continues an interrupted run.
set -euo pipefail
devices=$(nvidia-smi --list-gpus | wc -l)
torchrun --standalone --nproc-per-node "$devices" -m ssmax train "${OUT:-runs/paper-b}" --recipe paper --variant b \
    --corpus "${CORPUS:?a folder of text, or a data set on a hub}" "$@"
