"""Answer requests from `experiments.speed.peers` with llama.cpp, in an environment with llama-cpp-python.

This script imports nothing from this repository. It reads one request per line from stdin, and answers each with a line of JSON.
"""

import ctypes
import json
import os
import resource
import sys
import time

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "What happens in this video?<|im_end|>\n<|im_start|>assistant\n"


class Model:
    """A model with its projector. Like Qwen2.5-VL, llama.cpp joins every two frames into a frame pair."""

    def __init__(self, model: str, projector: str, threads: int):
        begun = time.perf_counter()
        self.llama = llama_cpp.Llama(
            model, n_ctx=8192, n_batch=2048, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.context = self.llama.ctx
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu = False
        options.n_threads = threads
        options.print_timings = False
        options.image_min_tokens = 4
        self.media = mtmd_cpp.mtmd_init_from_file(projector.encode(), self.llama.model, options)
        if not self.media:
            raise SystemExit("the projector cannot be loaded")
        self.load_s = time.perf_counter() - begun

    def chunks(self, frames: np.ndarray):
        """Return the prompt as a sequence of chunks. `frames` is uint8 `[N, H, W, 3]`."""
        count, height, width, _ = frames.shape
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * count)()
        for i, frame in enumerate(np.ascontiguousarray(frames)):
            pixels = frame.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps[i] = mtmd_cpp.mtmd_bitmap_init(width, height, pixels)
            mtmd_cpp.mtmd_bitmap_set_mergeable(bitmaps[i], True)
        text = (BEFORE + mtmd_cpp.mtmd_default_marker().decode() * count + AFTER).encode()
        made = mtmd_cpp.mtmd_input_chunks_init()
        given = mtmd_cpp.mtmd_input_text(text=text, text_len=len(text), add_special=False, parse_special=True)
        if failed := mtmd_cpp.mtmd_tokenize(self.media, made, ctypes.byref(given), bitmaps, count):
            raise SystemExit(f"the prompt cannot be made: {failed}")
        return made

    def answer(self, frames: np.ndarray, new: int) -> dict:
        """Return the times for encode, prefill, and each of `new` tokens in seconds, along with the token counts."""
        made = self.chunks(frames)
        pieces = [mtmd_cpp.mtmd_input_chunks_get(made, i) for i in range(mtmd_cpp.mtmd_input_chunks_size(made))]
        counts = [mtmd_cpp.mtmd_input_chunk_get_n_tokens(piece) for piece in pieces]
        pictures = [mtmd_cpp.mtmd_input_chunk_get_type(piece) == 1 for piece in pieces]
        width = llama_cpp.llama_model_n_embd(self.llama.model)
        start = time.perf_counter()
        features = []
        for piece, count, picture in zip(pieces, counts, pictures, strict=True):
            if picture:
                if mtmd_cpp.mtmd_encode_chunk(self.media, piece):
                    raise SystemExit("a frame cannot be encoded")
                found = mtmd_cpp.mtmd_get_output_embd(self.media)
                features.append(np.ctypeslib.as_array(found, (count * width,)).copy())
        encoded = time.perf_counter()
        past = llama_cpp.llama_pos(0)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        waiting = iter(features)
        for number, (piece, picture) in enumerate(zip(pieces, pictures, strict=True), 1):
            after = llama_cpp.llama_pos(past.value)
            if picture:
                values = next(waiting).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                failed = mtmd_cpp.mtmd_helper_decode_image_chunk(
                    self.media, self.context, piece, values, past, 0, 2048, ctypes.byref(after),
                    mtmd_cpp.mtmd_helper_post_decode_callback(), None,
                )  # fmt: skip
            else:
                last = number == len(pieces)
                failed = mtmd_cpp.mtmd_helper_eval_chunk_single(
                    self.media, self.context, piece, past, 0, 2048, last, ctypes.byref(after)
                )
            if failed:
                raise SystemExit(f"piece {number} cannot be read: {failed}")
            past = after
        token = self._best()
        read = time.perf_counter()
        for _ in range(new):
            one = (llama_cpp.llama_token * 1)(token)
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(one, 1)):
                raise SystemExit("a token cannot be generated")
            token = self._best()
        end = time.perf_counter()
        mtmd_cpp.mtmd_input_chunks_free(made)
        visual = sum(count for count, picture in zip(counts, pictures, strict=True) if picture)
        return {
            "encode": encoded - start,
            "prefill": read - encoded,
            "token": (end - read) / new,
            "visual": visual,
            "prompt": sum(counts),
            "load": self.load_s,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }

    def _best(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).argmax())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints to stdout
    model = None
    for line in sys.stdin:
        if model is None:
            path, projector, threads = sys.argv[1:]
            model = Model(path, projector, int(threads))
        request = json.loads(line)
        frames = np.fromfile(request["raw"], np.uint8).reshape(request["shape"])
        print(json.dumps(model.answer(frames, request["new"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
