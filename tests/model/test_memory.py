"""Test memory estimates, the fallbacks used when memory is low, and that running out of memory is always reported as such."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from evoprune import methods
from evoprune.backend import Device, Quantization
from evoprune.errors import NO_MEMORY, USE_LESS, OutOfMemory, error_record, is_out_of_memory, memory_guard
from evoprune.methods import TowerShape
from evoprune.model.cost import ROW_COPIES, Cost
from evoprune.model.weights import QwenVL
from evoprune.session import ModelOptions, describe, encoding, load_model, memory, open_inputs, weights_of
from evoprune.session.loading.weights import needed_bytes
from evoprune.util import size
from evoprune.video_qa import VideoQA
from experiments.speed.checkpoint import write_checkpoint
from tests import gguf_files
from tests.quantized import KINDS
from tests.threads import one_thread  # noqa: F401
from tests.video.files import spoil

CLIP = "samples/square.mp4"
CPU, GIB = torch.device("cpu"), 2**30


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32")


def raised_by_torch() -> BaseException:
    try:
        torch.empty(2**50, dtype=torch.uint8)
    except RuntimeError as problem:
        return problem
    raise AssertionError("there is memory for it")


OUT = r"(?m)^out of memory in encode(: 2.* requested)?$"


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        raised_by_torch(),
    ],
    ids=repr,
)
def test_its_many_names(problem):
    assert is_out_of_memory(problem)
    record = error_record(problem)
    assert (record["code"], record["type"], record["stage"]) == (5, "out_of_memory", None) and USE_LESS in record[
        "hint"
    ]
    if not isinstance(problem, ImportError):
        with pytest.raises(OutOfMemory, match=OUT) as caught, memory_guard("encode"):
            raise problem
        assert caught.value.stage == "encode" and caught.value.__cause__ is problem
    for other in (
        RuntimeError("shapes"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive. Run workload with ..."),
        OSError(28, "No space"),
        KeyError(NO_MEMORY[0]),
    ):
        assert not is_out_of_memory(other)
        with pytest.raises(type(other)) as caught, memory_guard("encode"):
            raise other
        assert caught.value is other


def test_what_is_foretold_of_a_real_model():
    """With the 3B model, one piece needs little memory, a whole video needs much more, and a long prompt adds to it."""
    config = describe(ModelOptions("Qwen/Qwen2.5-VL-3B-Instruct", load_format="dummy")).config
    few = Cost(config).working_memory(4096, 512, 1024, 2)
    assert 2**28 < few < GIB
    assert Cost(config).working_memory(4096, 4096, 1024, 2) > few + GIB
    assert Cost(config).working_memory(24_576, 512, 24_576, 2) > few + 2 * GIB
    # The number of rows at a time is capped by the number of rows.
    assert Cost(config).working_memory(100, 10**9, 50, 2) == Cost(config).working_memory(100, 100, 50, 2)
    # The input embedding and the quantized layers.
    whole = QwenVL.empty(config).to(torch.bfloat16)
    bits = sum(weight.nbytes for weight in whole.parameters())
    assert 4.0 * GIB < bits - Quantization("int8").saved_bytes(whole) < 4.2 * GIB
    if "int4" in KINDS:
        assert bits - Quantization("int4").saved_bytes(whole) == pytest.approx(2.8 * GIB, abs=0.1 * GIB)


def test_what_is_foretold_of_rows_that_are_held_for_a_whole_video():
    """The estimates are for the 3B model in bf16 with 16,384 units."""
    config = describe(ModelOptions("Qwen/Qwen2.5-VL-3B-Instruct", load_format="dummy")).config
    tower, grid = TowerShape(32, (7, 15, 23, 31)), (64, 16, 16)
    row = 4 * 1280 * 2

    def foretold(name: str, piece_units: int = 512) -> int:
        return memory.encoding_bytes(
            config, methods.MethodChain.parse(name).plan(tower, grid, 1638), piece_units, 2, 1638 + memory.TEXT
        )

    after = foretold("divprune")
    assert foretold("earlytom") == after + 16_384 * 2 * row  # means of frame pairs, in float32
    assert foretold("ipcv") == after + 16_384 * 6 * row  # earlier states and motion, in float32
    assert foretold("evoprune") < after < foretold("divprune", 4096)

    def selected(units: int, rows: int, piece_units: int = 128) -> int:
        return Cost(config).working_memory(units, piece_units, 1024, 2, rows, rows)

    # The embeddings of all units plus a copy for their distances; a selected row in the tower and after it.
    assert selected(32_768, 100) - selected(16_384, 100) == 16_384 * 2 * row
    assert selected(16_384, 12_288) - selected(16_384, 8192) == 4096 * (ROW_COPIES * row + 2048 * 2)


def test_layers_that_read_fewer_tokens_hold_and_cost_less():
    config = describe(ModelOptions("Qwen/Qwen2.5-VL-3B-Instruct", load_format="dummy")).config
    text, lengths = config.text_config, [1000] * 2 + [250] * 34
    needs = Cost(config)
    assert needs.kv_bytes([1000] * 36) == needs.kv_bytes(1000)
    saved = 2 * 34 * 750 * text.num_key_value_heads * 128 * 2  # keys and values in bf16
    assert needs.kv_bytes(1000) - needs.kv_bytes(lengths) == saved
    # The first layers have full width.
    assert needs.language_bytes(1000, 2) - needs.language_bytes(lengths, 2) == saved
    whole, few = needs.prefill_flop(1000), needs.prefill_flop(250)
    assert needs.prefill_flop([1000] * 36) == pytest.approx(whole)
    output = 2 * text.hidden_size * text.vocab_size
    assert needs.prefill_flop(lengths) == pytest.approx(output + (whole - output) * 2 / 36 + (few - output) * 34 / 36)


def test_memory_that_this_process_may_not_have_is_not_available():
    if Device("cpu").available_memory() is None:
        pytest.skip("this system does not tell")
    pid = os.fork()
    if pid == 0:
        mapped = next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmSize")) * 1024  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**27, -1))
        os._exit(0 if 2**25 < Device("cpu").available_memory() <= 2**27 else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])  # the file has fp32, which stays in the mapped file
def test_weights_that_will_not_fit_are_not_read(saved, monkeypatch, dtype):
    monkeypatch.setattr(Device, "available_memory", lambda self: 10**5)
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(OutOfMemory, match=r"^loading .* needs about \d MiB of memory, and 0 MiB are ava") as caught:
        load_model(str(saved), dtype=dtype)
    assert (caught.value.stage, caught.value.exit_code) == ("load", 5) and "smaller model" in caught.value.hint
    assert "quantize" not in caught.value.hint and "--dtype" not in caught.value.hint


def test_mapped_embeddings_count_only_if_all_rows_are_read():
    """Lookups read few rows of a mapped file, but an unquantized output layer reads the embeddings to which it is tied."""

    table = 248_320 * 2048 * 2
    for tied, quantize in product((True, False), ("none", *KINDS)):
        config = describe(ModelOptions("Qwen/Qwen3.5-2B", load_format="dummy")).config
        config = replace(config, tie_word_embeddings=tied)
        read, mapped = (needed_bytes(config, torch.bfloat16, quantize, mapped=each) for each in (False, True))
        unread = 0 if tied and quantize == "none" else table
        saved = 0 if quantize == "none" else Quantization(quantize).saved_bytes(QwenVL.empty(config).bfloat16())
        assert read - mapped == unread + saved


@pytest.mark.skipif(not KINDS, reason="this CPU cannot quantise")
def test_gguf_files_need_as_much_as_a_folder_at_later_starts(saved, tmp_path, monkeypatch):
    """Later starts map all weights from a stored file."""
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    text = gguf_files.Folder(saved).write_pair(tmp_path, kind="Q8_0")
    folder, files = (weights_of(describe(ModelOptions(str(path)))) for path in (saved, text))
    assert files.bytes_as("bf16", KINDS[0]) == folder.bytes_as("bf16", KINDS[0])
    assert files.bytes_as("bf16", "none") > files.bytes_as("bf16", KINDS[0])


@pytest.mark.full
@pytest.mark.skipif(not KINDS, reason="this CPU cannot quantise")
def test_the_peak_of_a_later_start_is_as_foretold(tmp_path):
    """With the dimensions of Qwen3.5-0.8B. Its embeddings take as much memory as all quantized layers."""
    folder = tmp_path / "model"
    write_checkpoint(folder, "Qwen/Qwen3.5-0.8B")
    options = ["-m", str(folder), "--quantize", KINDS[0], "--dtype", "bf16", "-b", "0.25", "--json"]

    def run(*words: str) -> dict:
        command = [sys.executable, "-m", "evoprune_cli", *words, *options]
        env = os.environ | {"EVOPRUNE_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["memory"]

    foretold = run("inspect", CLIP)
    peaks = [run("ask", CLIP, "?", "-n", "4", "--store-quantized")["peak_bytes"] for _ in range(2)]
    print(foretold, peaks)
    assert foretold["needed_bytes"] / 1.1 < peaks[1] < 1.1 * foretold["used_if_free_bytes"] < peaks[0]


@pytest.mark.skipif(not KINDS, reason="this CPU cannot quantise")
def test_fewer_bits_are_suggested_where_they_fit(saved, monkeypatch):
    config = describe(ModelOptions(str(saved))).config
    kind = KINDS[0]
    wide, small = (needed_bytes(config, torch.float32, each, mapped=True) for each in ("none", kind))
    assert small < wide
    monkeypatch.setattr(Device, "available_memory", lambda self: small)
    with pytest.raises(OutOfMemory) as caught:
        load_model(str(saved), dtype="fp32")
    assert re.search(rf"^--quantize {kind} needs about \d+ MiB for the weights; ", caught.value.hint)
    assert caught.value.hint.endswith("or use a smaller model")
    loaded = load_model(str(saved), dtype="fp32", quantize=kind)
    mapped = loaded.model.model.language_model.embed_tokens.weight.nbytes
    assert loaded.weights_bytes - mapped <= 1.001 * small


def test_half_the_bytes_are_suggested_where_they_fit(saved, monkeypatch):
    monkeypatch.setattr(Device, "available_memory", lambda self: 10**8)
    found = weights_of(describe(ModelOptions(str(saved), dtype="fp32")))
    slow = "" if Device(found.device).default_dtype == "bf16" else ", which is slow on this device,"
    need = found.bytes_as("bf16", "none")
    assert need < found.bytes
    assert f"--dtype bf16{slow} needs about {size(need)} for the weights" in found.what_fits()
    beside = 10**8 - need + 1
    assert found.what_fits(beside, quantized=False) == "use a smaller model"


def test_a_video_that_will_not_fit_is_not_read(loaded, monkeypatch):
    monkeypatch.setattr(Device, "available_memory", lambda self: 2**26)
    read = []
    monkeypatch.setattr(encoding, "read_chunks", lambda *_, **__: read.append(1))
    video = open_inputs(VideoQA(loaded, budget=0.5).session, [CLIP])
    with pytest.raises(
        OutOfMemory, match=r"square.mp4 needs about \d+ MiB of memory, and 64 MiB .*12 frames"
    ) as caught:
        video.encode()
    assert (caught.value.stage, caught.value.hint, read) == ("encode", USE_LESS, [])
    for knob in ("--frames", "-b", "--max-visual-tokens", "max_visual_tokens", "budget"):
        assert knob in USE_LESS


def test_less_is_encoded_at_a_time_where_memory_is_short(loaded, monkeypatch):
    qa, used, real = VideoQA(loaded, budget=0.5, method="evs"), [], encoding.encode_rows
    per_pair, needed = 24, Cost(loaded.model.config).working_memory

    def encode(*args, piece_units, **how):
        used.append(piece_units)
        return real(*args, piece_units=piece_units, **how)

    monkeypatch.setattr(encoding, "encode_rows", encode)
    monkeypatch.setattr(Device, "piece_units", 4 * per_pair)
    video = qa.encode(CLIP)
    assert video.plan.grid[1:] == (4, 6) and used == [96]
    free = needed(video.plan.visual_tokens, 48, video.plan.encoder.keep + memory.TEXT, 4)
    monkeypatch.setattr(Device, "available_memory", lambda self: free)
    again = qa.encode(CLIP)
    assert used == [96, 48]
    torch.testing.assert_close(again.encoded.features, video.encoded.features)


@pytest.mark.few(2)
@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize(("room", "tried"), [(24, [96, 48, 24]), (23, [96, 48, 24])])
def test_chunks_shrink_before_it_gives_up(loaded, monkeypatch, tmp_path, threaded, room, tried):
    """In one case, the tower has enough memory for a single frame pair. In the other, it does not even have that."""
    clip = spoil(Path(CLIP), tmp_path / "damaged.mp4", {40, 50})
    monkeypatch.setattr(encoding, "OpenInputs", partial(encoding.OpenInputs, threaded=threaded))
    qa, used, real = VideoQA(loaded, budget=0.5, method="evs"), [], encoding.encode_rows
    whole = "".join(open_inputs(qa.session, [clip]).encode().ask("What happens?", max_new_tokens=4))
    loaded.patches.clear()

    def encode(*args, piece_units, **how):
        used.append(piece_units)
        made = real(*args, piece_units=piece_units, **how)  # all input was read before
        if piece_units > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made

    monkeypatch.setattr(encoding, "encode_rows", encode)
    monkeypatch.setattr(Device, "piece_units", 96)
    if room < 24:
        with pytest.raises(OutOfMemory, match=OUT):
            open_inputs(qa.session, [clip]).encode()
    else:
        video = open_inputs(qa.session, [clip]).encode()
        answer = video.ask("What happens?", max_new_tokens=4)
        assert "".join(answer) == whole
        assert answer.report.video.damaged == 2  # counted once, not once per attempt
        times = answer.report.time_ms
        assert min(times.read, times.preprocess, times.encode) > 0 and times.total >= times.encode
    assert used == tried
