"""Two hours of stream, simulated faster: memory and the time to answer stay what they are."""

import time
from dataclasses import replace

import numpy as np
import pytest

from evoprune.backend.devices import memory_in_use, reset_peak_memory
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA


@pytest.mark.slow
def test_two_hours():
    qa, held, waits = VideoQA(replace(load_model("demo"), demo=None), budget=0.25), {}, {}
    pictures = np.random.default_rng(0).integers(0, 256, (64, 112, 168, 3), dtype=np.uint8)
    with qa.stream(memory_s=240.0) as stream:
        for number in range(2 * 7200):
            stream.add(pictures[number * 7 % 64], number / 2)
            if number % 600 == 599:  # every five minutes
                begun = time.perf_counter()
                answer = stream.ask("What happens?", max_new_tokens=1)
                next(answer, None)
                answer.close()
                reset_peak_memory("cpu")  # which gives back what the C library keeps
                held[number // 2], waits[number // 2] = memory_in_use("cpu")[0], time.perf_counter() - begun
        seen = stream.seen
    first, *later = held.values()
    assert len(later) == 23 and max(later) <= 1.05 * first, held
    assert seen.frames == 14_400 and seen.tokens <= 30 * 48 and 0 < seen.thinned < seen.windows
    assert seen.end_s - seen.start_s > 240.0  # further back than what is whole
    assert np.median(list(waits.values())[-8:]) < 2 * np.median(list(waits.values())[:8]) + 0.05, waits
