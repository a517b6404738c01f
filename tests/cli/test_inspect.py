"""`evoprune inspect`: facts without weights, and overlays."""

import os
import shutil
import socket
import sys

import av
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from evoprune.backend import Device
from evoprune.bundled import DEMOS
from evoprune.methods.evoprune import EvoPruneMethod
from evoprune_cli.inspect import TITLE, lines
from evoprune_cli.inspection import environment_facts
from tests.backend.cpu.library import use
from tests.decoders import needs_decord
from tests.quantized import KINDS
from tests.video.files import write_video

CLIP = "samples/square.mp4"


@pytest.fixture
def no_network_no_weights(monkeypatch, tmp_path):
    """An empty hub cache; connecting or reading weights fails the test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))


def test_what_a_model_needs_before_it_is_downloaded(cli, no_network_no_weights):
    args = ("inspect", "-m", "Qwen/Qwen2.5-VL-3B-Instruct", "--dtype", "bf16")
    model = cli(*args, "--json").record["model"]
    assert (model["on_disk"], model["folder"], model["dtype"]) == (False, None, "bf16")
    assert model["download_bytes"] == model["weights_bytes"] == 2 * model["parameters"] == 2 * 3_754_622_976
    out = cli(*args).out
    for line in ("on disk             no", "download            7.0 GiB", "parameters          3.75 billion"):
        assert f"  {line}" in out.splitlines()
    assert "  tower               32 layers, hidden size 1,280" in out
    assert "python" not in out and "python" in cli("inspect").out  # without -m, the machine is described


def test_a_model_in_the_hubs_cache(cli, no_network_no_weights, tmp_path, tiny_folder):
    folder = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_folder, folder)
    (tmp_path / "hub" / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    found = cli("inspect", "-m", "org/tiny", "--json").record["model"]
    assert (found["on_disk"], found["folder"], found["download_bytes"]) == (True, str(folder), 0)
    (folder / "model.safetensors").unlink()
    assert not cli("inspect", "-m", "org/tiny", "--json").record["model"]["on_disk"]


def test_a_model_of_which_nothing_is_known_here(cli, no_network_no_weights):
    result = cli("inspect", CLIP, "-m", "org/other")
    assert result.code == 4 and "org/other is not on this machine" in result.err
    assert "hf download org/other config.json" in result.err
    for name in ("org/other-", "org/other.git", f"org/{'o' * 200}"):  # names that the hub's own library refuses
        assert cli("inspect", "-m", name).code == 4
    assert "hint: evoprune runs Qwen3.8, Qwen3.6, Qwen3.5, Qwen3-VL, Qwen2.5-VL and Qwen2-VL" in result.err
    assert "hint: its small config files are enough" in cli("inspect", "-m", "org/My-Qwen2.5-VL-3B").err
    misspelt = cli("inspect", "-m", "Qwen/Qwen2.5-VL-3B")
    assert misspelt.out == "" and misspelt.err.endswith("hint: did you mean Qwen/Qwen2.5-VL-3B-Instruct?\n")
    without_video = cli("inspect", "-m", "org/other")
    assert without_video.code == 4 and without_video.out == ""


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [("-b", "0.1"), ("-b", "0.5", "--method", "downscale"), ("--frames", "4")])
def test_the_memory_is_that_of_the_check_before_a_run(cli, tiny_folder, monkeypatch, options):
    needed = []
    monkeypatch.setattr(Device, "shortage", lambda self, size: needed.append(size))
    args = (CLIP, "-m", tiny_folder, *options, "--dtype", "fp32", "--json")
    record = cli("inspect", *args).record
    assert not needed and record["memory"]["enough"] in (True, None)
    made = cli("ask", CLIP, "?", "-n", "1", *args[1:]).record
    assert [record["model"]["weights_bytes"], record["memory"]["working_bytes"]] == needed[:2]
    assert record["memory"]["visual_tokens"] == made["pruning"]["visual_tokens_kept"]
    memory = record["memory"]
    assert memory["needed_bytes"] == sum(memory[f"{part}_bytes"] for part in ("program", "weights", "working"))
    assert memory["needed_bytes"] < memory["used_if_free_bytes"] < 3 * memory["needed_bytes"]


def test_the_layers_that_drop_tokens_are_shown(cli):
    args = ("inspect", CLIP, "-m", "Qwen/Qwen3.5-2B", "--method", "fastv", "-b", "0.25")
    layers = cli(*args, "--json").record["memory"]["language_layers"]
    assert layers == [[layer, 120 if layer < 4 else 30] for layer in range(24)]
    assert "language layers     120 from layer 0 on, 30 from layer 4 on\n" in cli(*args).out
    assert "language layers" not in cli(*args[:4]).out
    assert "needs attention in every layer" in cli(*args[:5], "visipruner").err


@pytest.mark.full
@pytest.mark.skipif(not KINDS, reason="this CPU cannot quantise")
def test_fewer_bits_need_less_memory_whether_or_not_the_model_is_here(cli, no_network_no_weights, tiny_folder):
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", tiny_folder):
        dtype = "fp32" if name == tiny_folder else "bf16"
        sizes = [
            cli("inspect", "-m", name, "--dtype", dtype, "--quantize", kind, "--json").record["model"]["weights_bytes"]
            for kind in ("none", KINDS[0])
        ]
        assert sizes[0] > sizes[1] > sizes[0] / 3


def test_short_memory_is_counted_with_fewer_units_at_a_time(cli, tiny_folder, monkeypatch):
    args = ("inspect", CLIP, "--frames", "24", "-m", tiny_folder, "--json")
    usual = cli(*args).record["memory"]
    monkeypatch.setattr(Device, "available_memory", lambda self: usual["needed_bytes"] - 1)
    short = cli(*args).record["memory"]
    assert short["enough"] and short["needed_bytes"] < usual["needed_bytes"]
    monkeypatch.setattr(Device, "available_memory", lambda self: 1)
    assert not cli(*args).record["memory"]["enough"]


@pytest.mark.parametrize("columns", [45, 80])
def test_it_fits_the_terminal(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("EVOPRUNE_BUDGET", "fast")
    product = "A Processor(R) of a Long Name CPU @ 2.00GHz"
    monkeypatch.setattr(Device, "product_name", product)
    text = cli("inspect").out + cli("inspect", CLIP).out
    assert "  EVOPRUNE_BUDGET" in text
    for line in text.splitlines():
        path = os.path.isabs(line[TITLE:]) or " " not in line[TITLE:]  # paths stay in one piece and may contain spaces
        assert len(line) <= columns or path, line


@pytest.mark.parametrize("name", ["b_raise", "length_s", "args", "a_name_that_is_longer_than_its_column"])
def test_methods_of_other_packages_are_shown_by_their_names(name):
    assert lines({"method_plugins": {name: "of extra 1.2"}})[1].split() == [name, "of", "extra", "1.2"]


@pytest.mark.skipif(not KINDS, reason="this CPU cannot quantise")
def test_without_the_compiled_library_it_offers_no_int4(cli, monkeypatch):
    use(None, monkeypatch)
    assert cli("inspect", "--json").record["quantize"] == ["int8"]


def test_the_folders_of_the_demo_models_are_shown(cli):
    out, record = cli("inspect").out, cli("inspect", "--json").record
    for key, demo in (("demo_model", DEMOS["demo"]), ("demo_scenes_model", DEMOS["demo-scenes"])):
        assert str(demo.folder) in out and record[f"{key}_folder"] == str(demo.folder) and key in record


def test_what_is_for_an_overlay_is_checked_without_one(cli):
    for wrong in (("-b", "foo"), ("--method", "foo"), ("--method", "evoprune:x")):
        assert cli("inspect", CLIP, *wrong).code == 2


def test_frames_left_out_for_the_models_limit_are_a_cap(cli, tiny_folder):
    plans = [cli("inspect", CLIP, *rate, "-m", tiny_folder, "--json").record["plan"] for rate in ((), ("--fps", "12"))]
    assert [(plan["frames"], plan["capped"]) for plan in plans] == [(12, False), (32, True)]
    assert [plan["cut_by"] for plan in plans] == [[], ["--max-frames 32"]]


def test_video_from_stdin(cli):
    with open(CLIP, "rb") as file:
        record = cli("inspect", "-", "--scan", "--json", stdin=file.read()).record
    assert record["video"]["path"] == "-" and record["scan"]["frames"] == 72 and record["plan"]["frames"] == 12


@pytest.mark.full
@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_overlay(cli, foreign, tmp_path, ending):
    file = tmp_path / f"drawn.{ending}"
    result = cli("inspect", foreign, "--overlay", file, "-b", "0.25", "--json")
    told = result.record["overlay"]
    assert result.code == 0 and result.err.startswith("warning: the demo models know only generated clips")
    assert (told["file"], told["method"], told["budget"]) == (str(file), "evoprune", 0.25)
    assert told["read"] + told["reused"] + told["merged"] + told["dropped"] == told["units"] == 4 * told["read"]
    with av.open(file) as drawn:
        assert sum(1 for _ in drawn.decode(video=0)) == result.record["plan"]["frames"]


@needs_decord
def test_overlay_takes_the_options_of_pruning_and_sampling(cli, tmp_path):
    options = ("--method", "evoprune:reuse=0", "-b", "0.5", "--frames", "4", "--end", "3")
    told = cli("inspect", CLIP, "--overlay", tmp_path / "a.png", *options, "--decoder", "decord", "--json").record
    assert told["plan"]["grid"] == [2, 4, 6] and told["plan"]["end_s"] == 3
    assert (
        told["overlay"]["encoded"] == told["overlay"]["units"]
        and told["overlay"]["rows"] == round(48 * 0.5 ** EvoPruneMethod().rows)
        and told["overlay"]["budget"] == 0.5
    )


def test_an_overlay_never_changes_the_video(cli, tmp_path):
    video = write_video(tmp_path / "clip.mp4", [np.zeros((48, 64, 3), np.uint8)] * 8)
    before = video.read_bytes()
    assert "would change an input" in cli("inspect", video, "--overlay", video).err
    assert "would change an input" in cli("inspect", tmp_path, "--overlay", tmp_path / "frame.png").err
    assert video.read_bytes() == before and not (tmp_path / "frame.png").exists()


def test_the_plan_of_a_picture(cli, tiny_folder, tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    plan = cli("inspect", tmp_path / "a.png", "-m", tiny_folder, "--json").record["plan"]
    assert (plan["resized_hw"], plan["grid"], plan["timestamps_s"]) == ([196, 308], [1, 7, 11], None)
    full, fast = (plan["presets"][name] for name in ("full", "fast"))
    assert (fast["tokens"], fast["share"], fast["budget"]) == (23, 0.3, pytest.approx(23 / 77, abs=1e-3))
    assert fast["kv_cache_bytes"] * 77 == full["kv_cache_bytes"] * 23


def test_inspecting_a_picture(cli, photo, tmp_path):
    assert cli("inspect", photo, "--overlay", tmp_path / "o.png").code == 0 and Image.open(tmp_path / "o.png").size[0]
    result = cli("inspect", photo, "--scan")
    assert result.code == 3 and "nothing to scan" in result.err


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cache_that_cannot_be_emptied(cli, folder, monkeypatch):
    cli("ask", CLIP, "What?", "-n", "1", "--cache", "-q")
    facts, (entry,) = cli("inspect", "--json").record["cache"], folder.iterdir()
    assert (facts["videos"], facts["size_bytes"], facts["limit_bytes"]) == (1, entry.stat().st_size, 2 * 2**30)

    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("evoprune.session.cache.Cache.clear", refused)
    result = cli("inspect", "--clear-cache")
    assert result.code == 2 and "Permission denied" in result.err and len(result.err.splitlines()) == 2


def test_a_file_may_call_its_tags_anything(cli, tmp_path):
    """A tag's name neither formats nor hides its text."""
    tags = {"parameters": "steps 20", "seconds": "about five", "size_bytes": "many", "warnings": "none", "a_b_s": "c"}
    path = tmp_path / "tags.mp4"
    with av.open(CLIP) as source, av.open(path, "w", options={"movflags": "use_metadata_tags"}) as copy:
        copy.metadata.update(tags)
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    result = cli("inspect", str(path))
    assert result.code == 0
    lines = [line.split(maxsplit=1) for line in result.out.splitlines()]
    assert all([name, text] in lines for name, text in tags.items()), result.out
    assert tags.items() <= cli("inspect", str(path), "--json").record["video"]["tags"].items()


@pytest.mark.parametrize("options", [(), ("--json",), ("--debug",)])
def test_variables_that_may_be_secret_have_no_value(cli, monkeypatch, options):
    monkeypatch.setenv("EVOPRUNE_API_KEY", "sk-secret")
    monkeypatch.setenv("EVOPRUNE_OF_A_PLUGIN", "secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("EVOPRUNE_BUDGET", "fast")
    result = cli("inspect", *options)
    assert result.code == 0 and "secret" not in result.out + result.err
    assert all(name in result.out for name in ("EVOPRUNE_API_KEY", "EVOPRUNE_OF_A_PLUGIN"))
    if "--json" in options:
        assert result.record["environment"]["EVOPRUNE_BUDGET"] == "fast"
        assert result.record["environment"]["EVOPRUNE_API_KEY"] == "(set)"
        monkeypatch.setenv("EVOPRUNE_MODEL", "https://user:secret@host/model")
        assert environment_facts(sys.stdout)["environment"]["EVOPRUNE_MODEL"] == "https://host/model"
