#!/usr/bin/env bash
# The laptop chain: every stage from nothing, one after the other, then its scores. After an interruption it goes on.
#
#     bash config/nano/all.sh [--device=cuda …]        # more flags go to every train.py
set -euo pipefail
cd "$(dirname "$0")/../.."
run=output/nano

for stage in vae pretrain finetune_cfg temporal human_specific; do
    python train.py config/nano/$stage.yaml --resume=auto "$@"
done

scores() {                             # scores NAME STAGE [flags of evaluate.py]
    [ -e "$run/$1.json" ] || python evaluate.py --weights "$run/$2/last" --json "$run/$1.json" --pictures "$run/$1.png" "${@:3}"
}
for stage in pretrain finetune_cfg temporal; do
    scores "$stage" "$stage"
done
scores stranger finetune_cfg --stranger                    # the wrong person's photo must give the wrong clothes
scores person-before finetune_cfg --person 500 --count 24
scores person-after human_specific --person 500 --count 24
