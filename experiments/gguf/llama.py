"""Run llama.cpp on GGUF files: quantize them, and compute token IDs and logits. Needs llama-cpp-python."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

COLUMNS = 1024  # size of the context


def quantize(source: Path, out: Path, kind: str) -> None:
    """Quantize a text file with the function that llama.cpp's program for this calls. `kind` is a name such as "Q4_K_M".

    Raises:
        RuntimeError: If llama.cpp cannot quantize the file.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    usual = "ALL" if kind == "F32" else "MOSTLY"
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{usual}_{kind}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantize {source} as {kind}")


def _plain_model_params() -> llama_cpp.llama_model_params:
    """Return default parameters for models whose weights are not repacked, because AMX products crash with small models."""
    params = _DEFAULTS()
    params.use_extra_bufts = False
    return params


_DEFAULTS = llama_cpp.llama_cpp.llama_model_default_params
llama_cpp.llama_cpp.llama_model_default_params = _plain_model_params


class Model:
    """A text file, with its projector if pictures are read. Keys and values are stored in float32."""

    def __init__(self, text: Path, projector: Path | None = None):
        f32 = llama_cpp.GGML_TYPE_F32
        self._llama = llama_cpp.Llama(
            str(text),
            n_ctx=COLUMNS,
            n_batch=COLUMNS,
            n_ubatch=COLUMNS,
            logits_all=True,
            type_k=f32,
            type_v=f32,
            verbose=False,
        )
        self._media = None
        if projector is not None:
            options = mtmd_cpp.mtmd_context_params_default()
            options.n_threads = 1
            options.use_gpu = options.print_timings = options.warmup = False
            self._media = mtmd_cpp.mtmd_init_from_file(str(projector).encode(), self._llama.model, options)
            if not self._media:
                raise RuntimeError(f"llama.cpp cannot load {projector}")

    def encode(self, text: str) -> list[int]:
        """Return the token IDs of a text that may contain special tokens."""
        return self._llama.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits after each token, float32 `[tokens, vocabulary]`."""
        self._llama.reset()
        self._llama.eval(ids)
        return self._llama.scores[: len(ids)].copy()

    def logits_after_picture(self, picture: np.ndarray, before: str, after: str) -> tuple[np.ndarray, int]:
        """Return the logits after a prompt with a picture, float32 `[vocabulary]`, and the number of tokens in the prompt.

        Args:
            picture: uint8 `[height, width, 3]`.
            before: The text before the picture, without the token that begins a picture.
        """
        height, width, _ = picture.shape
        pixels = np.ascontiguousarray(picture).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(mtmd_cpp.mtmd_bitmap_init(width, height, pixels))
        text = (before + mtmd_cpp.mtmd_default_marker().decode() + after).encode()
        prompt = mtmd_cpp.mtmd_input_text(text=text, text_len=len(text), add_special=False, parse_special=True)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        self._llama.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
        past = llama_cpp.llama_pos(0)
        failed = mtmd_cpp.mtmd_tokenize(self._media, chunks, ctypes.byref(prompt), bitmaps, 1)
        failed = failed or mtmd_cpp.mtmd_helper_eval_chunks(
            self._media, self._llama.ctx, chunks, past, 0, COLUMNS, True, ctypes.byref(past)
        )
        if failed:
            raise RuntimeError(f"llama.cpp cannot read the picture: {failed}")
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        tokens = mtmd_cpp.mtmd_helper_get_n_tokens(chunks)
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return np.ctypeslib.as_array(logits, (self._llama.n_vocab(),)).copy(), tokens
