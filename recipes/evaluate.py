"""Measures a model on spoken questions: python recipes/evaluate.py [--model FOLDER] [--limit 100] [--out report.json]

Prints how many answers are right by the transcript of their sound (Whisper base), the word error rate of the sound
against the model's own text, DistillMOS, and every wrong answer. The questions come from data preparation
(`python -m data_prep questions`): phrasings and voices that training never heard.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from rich.progress import track

from vocalnet.bench import machine
from vocalnet.errors import VocalNetError
from vocalnet.evaluation.spoken_qa import by, evaluate, read_questions, scores
from vocalnet.model import VocalNet


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini", help="mini, or a model folder")
    parser.add_argument("--questions", type=Path, default=Path("data/questions"), help="folder of question shards")
    parser.add_argument("--split", default="valid")
    parser.add_argument("--limit", type=int, default=100, help="how many questions")
    parser.add_argument("--mtp", type=int, help="MTP modules to use")
    parser.add_argument("--decoding", choices=["accept-all", "verified"])
    parser.add_argument("--audio", type=Path, help="folder to keep the answers' sound in")
    parser.add_argument("--out", type=Path, help="JSON file for scores and all results")
    return parser.parse_args()


def main() -> int:
    """Runs the evaluation; 2 on bad input."""
    args = arguments()
    try:
        questions = read_questions(args.questions, args.split, args.limit)
        model = VocalNet.load(args.model)
    except VocalNetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    changes = {key: getattr(args, key) for key in ("mtp", "decoding") if getattr(args, key) is not None}
    generation = replace(model.config.generation, **changes)
    if args.audio:
        args.audio.mkdir(parents=True, exist_ok=True)
    results = list(track(evaluate(model, questions, generation, args.audio), total=len(questions)))
    total = scores(results)
    for result in results:
        if not result.right:
            print(f"  {result.voice:<12} {result.question} → {result.text} | heard: {result.transcript}")
    print("by voice:", {name: f"{share:.2f} of {count}" for name, (count, share) in by(results, "voice").items()})
    print(json.dumps(total, indent=2))
    if args.out:
        record = {"scores": total, "machine": machine(), "results": [asdict(result) for result in results]}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
