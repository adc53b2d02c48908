#!/usr/bin/env bash
# The trainings that a CPU cannot give, side by side on one machine with a GPU: Sudoku at twice the budget, text with
# as many tokens a parameter as the paper's runs. In a checkout whose .venv has a torch that sees the GPU:
#
#   figures/larger.sh smoke     trains `smoke` on the CPU and on the GPU and compares: 1 minute
#   figures/larger.sh prepare   fetches and pools the texts: the only step that needs a network
#   figures/larger.sh sudoku    five arms, five fresh seeds, 8e13 FLOPs each: 2e15 in all
#   figures/larger.sh text      three arms, three seeds, 1.5e15 FLOPs each, bf16: 1.4e16 in all
#   figures/larger.sh pack      runs/larger.tar: curves, records and weights of what is finished
#
# JOBS (12) trainings run at a time; SEEDS and FLOPS replace what is above. Broken off, say the same again: what is
# finished stays, what is not goes on. Then `loopmdm ship` each, and list it in figures/zoo.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
LOOPMDM=${LOOPMDM:-.venv/bin/loopmdm}
PYTHON=${PYTHON:-.venv/bin/python}
OUT=runs/larger
TEXTS=$OUT/texts

# SPEC SEED FLOPS [SET ..]: one training, its state kept beside it
train() {
  local spec=$1 seed=$2 flops=$3 sets=()
  shift 3
  for set in "$@"; do sets+=(--set "$set"); done
  "$LOOPMDM" train "figures/specs/$spec.toml" --seed "$seed" --set "training.flops=$flops" "${sets[@]}" \
    --out "$OUT/$spec-seed$seed" --resume >"$OUT/$spec-seed$seed.log" 2>&1 ||
    echo "$spec seed $seed broke off: $(tail -n 1 "$OUT/$spec-seed$seed.log")" >&2
}
export -f train
export LOOPMDM OUT

# lines of `train`'s arguments on stdin, JOBS at a time
together() { sed 's/ *$//' | xargs -P "${JOBS:-12}" -L 1 bash -c 'train "$@"' train; }

case ${1:-} in
smoke)
  mkdir -p "$OUT"
  CUDA_VISIBLE_DEVICES="" "$LOOPMDM" train smoke --out "$OUT/smoke-cpu" --resume
  "$LOOPMDM" train smoke --out "$OUT/smoke" --resume
  "$PYTHON" - "$OUT" <<'END'
import sys
import pandas as pd

here, cpu = (pd.read_json(f"{sys.argv[1]}/{name}/metrics.jsonl", lines=True).iloc[-1] for name in ("smoke", "smoke-cpu"))
gap, error = here["validation_nelbo_4"] - cpu["validation_nelbo_4"], cpu["validation_nelbo_4_se"]
print(f"validation NELBO here {here['validation_nelbo_4']:.4f}, on the CPU {cpu['validation_nelbo_4']:.4f}")
print(f"seconds here {here['seconds']:.0f}, on the CPU {cpu['seconds']:.0f}")
sys.exit(f"they differ by {gap:.4f}, more than {error:.4f}: find out first" if abs(gap) > error else 0)
END
  ;;
prepare)
  mkdir -p "$TEXTS"
  "$LOOPMDM" data fetch sotu imdb wiki chitchat
  "$PYTHON" - "$TEXTS" <<'END'
import json
import sys

from loopmdm.model.corpora import documents

for name in ("sotu", "imdb", "wiki", "chitchat"):
    with open(f"{sys.argv[1]}/{name}.jsonl", "w") as out:
        out.writelines(json.dumps({"text": document.text}) + "\n" for document in documents.load(name))
END
  ;;
sudoku) # the dearest step first
  mkdir -p "$OUT"
  for arm in loop-s12 loop deep loop-s4 base; do
    for seed in ${SEEDS:-10 11 12 13 14}; do echo "sudoku-$arm $seed ${FLOPS:-8e13}"; done
  done | together
  ;;
text)
  [ -d "$TEXTS" ] || { echo "$TEXTS is missing; run figures/larger.sh prepare first" >&2; exit 2; }
  for arm in deep loop base; do
    loops=$([ $arm = loop ] && echo "model.max_loops=6 loops.widen_from=0 loops.widen_until=0" || true)
    for seed in ${SEEDS:-10 11 12}; do
      echo "imdb-d48-$arm $seed ${FLOPS:-1.5e15} data.corpus=files:$TEXTS/*.jsonl data.length=128 data.d_vocab=512" \
        "model.d_model=96 model.n_heads=4 model.n_coda_layers=4 training.batch_size=128 training.precision=bf16 $loops"
    done
  done | together
  ;;
pack)
  find "$OUT" -name "*.safetensors" -not -path "*/state/*" -size +16M -exec echo "larger than 16 MB: {}" \;
  tar -C "$OUT" --exclude=state --exclude=texts -cf "$OUT.tar" .
  echo "$OUT.tar"
  ;;
*)
  sed -n '2,12p' "$0" | cut -c3-
  exit 2
  ;;
esac
