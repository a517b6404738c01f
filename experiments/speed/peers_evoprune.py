"""Answer requests from `experiments.speed.peers` with evoprune."""

import argparse
import resource
import time
from typing import Any

from experiments.speed.processes import serve

QUESTION = "What happens in this video?"


class Model:
    """A loaded evoprune model that answers requests at any budget."""

    def __init__(self, args: argparse.Namespace):
        begun = time.perf_counter()
        from evoprune import VideoQA

        self._qa = VideoQA.load(
            args.model, dtype=args.dtype, quantize=args.quantize, threads=args.threads, offline=True
        )
        self._load_s = time.perf_counter() - begun

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        from evoprune import VideoQA

        self._qa.loaded.packing.finish()
        encoded = VideoQA(self._qa.loaded, budget=request["budget"]).encode(request["folder"])
        answer = encoded.ask(QUESTION, max_new_tokens=request["new"] + 1)
        for _ in answer:
            pass
        report = answer.report
        return {
            "encode": report.time_ms.encode / 1000,
            "prefill": report.time_ms.prefill / 1000,
            "token": report.time_ms.generate / 1000 / request["new"],
            "visual": report.tokens.visual,
            "prompt": report.tokens.prompt,
            "load": self._load_s,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--quantize", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    serve(lambda: Model(args).answer)


if __name__ == "__main__":
    main()
