#!/usr/bin/env bash
# CapImagine in miniature, from raw chains to a causal analysis, on two CPU cores in a quarter of an hour.
#
#   ./run install                                  # once: the environment
#   examples/capimagine/run_miniature.sh [OUT]     # default: runs/miniature
#
# Called again with the same OUT, it goes on where it was stopped; what is done is not done again.
# OUT gets report.html, summary.json, models/NAME (for `il.load`), logs/ and what each stage made.
#
# PYTHON     the interpreter; default .venv/bin/python, else python3
# JOBS       how many stages run at once (2)
# HUNTS      treasure hunts to learn from (2720); a quarter are of the edit kind, 4% are spoiled
# UPDATES    of the text model and of the direct one (300); latent models take twice as many
# BASELINES  latent models to train (mirage lvr coconut monet interchange)
# EVAL, N    hunts for accuracies (256), and for each causal arm (128)
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 403)) || { echo "this needs bash 4.3 or later" >&2; exit 1; }
mkdir -p "${1:-runs/miniature}"
out=$(cd "${1:-runs/miniature}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
jobs=${JOBS:-2} hunts=${HUNTS:-2720} updates=${UPDATES:-300} eval=${EVAL:-256} n=${N:-128}
latent_updates=$((2 * updates))
read -ra baselines <<<"${BASELINES:-mirage lvr coconut monet interchange}"
declare -A last=([mirage]=free [lvr]=reconstruct [coconut]=free [monet]=recall [interchange]=swap)
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=$PWD

die() { echo "run_miniature: $*" >&2; exit 1; }
py() { "$python" -m "examples.$1" "${@:2}"; }

"$python" -c 'import imaginelens, openai, trl' 2>/dev/null ||
  die "$python has no imaginelens with what training needs; make it with ./run install, or name another: PYTHON=..."
for name in "${baselines[@]}"; do
  [[ ${last[$name]:-} ]] || die "BASELINES names $name, which is none of ${!last[*]}"
done
settings="hunts $hunts, updates $updates, eval $eval, n $n, baselines ${baselines[*]}"
[[ ! -e $out/settings ]] || [[ $(<"$out/settings") == "$settings" ]] ||
  die "$out was begun with other settings ($(<"$out/settings")); choose another OUT"
mkdir -p "$out"/{logs,done,models}
echo "$settings" >"$out/settings"

# ---- stages --------------------------------------------------------------------------------------

set -m # each stage has a process group, so that all of it can be ended
stages=()
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'for pid in $(jobs -p); do kill -- "-$pid"; done 2>/dev/null || true' EXIT

stage() { # NAME COMMAND...: what it says goes to logs/NAME.log, the seconds it takes to done/NAME
  local name=$1 TIMEFORMAT='{"wall": %R, "user": %U, "system": %S}'
  shift
  echo "  $name"
  { time "$@" >"$out/logs/$name.log" 2>&1; } 2>"$out/logs/$name.seconds" || {
    tail -n 5 "$out/logs/$name.log" >&2
    die "$name failed; all it said is in $out/logs/$name.log, and the same command goes on from there"
  }
  mv "$out/logs/$name.seconds" "$out/done/$name"
}

start() { # NAME COMMAND...: run a stage that is not done, when there is room for it
  [[ ! -e $out/done/$1 ]] || { echo "  $1: done before"; return 0; }
  while (($(jobs -pr | wc -l) >= jobs)); do wait -n; done
  stage "$@" &
  stages+=($!)
}

finish() { # wait for all that was started
  local pid
  for pid in "${stages[@]}"; do wait "$pid"; done
  stages=()
}

with_server() { # COMMAND...: gets the URL of an OpenAI-compatible server, which runs meanwhile
  local log=$out/logs/server.log server status=0 url=
  "$python" -m examples.capimagine.server --port 0 >"$log" 2>&1 & # not through py, whose id it would be
  server=$!
  until url=$(sed -n 's/^listening on //p' "$log"); [[ $url ]]; do
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; return 1; }
    sleep 0.1
  done
  "$@" "$url" || status=$?
  kill "$server"
  wait "$server" || true
  return "$status"
}

# ---- the recipe ----------------------------------------------------------------------------------

raw() { # in Monet's layout; the hunts for `--eval` choose checkpoints and are used for nothing else
  rm -rf "$out/raw" &&
    py capimagine.hunts --n "$hunts" --spoil 0.04 --eval 128 --out "$out/raw"
}

rewrite() { # URL: rewrite, refine and filter; no system prompt, whose words organisms do not know
  py capimagine.rewrite "$out/raw" --out "$out/data" --base-url "$1" --model template --system ""
}

in_words() { # NAME MORE...: the text model, and the direct one at equal steps
  py capimagine.train "$out/data/chains.jsonl" --out "$out/runs/$1" --eval "$out/raw/eval/chains.jsonl" \
    --settings examples/capimagine/configs/miniature.toml --updates "$updates" --resume "${@:2}" &&
    keep "$1" "$out/runs/$1/model"
}

in_latents() { # NAME: from the same chains as they were, if they zoom: the crops are its targets
  py latent_baselines.train "$out/read/chains.jsonl" --objective "$1" --subset Visual_CoT \
    --like "$out/data/chains.jsonl" --updates "$latent_updates" --out "$out/runs/$1" &&
    keep "$1" "$out/runs/$1/${last[$1]}/model"
}

keep() { # NAME FOLDER: a trained model, under its name
  rm -rf "$out/models/$1" && cp -R "$2" "$out/models/$1"
}

answer() { # NAME MORE...: held-out hunts
  py capimagine.evaluate --model "$out/models/$1" --benchmark hunts --limit "$eval" --batch 64 \
    --out "$out/answers/$1.jsonl" --resume "${@:2}"
}

edit_words() { # URL: every arm on words, those that a language model rewrites too
  py capimagine.causal --text "$out/models/text" --n "$n" --out "$out/causal/text" \
    --rewriter-model template --rewriter "$1"
}

edit_latents() { # NAME: the same arms on latents
  py capimagine.causal --latent "$out/models/$1" --n "$n" --out "$out/causal/$1"
}

echo "data"
start raw raw && finish
start read py capimagine.data "$out/raw" --out "$out/read" --system ""
start rewrite with_server rewrite && finish
echo "training"
start train-text in_words text
start train-direct in_words direct --direct
for name in "${baselines[@]}"; do start "train-$name" in_latents "$name"; done
finish
echo "causal analysis and evaluation"
start causal-text with_server edit_words
for name in "${baselines[@]}"; do start "causal-$name" edit_latents "$name"; done
for name in text direct; do start "answers-$name" answer "$name"; done
for name in "${baselines[@]}"; do start "answers-$name" answer "$name" --do mean noise zero; done
finish
echo "report"
py capimagine.report "$out"
