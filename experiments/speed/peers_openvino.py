"""Answer the requests of `experiments.speed.peers` with OpenVINO GenAI, in an environment with openvino-genai.

This script imports nothing from this repository. It reads one request per line of stdin and answers each with a line of JSON.
"""

import json
import os
import resource
import sys
import time

import numpy as np
import openvino
import openvino_genai

QUESTION = "What happens in this video?"


class Clock(openvino_genai.StreamerBase):
    """Records when each token arrives."""

    def __init__(self):
        super().__init__()
        self.times = []

    def write(self, token) -> openvino_genai.StreamingStatus:
        self.times += [time.perf_counter()] * (len(token) if isinstance(token, list) else 1)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class Model:
    def __init__(self, folder: str, threads: int):
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.enable_prefix_caching = False  # a repeated prompt would otherwise take no time
        begun = time.perf_counter()
        self.pipeline = openvino_genai.VLMPipeline(
            folder, "CPU", scheduler_config=scheduling, INFERENCE_NUM_THREADS=threads
        )
        self.load_s = time.perf_counter() - begun

    def answer(self, frames: np.ndarray, new: int, pruned: int) -> dict:
        """Return times in seconds and the number of visual tokens.

        OpenVINO GenAI doesn't prune videos for Qwen2.5-VL. With pruning, it therefore gets every second frame as an image, which
        results in the same number of visual tokens.

        Args:
            frames: uint8 `[N, H, W, 3]`.
            new: Number of answer tokens.
            pruned: Percentage of visual tokens to prune after the vision encoder.
        """
        settings = self.pipeline.get_generation_config()
        settings.max_new_tokens = settings.min_new_tokens = new + 1
        settings.ignore_eos = True
        settings.do_sample = False
        settings.pruning_ratio = pruned
        inputs = (
            {"images": [openvino.Tensor(frame[None].copy()) for frame in frames[::2]]}
            if pruned
            else {"videos": [openvino.Tensor(frames)]}
        )
        clock = Clock()
        start = time.perf_counter()
        made = self.pipeline.generate(QUESTION, generation_config=settings, streamer=clock, **inputs)
        first = clock.times[0] - start
        encode = made.perf_metrics.get_prepare_embeddings_duration().mean / 1000
        pairs, height, width = len(frames) // 2, frames.shape[1] // 28, frames.shape[2] // 28
        return {
            "encode": encode,
            "prefill": first - encode,
            "token": (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1),
            "visual": round(pairs * height * width * (1 - pruned / 100)),
            "prompt": made.perf_metrics.get_num_input_tokens(),
            "load": self.load_s,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep stdout for the answers
    model = None
    for line in sys.stdin:
        if model is None:
            folder, threads = sys.argv[1:]
            model = Model(folder, int(threads))
        request = json.loads(line)
        frames = np.fromfile(request["raw"], np.uint8).reshape(request["shape"])
        print(json.dumps(model.answer(frames, request["new"], request["pruned"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
