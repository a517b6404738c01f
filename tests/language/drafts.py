"""Measure how many drafts of a layer for multi-token prediction a model accepts.

    python -m tests.language.drafts MODEL [--quantize int8] [--questions 100]

MODEL is a folder of `experiments.demo.train_mtp`. Each question asks for the description of a clip that was not used for training.
The first table shows the tokens per pass without drafts, with drafts from earlier text (lookup), from the layer (MTP), and from
both, and how many of the layer's drafts were accepted. The second table compares the parts of the prompt that the layer may read:
the share of the answers' tokens that it predicts. evoprune lets it read only the last column.
"""

import argparse
import subprocess
from importlib.metadata import version

import torch
from tokenizers import Tokenizer

from evoprune.backend import Device, Quantization
from evoprune.language import GenerationOptions, TokenStream, mtp_drafter
from evoprune.language.generate import PrefillState
from evoprune.language.lookup import Lookup
from evoprune.session import load_model
from experiments.demo.train_mtp import text_of
from experiments.tables import table

NEW = 200
DRAFTERS = {"none": (), "lookup": ("lookup",), "MTP": ("mtp",), "lookup and MTP": ("lookup", "mtp")}
READ = {"the last column": 1, "the last 8 columns": 8, "the last 32 columns": 32, "all columns": 10_000}


class Counts:
    """Counts what the answers take, and turns drafters off."""

    def __init__(self):
        self.drafters = ()
        self.tokens = self.passes = self.drafts = self.accepted = 0
        read, by_lookup, by_layer = PrefillState.read, Lookup.draft, mtp_drafter.MtpDrafter.draft
        verified = mtp_drafter.MtpDrafter.verified

        def counted_read(state, ids):
            self.passes += 1
            return read(state, ids)

        def counted(drafter, accepted):
            self.drafts += 1
            self.accepted += accepted
            verified(drafter, accepted)

        PrefillState.read = counted_read
        Lookup.draft = lambda *given: by_lookup(*given) if "lookup" in self.drafters else []
        mtp_drafter.MtpDrafter.draft = lambda *given: by_layer(*given) if "mtp" in self.drafters else []
        mtp_drafter.MtpDrafter.verified = counted

    def start(self, drafters) -> None:
        self.drafters = drafters
        self.tokens = self.passes = self.drafts = self.accepted = 0


def answers_of(loaded, prompts, counts):
    """Return the token IDs of the model's answers, without the end."""
    language = loaded.language
    found = []
    for ids in prompts:
        positions = torch.arange(len(ids)).expand(3, -1)
        state = language.prefill(language.embed(ids), positions, len(ids))
        state.prompt_ids = ids
        found.append(list(TokenStream(state, GenerationOptions(max_new_tokens=NEW), loaded.eos_ids)))
        counts.tokens += len(found[-1])
    return found


@torch.inference_mode()
def predicted(language, prompt, answer, read):
    """Return how many tokens of an answer, after the first one, the layer predicts.

    Args:
        read: The number of prompt columns that the layer reads.
    """
    ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])
    positions = torch.arange(len(ids)).expand(3, -1)
    layer = language.mtp_layer()
    hidden = language.forward(language.embed(ids), positions, language.new_cache(len(ids)), last=len(ids))
    first = max(0, len(prompt) - read)
    right = 0
    with Quantization.decoding():
        for end in range(len(prompt), len(ids) - 1):
            part = slice(first, end)
            logits = layer.logits(hidden[part], ids[first + 1 : end + 1], positions[:, part])
            right += int(logits.argmax()) == int(ids[end + 1])
            first = end
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--quantize", default="none", help="default: %(default)s")
    parser.add_argument("--questions", type=int, default=100, help="default: %(default)s")
    args = parser.parse_args()
    loaded = load_model(args.model, quantize=args.quantize)
    counts = Counts()
    pairs = [text_of("heldout", seed, ("describe",)) for seed in range(args.questions)]
    encoder = Tokenizer.from_file(f"{args.model}/tokenizer.json")
    prompts = [torch.tensor(encoder.encode(prompt, add_special_tokens=False).ids) for prompt, _ in pairs]
    answers, rows = None, []
    for name, drafters in DRAFTERS.items():
        counts.start(drafters)
        found = answers_of(loaded, prompts, counts)
        answers = answers or found
        same = sum(map(list.__eq__, found, answers))
        drafted = f"{counts.accepted} of {counts.drafts}" if "mtp" in drafters else "-"
        rows.append(
            [
                name,
                counts.tokens,
                counts.passes,
                f"{counts.tokens / counts.passes:.2f}",
                drafted,
                f"{same} of {len(found)}",
            ]
        )
    right = sum(encoder.decode(ids) == answer for ids, (_, answer) in zip(answers, pairs, strict=True))
    print(
        f"{right} of {len(pairs)} descriptions are right; {sum(map(len, answers)) / len(answers):.0f} tokens on average\n"
    )
    print(
        *table(("drafts", "tokens", "passes", "tokens per pass", "accepted MTP drafts", "same answers"), rows), sep="\n"
    )
    total = sum(len(ids) - 1 for ids in answers)
    rows = [
        [
            name,
            f"{sum(predicted(loaded.language, *each, read) for each in zip(prompts, answers, strict=True)) / total:.1%}",
        ]
        for name, read in READ.items()
    ]
    print("", *table(("prompt columns that the layer reads", "predicted tokens"), rows), sep="\n")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    device = Device("cpu").environment().device_name
    print(
        f"\nevoprune at commit {commit.strip()}, PyTorch {version('torch')}, {loaded.dtype}, {args.quantize}, {device}"
    )


if __name__ == "__main__":
    main()
