"""Answer requests from `experiments.speed.peers` with evoprune."""

import argparse
import os
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
        path = request["path"]
        os.utime(path)  # a new mtime invalidates the patches cached by an earlier question
        part = {name: request[name] for name in ("end_s", "frames") if name in request}
        begun = time.perf_counter()
        encoded = VideoQA(self._qa.loaded, budget=request["budget"]).encode(path, **part)
        answer = encoded.ask(QUESTION, max_new_tokens=request["new"] + 1)
        for _ in answer:
            pass
        whole_s = time.perf_counter() - begun
        report = answer.report
        encode_s, prefill_s, generate_s = (
            ms / 1000 for ms in (report.time_ms.encode, report.time_ms.prefill, report.time_ms.generate)
        )
        return {
            "read": whole_s - encode_s - prefill_s - generate_s if os.path.isfile(path) else None,
            "encode": encode_s,
            "prefill": prefill_s,
            "token": generate_s / request["new"],
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
