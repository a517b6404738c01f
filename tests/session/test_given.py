"""Test inputs that a Python program has in memory: arrays of frames, Pillow images, bytes and open files."""

import io
import json
import os
import tempfile
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evoprune
from evoprune.errors import UsageError, VideoError
from evoprune.session.encoding import inputs_of, open_inputs
from evoprune.video import HeldVideo, probe, read_chunks
from tests.video.files import numbered_frame, numbered_frames, write_video

QUESTION = "What is there?"
RATE = 10.0

pytestmark = pytest.mark.usefixtures("spool")


@pytest.fixture(scope="module")
def qa():
    return evoprune.VideoQA.load("demo", budget=0.5)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.stack(numbered_frames(20, 56, 56))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, frames) -> Path:
    """Return a folder with the same frames as lossless files."""
    made = tmp_path_factory.mktemp("frames")
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(made / f"{number}.png")
    return made


@pytest.fixture(scope="module")
def clip(tmp_path_factory, frames) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", frames)


def features(encoded) -> torch.Tensor:
    (encoding,) = encoded._encodings
    return encoding.encoded.features


def report(encoded):
    answer = encoded.ask(QUESTION, max_new_tokens=1)
    str(answer)
    return answer.report


@pytest.mark.parametrize("kind", ["array", "tensor", "transposed", "times"])
def test_the_frames_of_an_array_reach_the_encoder_as_those_of_a_folder(qa, frames, folder, kind):
    given = {
        "array": frames,
        "tensor": torch.from_numpy(frames),
        "transposed": np.asfortranarray(frames),
        "times": frames,
    }[kind]
    how = {"times_s": 5.0 + np.arange(20) / RATE} if kind == "times" else {"frame_rate": RATE}
    encoded = qa.encode(given, **how)
    same = qa.encode(folder, frame_rate=RATE)
    assert torch.equal(features(encoded), features(same))
    found, wanted = report(encoded), report(same)
    assert np.allclose(found.sampling.timestamps_s, wanted.sampling.timestamps_s)
    assert np.allclose(found.sampling.read_s, wanted.sampling.read_s)
    assert found.video.path == found.inputs[0].path == "<array>"
    assert np.allclose([found.video.duration_s, found.video.fps, found.video.frames_total], [2.0, RATE, 20])
    assert (found.video.codec, found.video.decoder, found.cache) == ("rawvideo", "none", "off")


def test_an_array_is_never_taken_for_another(qa, frames, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("<array>").write_bytes(b"a file of that name")
    cache = evoprune.Cache(tmp_path / "cache")
    qa.loaded.patches.clear()
    first = qa.encode(frames, frame_rate=RATE, cache=cache)
    other = qa.encode(frames[::-1], frame_rate=RATE, cache=cache)
    assert not torch.equal(features(first), features(other))
    assert cache.size() == (0, 0) and not qa.loaded.patches._entries
    assert HeldVideo.of(frames, RATE, None) != HeldVideo.of(frames, RATE, None)


def test_times_of_frames_need_not_be_regular(frames):
    video = HeldVideo.of(frames[:4], None, [3.0, 3.5, 4.0, 6.0])
    assert (video.start_s, video.duration_s, video.fps, video.variable_rate) == (3.0, 4.0, 1.0, True)
    asked = [0.0, 0.49, 0.5, 2.9, 3.0, 99.0]
    (chunk,) = read_chunks(video, asked)
    assert chunk.times_s == (0.0, 0.0, 0.5, 1.0, 3.0, 3.0)
    assert np.array_equal(chunk.pixels, frames[[0, 0, 1, 2, 3, 3]])
    small = list(read_chunks(video, asked, chunk_bytes=1))
    assert [piece.first for piece in small] == [0, 2, 4] and all(len(piece.pixels) == 2 for piece in small)


def test_a_single_frame_lasts_for_a_second(qa, frames):
    assert HeldVideo.of(frames[:1], None, [7.0]).duration_s == 1.0
    assert report(qa.encode(frames[:1], times_s=[0.0])).sampling.frames == 2


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "file", "stream", "middle"])
def test_bytes_and_open_files_are_read_as_the_file(qa, clip, kind):
    content = clip.read_bytes()
    middle = io.BytesIO(b"head" + content)
    middle.seek(4)
    with open(clip, "rb") as file:
        given = {
            "bytes": content,
            "bytearray": bytearray(content),
            "memoryview": memoryview(content),
            "file": file,
            "stream": io.BytesIO(content),
            "middle": middle,
        }[kind]
        encoded = qa.encode(given, fps=2)
    assert torch.equal(features(encoded), features(qa.encode(clip, fps=2)))
    name = {"file": str(clip), "stream": "<file>", "middle": "<file>"}.get(kind, "<bytes>")
    assert report(encoded).video.path == name


def test_what_temporary_files_hold_is_not_kept_in_memory(qa, clip):
    qa.loaded.patches.clear()
    qa.encode(clip.read_bytes())
    assert not qa.loaded.patches._entries
    qa.encode(clip)
    assert qa.loaded.patches._entries


def test_the_cache_knows_bytes_as_the_file(qa, clip, tmp_path):
    cache = evoprune.Cache(tmp_path / "cache")
    assert report(qa.encode(clip.read_bytes(), cache=cache)).cache == "miss"
    assert report(qa.encode(clip, cache=cache)).cache == "hit"


def pictures() -> dict[str, Image.Image]:
    rgb = Image.fromarray(numbered_frame(77, 60, 84))
    clear = rgb.convert("RGBA")
    clear.putpixel((3, 3), (1, 2, 3, 0))
    turned = rgb.copy()
    turned.getexif()[0x0112] = 6
    return {
        "RGB": rgb,
        "L": rgb.convert("L"),
        "1": rgb.convert("1"),
        "P": rgb.quantize(16),
        "RGBA": clear,
        "LA": clear.convert("LA"),
        "turned": turned,
        "I;16": Image.fromarray(np.arange(60 * 84, dtype=np.uint16).reshape(60, 84) * 13),
    }


@pytest.mark.parametrize("kind", pictures())
def test_a_picture_of_pillow_is_read_as_its_file(qa, tmp_path, kind):
    picture = pictures()[kind]
    picture.save(tmp_path / "a.png", exif=picture.getexif())
    encoded, same = qa.encode(picture), qa.encode(tmp_path / "a.png")
    assert torch.equal(features(encoded), features(same))
    facts = report(encoded)
    assert facts.video.path == "<picture>" and facts.video.width == (60 if kind == "turned" else 84)


@pytest.mark.parametrize("mode", ["I", "I;16B"])
def test_integers_that_fit_are_read_as_16_bits(qa, mode):
    usual = pictures()["I;16"]
    levels = np.asarray(usual)
    picture = Image.fromarray(levels.astype(np.int32))
    if mode == "I;16B":
        picture = Image.frombytes("I;16B", usual.size, levels.astype(">u2").tobytes())
    assert picture.mode == mode and torch.equal(features(qa.encode(picture)), features(qa.encode(usual)))


def test_a_truncated_image_of_16_bits_is_said(qa, tmp_path):
    pictures()["I;16"].save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:150])
    with Image.open(tmp_path / "half.png") as half, pytest.raises(VideoError, match="cannot read <picture>"):
        qa.encode(half)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "PA", "RGBX"])
def test_modes_that_png_lacks_become_rgb(qa, mode):
    picture = pictures()["RGB"].convert("P" if mode == "PA" else "RGB").convert(mode)
    usual = picture.convert("RGBA" if mode == "PA" else "RGB")
    assert torch.equal(features(qa.encode(picture)), features(qa.encode(usual)))


def test_inputs_of_all_kinds_are_asked_about_together(qa, frames, clip, tmp_path):
    pictures()["RGB"].save(tmp_path / "a.png")
    several = [frames, str(clip), clip.read_bytes(), pictures()["RGB"], tmp_path / "a.png"]
    names = ["<array>", str(clip), "<bytes>", "<picture>", str(tmp_path / "a.png")]
    assert [facts.path for facts in report(qa.encode(several, frame_rate=RATE)).inputs] == names
    answer = qa.ask([qa.encode(frames, frame_rate=RATE), clip.read_bytes(), Image.open(tmp_path / "a.png")], QUESTION)
    str(answer)
    assert [facts.path for facts in answer.report.inputs] == ["<array>", "<bytes>", "<picture>"]
    assert report(qa.encode(frames, frame_rate=RATE, name="my clip")).video.path == "my clip"


def test_the_inputs_of_a_processor_may_be_held_too(frames, folder):
    held = evoprune.processor_inputs("demo", frames, QUESTION, frame_rate=RATE)
    read = evoprune.processor_inputs("demo", folder, QUESTION, frame_rate=RATE)
    assert all(torch.equal(held[name], read[name]) for name in read)
    times = evoprune.processor_inputs("demo", frames, QUESTION, times_s=np.arange(20) / RATE)
    assert torch.equal(times["pixel_values_videos"], read["pixel_values_videos"])
    picture = evoprune.processor_inputs("demo", pictures()["RGB"], QUESTION)
    assert len(picture["pixel_values"])


class OnAnotherDevice:
    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


GREY = np.zeros((2, 28, 28, 3), np.uint8)


def at_its_end() -> io.BytesIO:
    file = io.BytesIO(b"what was read")
    file.read()
    return file


WRONG = [
    (GREY, {}, "no frame rate", "frame_rate=30"),
    (GREY, {"frame_rate": 2.0, "times_s": [0, 1]}, "both a frame rate and times", "times_s"),
    (GREY, {"frame_rate": 0.0}, "frame_rate is 0", "above 0"),
    (GREY, {"times_s": [0.0]}, "1 times for 2 frames", "each frame"),
    (GREY, {"times_s": [1.0, 1.0]}, "ascend", "later than"),
    (GREY, {"times_s": [0.0, float("nan")]}, "ascend", "later than"),
    (GREY, {"times_s": [0, 10**400]}, "not a list of numbers", "times_s=[...]"),
    (GREY, {"times_s": [-1e308, 1e308]}, "0 frames per second", "(seconds)"),
    (GREY, {"times_s": [0, 5e-324]}, "inf frames per second", "(seconds)"),
    (GREY, {"frame_rate": 5e-324}, "not a valid frame rate", "frame_rate=30"),
    (GREY, {"times_s": "ab"}, "not a list of numbers", "times_s=[...]"),
    (GREY, {"times_s": 3}, "not a list of numbers", "times_s=[...]"),
    (GREY[0], {"frame_rate": 2.0}, "is one frame", "PIL.Image.fromarray"),
    ([GREY[0], GREY[0]], {"frame_rate": 2.0}, "is one frame", "for frames of one video: numpy.stack(list)"),
    (GREY.transpose(0, 3, 1, 2), {"frame_rate": 2.0}, "not a video", "transpose(0, 2, 3, 1)"),
    (GREY[..., 0], {"frame_rate": 2.0}, "not a video", "[T, H, W, 3]"),
    (GREY / 255, {"frame_rate": 2.0}, "float64", "astype('uint8')"),
    (GREY[:0], {"frame_rate": 2.0}, "no pixels", "at least one frame"),
    (OnAnotherDevice(), {"frame_rate": 2.0}, "cuda", "tensor.cpu().numpy()"),
    (io.StringIO("text"), {}, "returns str, not bytes", "'rb'"),
    (Image.new("F", (28, 28)), {}, "more than 16 bits", "convert"),
    (Image.new("I", (28, 28), 70_000), {}, "more than 16 bits", "convert"),
    (b"bytes", {"times_s": [0.0]}, "needs an array", "own times"),
    (5, {}, "the input is 5, which is not supported", "an open file"),
    ([], {}, "no input given", "an array of frames"),
    ([[GREY]], {"frame_rate": 2.0}, "an input is", "an array of frames"),
    (b"", {}, "<bytes> is empty", "completely"),
    (at_its_end(), {}, "nothing to read: <file> is already at its end", "file.seek(0)"),
    (io.BytesIO(), {}, "<file> is empty", "completely"),
    (b"some text", {}, "<bytes> is not a video", "MP4"),
    (io.BytesIO(b"\0" * 4000), {}, "<file>", "MP4"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "how", "says", "hint"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_input_is_refused_with_a_hint(qa, given, how, says, hint):
    with pytest.raises((UsageError, VideoError)) as caught:
        qa.encode(given, **how)
    assert says in caught.value.message and hint in caught.value.hint, str(caught.value)
    assert tempfile.gettempdir() not in caught.value.message


def test_closed_and_damaged_files_are_refused(qa, clip, tmp_path):
    closed = open(clip, "rb")  # noqa: SIM115
    closed.close()
    pictures()["RGB"].save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:150])
    with Image.open(tmp_path / "half.png") as half:
        for given, name in ((closed, str(clip)), (half, "<picture>")):
            with pytest.raises(VideoError, match="cannot read") as caught:
                qa.encode(given)
            assert name in caught.value.message


def test_where_an_array_cannot_have_a_rate_the_hint_says_what_to_do(qa):
    with pytest.raises(UsageError, match="no frame rate here") as caught:
        qa.ask(GREY, QUESTION)
    assert "qa.encode(frames, frame_rate=30)" in caught.value.hint
    assert qa.ask(qa.encode(GREY, frame_rate=30), QUESTION, max_new_tokens=1).text is not None
    with pytest.raises(UsageError, match="no frame rate here"):
        qa.find(GREY, "a red star")


@pytest.mark.parametrize("rate", [Fraction(25, 2), np.float32(12.5), np.int64(12), 12])
def test_a_rate_may_be_any_number(qa, frames, rate):
    facts = report(qa.encode(frames, frame_rate=rate))
    assert json.loads(facts.to_json())["video"]["fps"] == float(rate) and f"{float(rate):g} fps" in str(facts)


def test_a_path_in_a_numpy_array_is_a_path(qa, clip):
    for path in np.array([str(clip)]):
        assert report(qa.encode(path)).video.path == str(clip)


@pytest.mark.parametrize("choice", ["auto", "file"])
def test_subtitles_of_an_array_are_those_of_a_file(qa, frames, tmp_path, choice):
    """The subtitle file has the clock of the frames' times."""
    (tmp_path / "a.srt").write_text("1\n00:00:10,000 --> 00:00:11,000\nWho is there?\n\n")
    times = [10 + number / RATE for number in range(len(frames))]
    asked = "auto" if choice == "auto" else str(tmp_path / "a.srt")
    encoded = qa.encode(frames, times_s=times, subtitles=asked)
    (plan,) = encoded.plans
    assert ("[0:00] Who is there?" in plan.subtitles.text) == (choice == "file")


def test_errors_while_frames_are_read_name_the_input(qa, clip, spool):
    inputs = inputs_of(clip.read_bytes())
    with closing(open_inputs(qa.session, inputs)) as opened:
        (path,) = (file for file in spool.glob("*/*") if not file.name.startswith("."))  # next to the lock
        assert probe(path).frames_total == 20
        path.write_bytes(b"replaced")
        with pytest.raises(VideoError) as caught:
            opened.encode()
    assert "<bytes>" in caught.value.message and os.fspath(path) not in caught.value.message
