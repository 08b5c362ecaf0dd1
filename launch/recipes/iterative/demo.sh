#!/usr/bin/env bash
# Three rounds on the demo's model, each anchored to the model of the round before: launch/recipes/iterative/demo.sh
# On a CPU in about a minute; `REFERENCE=first` anchors every round to the start.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${FOLDER:-runs/rounds}
mkdir -p "$folder"
python -c "from pathlib import Path; from dsdpo.commands.demo import make_inputs; make_inputs(Path('runs/demo-inputs'))"
# A question of each kind, without its answers.
python - "$folder/prompts.jsonl" <<'PROMPTS'
import json, sys
prompts = {json.dumps(json.loads(line)["prompt"]) for line in open("runs/demo-inputs/train.jsonl")}
open(sys.argv[1], "w").writelines(f'{{"prompt": {prompt}}}\n' for prompt in sorted(prompts))
PROMPTS
exec python "$here/rounds.py" launch/recipes/demo.yaml --prompts "$folder/prompts.jsonl" --folder "$folder" \
  --reference "${REFERENCE:-last}" --generate "python $here/demo_generate.py --model {model} --prompts {prompts} --out {out} --round {round}" \
  --overwrite_output_dir false --batch.pairs_per_step 16 --train.num_train_epochs 4 --optimizer.warmup_steps 0 --checkpoint.every_steps 0 "$@"
