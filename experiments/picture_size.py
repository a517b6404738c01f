"""What a picture keeps by the number of its tokens: the same pictures at once, twice and four times their units.

    python -m experiments.picture_size --seed N --limit N

Pictures of `scenes` are enlarged before they are asked about. The models were trained on them as they are: the table says first
what they still know with nothing pruned.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from evoprune.bench.questions import grade
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from experiments.demo.write import clips_asked, demo_video

MODELS = {"bundled": "demo-scenes", "second": "tests/demo/second-scenes"}
TIMES = 1, 2, 4  # the units
SHARES = 1.0, 0.5, 0.25, 0.1, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="block of validation clips")
    parser.add_argument("--limit", type=int, default=100, help="clips, of which half are pictures")
    args = parser.parse_args()
    print("| weights | units | share | tokens | right | kept |", "|---" * 6 + "|", sep="\n")
    for weights, model in MODELS.items():
        loaded, found = load_model(model, dtype="fp32"), defaultdict(list)
        with TemporaryDirectory() as folder:
            for clip in clips_asked("scenes", "validation", args.seed, args.limit):
                with demo_video(clip, Path(folder)) as video:
                    if video.path.suffix == ".mp4":
                        continue
                    for times in TIMES:
                        path = Path(folder, f"large{video.path.suffix}")
                        picture = Image.open(video.path)
                        size = [round(side * times**0.5) for side in picture.size]
                        picture.resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
                        for share in SHARES:
                            encoded = VideoQA(loaded, budget=share).encode(path)
                            for row in video.rows:
                                answer = encoded.ask(row.prompt, max_new_tokens=32)
                                right = bool(grade(row, answer.text))
                                counts = answer.report.pruning
                                found[times, share].append((counts.visual_tokens_in, counts.visual_tokens_kept, right))
        for times, share in itertools.product(TIMES, SHARES):
            units, tokens, right = np.mean(found[times, share], 0)
            kept = right / np.mean(found[times, 1.0], 0)[2]
            print(
                f"| {weights} | {units:.0f} | {share:g} | {tokens:.0f} | {100 * right:.1f}% | {100 * kept:.1f}% |",
                flush=True,
            )


if __name__ == "__main__":
    main()
