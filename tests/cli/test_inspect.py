"""`evoprune inspect`: facts without weights."""

import json

import evoprune

CLIP = "samples/square.mp4"


def test_machine(cli):
    record = cli("inspect", "--json").record
    assert record["decoders"]["pyav"] == "works" and record["devices"]["cpu"]
    assert "evoprune" in record["methods"] and record["versions"]["torch"]
    assert "pyav" in cli("inspect").out


def test_video_and_plan(cli):
    result = cli("inspect", CLIP, "--json", "--scan")
    record = result.record
    assert result.code == 0 and result.err == ""
    assert record["video"]["codec"] == "h264" and record["scan"]["frames"] == 72 and record["scan"]["damaged"] == 0
    assert record["plan"]["grid"] == [6, 4, 6] and record["plan"]["presets"]["fast"]["tokens"] == 14


def test_plan_of_a_real_model_needs_no_network(cli):
    plan = cli("inspect", CLIP, "-m", "Qwen/Qwen2.5-VL-7B-Instruct", "--frames", "8", "--json").record["plan"]
    assert plan["frames"] == 8 and plan["visual_tokens"] == 4 * 10 * 14
    # 28 layers, 4 key/value heads of 128, keys and values, bf16
    assert plan["presets"]["full"]["kv_cache_bytes"] == 560 * 28 * 4 * 128 * 2 * 2


def test_text_is_for_people(cli):
    out = cli("inspect", CLIP).out
    assert "6.000 s (0:06.0)" in out and "balanced" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_video_from_stdin(cli):
    with open(CLIP, "rb") as file:
        record = cli("inspect", "-", "--scan", "--json", stdin=file.read()).record
    assert record["video"]["path"] == "-" and record["scan"]["frames"] == 72 and record["plan"]["frames"] == 12


def test_reading_a_folder_of_frames(cli, tmp_path):
    from PIL import Image

    for number in (1, 2, 10):
        Image.new("RGB", (120, 120), (number * 20, 0, 0)).save(tmp_path / f"frame{number}.png")
    record = json.loads(cli("inspect", tmp_path, "--json").out)
    assert record["video"]["frames_total"] == 3 and record["video"]["codec"] == "png"
    assert evoprune.__version__
