"""Measure what packing the language model's weights with the tokens of an answer is worth: whole times and the longest silence.

    python -m experiments.speed.packing CKPT --rounds 3          # CKPT: `checkpoint` writes one of the 3B model

Questions about one video, in processes of their own, forms in turn. *never*: weights stay plain. *at once*: all are packed with the
first token. *as built*: some with each token, see `Packing` (backend/cpu/linear.py). Whole: seconds from the question to the last
word. Silence: the longest time between two words. The answers of all forms must be equal.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median

from evoprune.backend.cpu import linear

# The passes after which packing begins, and the bytes packed in a pass from then on.
FORMS = {
    "never": (sys.maxsize, 0),
    "at once": (0, sys.maxsize),
    "as built": (linear.START_PASSES, linear.PASS_BYTES),
}
CLIP = "samples/square.mp4"


def measure(form: str, model: str, video: str, budget: str, tokens: int, questions: int) -> list[dict]:
    """Of each question, in this process: whole seconds, the longest silence, and the tokens of its answer."""
    linear.START_PASSES, linear.PASS_BYTES = FORMS[form]
    from evoprune.video_qa import VideoQA

    encoded = VideoQA.load(model, budget=budget).encode(video)
    found = []
    for number in range(questions):
        begun = time.perf_counter()
        answer = encoded.ask(f"What happens? {number}", max_new_tokens=tokens)
        words = [time.perf_counter() for _ in answer]
        silence = max((later - earlier for earlier, later in pairwise(words)), default=0.0)
        found.append({"whole": words[-1] - begun, "silence": silence, "ids": answer.ids})
    return found


def run(form: str, args: argparse.Namespace, tokens: int) -> list[dict]:
    """As `measure`, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "experiments.speed.packing",
        args.checkpoint,
        "--form",
        form,
        "--tokens",
        str(tokens),
    ]
    command += ["--video", args.video, "-b", args.budget, "--questions", str(args.questions)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603 (this Python)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--video", default=CLIP)
    parser.add_argument("-b", "--budget", default="0.25")
    parser.add_argument("--tokens", default="8,32,128", help="lengths of the answers")
    parser.add_argument("--questions", type=int, default=3, help="that each process is asked")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", choices=FORMS, help="of the processes that this one starts")
    args = parser.parse_args()
    if args.form:
        given = args.form, args.checkpoint, args.video, args.budget, int(args.tokens), args.questions
        print(json.dumps(measure(*given)))
        return
    print("| tokens | question | form | whole, s | silence, s |\n|--:|--:|---|--:|--:|")
    for tokens in map(int, args.tokens.split(",")):
        taken = {form: [] for form in FORMS}
        for _ in range(args.rounds):
            for form, runs in taken.items():
                runs.append(run(form, args, tokens))
        for number in range(args.questions):
            answers = set()
            for form, runs in taken.items():
                asked = [each[number] for each in runs]
                answers |= {tuple(each["ids"]) for each in asked}
                whole, silence = (median(each[name] for each in asked) for name in ("whole", "silence"))
                print(f"| {tokens} | {number + 1} | {form} | {whole:.2f} | {silence:.2f} |", flush=True)
            if len(answers) > 1:
                print(f"\n{len(answers)} different answers to question {number + 1}\n")


if __name__ == "__main__":
    main()
