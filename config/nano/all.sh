#!/usr/bin/env bash
# The laptop chain: every stage from nothing, one after the other, then its scores. After an interruption it goes on.
#
#     bash config/nano/all.sh [--device=cpu …]         # more flags go to every train.py
#     PROCESSES=1 bash config/nano/all.sh              # 1, 2 or 4; else as many as there are GPUs, or 2 on the CPU
set -euo pipefail
cd "$(dirname "$0")/../.."
run=output/nano
processes=${PROCESSES:-$(python -c 'import torch; n = torch.cuda.device_count(); print(4 if n > 3 else 2 - (n == 1))')}
cores=$(getconf _NPROCESSORS_ONLN)

train() {                              # train STAGE PROCESSES [flags of train.py]
    # without GPUs: tensors of this size are too small to be cut up for many threads
    OMP_NUM_THREADS=$(( cores > $2 ? cores / $2 : 1 )) torchrun --standalone --nproc-per-node="$2" \
        train.py "config/nano/$1.yaml" --resume=auto "${@:3}"
}
for stage in vae decoder pretrain finetune_cfg temporal; do
    train $stage "$processes" "$@"
done
train human_specific 1 "$@"            # of one picture at a time

scores() {                             # scores NAME STAGE [flags of evaluate.py]
    [ -e "$run/$1.json" ] && return    # written last
    rm -f "$run/$1.png"
    python evaluate.py --weights "$run/$2/last" --json "$run/$1.json" --pictures "$run/$1.png" "${@:3}"
}
for stage in pretrain finetune_cfg temporal; do
    scores "$stage" "$stage"
done
scores stranger finetune_cfg --stranger                    # the wrong person's photo must give the wrong clothes
scores person-before finetune_cfg --person 500 --count 24
scores person-after human_specific --person 500 --count 24
