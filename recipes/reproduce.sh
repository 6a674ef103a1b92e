#!/usr/bin/env bash
# From text to a model folder that talks: data, nine trainings, assembly. A step whose result exists is skipped, an
# interrupted one goes on where it stopped.
#
#   SIZE=tiny  recipes/reproduce.sh    tens of minutes on two cores: shows that every step works, teaches little
#   SIZE=small recipes/reproduce.sh    the mini model of the package: thirteen hours of training, and two for the data
#   SIZE=full  recipes/reproduce.sh    more data and time, for more cores or an accelerator
#
# Processor time of the data steps on one core, measured: tiny 36 s, and 48 s more for pronunciations. small, the other core at work
# too: open_answers 4 min, texts 6 s, answers 10 min (24,752 sentences, 17 h), pronunciations 48 s, answer_features 24
# min, answer_tokens 2 min, hibari's questions 31 s a thousand and their features 69 s a thousand, the LLM's hidden
# states of the answers (in speak) 20 min. Where the base LLM answers open prompts (open_answers), texts takes in what
# passed the checks.
#
# Needs `pip install -e '.[data,train]'` and, except for tiny, the program flite (a Debian package). Settings from the
# environment: DATA, RUNS, MODEL (output folders), PYTHON, JOBS (processes for the data), SOURCES (voices of questions).
set -euo pipefail
cd "$(dirname "$0")/.."

SIZE=${SIZE:-tiny}
DATA=${DATA:-data/$SIZE}
RUNS=${RUNS:-runs/$SIZE}
MODEL=${MODEL:-$RUNS/model}
JOBS=${JOBS:-$(nproc)}
[ ! -x .venv/bin/python ] || PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3}

# Minutes of training a stage. "tiny" also validates on less, which would otherwise take longer than its training.
declare -A minutes quick
stages=(vocoder tokenizer align_text align_ctc align flow speak speak_modules vocoder_finetune)
case $SIZE in
  tiny) times=(0.5 0.5 0.5 0.3 0.5 0.5 0.5 0.3 0.3); SOURCES=${SOURCES:-hibari} ;;
  small) times=(10 50 160 50 20 40 400 10 25); SOURCES=${SOURCES:-kokoro,hibari,flite} ;;
  full) times=(30 120 240 60 60 90 600 30 40); SOURCES=${SOURCES:-kokoro,hibari,flite} ;;
  *) echo "error: SIZE is '$SIZE'; allowed: tiny, small, full" >&2; exit 2 ;;
esac
for i in "${!stages[@]}"; do minutes[${stages[i]}]=${times[i]}; done
if [ "$SIZE" = tiny ]; then
  quick[align_text]="options.validation_questions=4"
  quick[align]="options.validation_questions=4"
  quick[speak]="options.validation_sentences=8 options.free_running=2"
  quick[speak_modules]=${quick[speak]}
fi

timed() { # WHAT COMMAND...: runs the command and says how long it took
  local start=$SECONDS
  echo "--- $1"
  "${@:2}"
  echo "--- $1: $((SECONDS - start)) s"
}

prepare() { # STEP OPTIONS...: data preparation checks its own results and redoes nothing that is whole
  timed "data: $1" "$PYTHON" -m data_prep "$@" --data "$DATA" --size "$SIZE" --jobs "$JOBS" --sources "$SOURCES"
}

train() { # STAGE key=value...
  local stage=$1 output=$RUNS/$1
  if [ -f "$output/result.json" ]; then echo "--- $stage: trained already"; return; fi
  # shellcheck disable=SC2086  # the quick settings are words on purpose
  timed "train: $stage" "$PYTHON" recipes/train.py "recipes/$stage.yaml" "data=$DATA" "output=$output" \
    "trainer.max_minutes=${minutes[$stage]}" "${@:2}" ${quick[$stage]:-}
}

prepare all
train vocoder
train tokenizer
train align_text
train align_ctc
train align "options.init_adapter=$RUNS/align_ctc/adapter" "options.init_lora=$RUNS/align_text/lora"
prepare answer_tokens --tokenizer "$RUNS/tokenizer"
train flow "options.tokenizer=$RUNS/tokenizer"
train speak "options.lora=$RUNS/align/lora"
train speak_modules "options.lora=$RUNS/align/lora" "options.init_decoder=$RUNS/speak"
prepare predicted_mels --flow "$RUNS/flow"
train vocoder_finetune "options.start=$RUNS/vocoder"

# A folder with one part each, as `vocalnet pack` expects.
rm -rf "$RUNS/parts"
mkdir -p "$RUNS/parts"
link() { ln -s "$(realpath "$2")" "$RUNS/parts/$1"; }
link adapter "$RUNS/align/adapter"
link lora "$RUNS/align/lora"
link speech_decoder "$RUNS/speak_modules"
link flow "$RUNS/flow"
link vocoder "$RUNS/vocoder_finetune"
link speech_tokenizer "$RUNS/tokenizer"
timed "pack" "$PYTHON" -m vocalnet.cli pack "$RUNS/parts" --out "$MODEL" --settings recipes/mini.yaml

echo "done in $((SECONDS / 60)) min: $MODEL"
echo "try it: vocalnet chat examples/question.wav --model $MODEL"
