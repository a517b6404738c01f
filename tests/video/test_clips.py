"""Tests of clips: their contents are right, no file is overwritten, and a failed clip leaves no files behind."""

import errno
import os
from pathlib import Path

import av
import numpy as np
import pytest

from evoprune.errors import EvopruneWarning, UsageError, VideoError
from evoprune.video import clips, probe, read_chunks
from evoprune.video.clips import clip_name, cut_clip
from evoprune.video.readers import cutting
from evoprune.video.sandbox import isolation
from tests.video.files import apart, numbered_frames, numbers, quarters, spoil, write_image, write_said, write_video
from tests.video.kinds import KINDS, write_kind
from tests.video.unruly import PROGRAM

START_S = 2.35
END_S = 4.05
# Kinds whose packets cannot be copied, because they have no timestamps or because no container for clips can hold them.
NOT_COPIED = (
    "h264.avi", "h264.h264", "picture.gif", "wmv2.wmv", "sorenson.flv", "png16.mov", "raw.avi", "raw.y4m", "picture.apng",
)  # fmt: skip
OUT_OF_ORDER = {"x264-params": "bframes=3:b-pyramid=normal:scenecut=0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def film(folder):
    """A video with sound, ten frames per second, and one keyframe per second."""
    frames = numbered_frames(60)
    return probe(write_video(folder / "film.mp4", frames, gop=10, audio_s=6.0, options=OUT_OF_ORDER))


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(isolation, "POSSIBLE", False)


@pytest.fixture
def unruly(monkeypatch):
    isolation.end_all()
    monkeypatch.setattr(isolation, "PROGRAM", PROGRAM)
    yield
    isolation.end_all()


def shown(info, start_s, end_s):
    """Return the frame number that is on screen in the middle of every 0.1 s."""
    return numbers(info, np.arange(start_s + 0.05, end_s, 0.1).round(3).tolist())


def packets(path, kind, begin_s=0.0):
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        found = [packet for packet in container.demux(stream) if packet.size]
        return {round(float(packet.pts * packet.time_base) - begin_s, 2): bytes(packet) for packet in found}


@pytest.mark.parametrize("start_s", [0.0, 1.2, 1.5])
def test_frames_of_an_avi_in_order_keep_their_times(folder, tmp_path, start_s):
    """FFmpeg delays the display times of H.264 by a frame, even if its frames are in order."""
    info = probe(write_video(folder / "in_order.avi", numbered_frames(30), options={"bf": "0"}))
    clip = cut_clip(info, start_s, start_s + 0.5, str(tmp_path))
    frames = [*range(round(10 * clip.start_s), round(10 * start_s) + 5)]
    assert clip.start_s <= start_s + 1e-6 and shown(probe(clip.path), 0.0, len(frames) / 10) == frames


def test_packets_are_copied_from_the_keyframe_before(film, tmp_path):
    clip = cut_clip(film, START_S, END_S, str(tmp_path / "new" / "folder"), title="a red star")
    assert clip == clips.Clip(str(tmp_path / "new" / "folder" / "film-00-00-02.350.mp4"), 2.0)
    info = probe(clip.path)
    assert info.tags["title"] == "a red star" and END_S - 2.0 <= info.duration_s <= END_S - 2.0 + 0.5
    assert shown(info, 0.0, END_S - 2.0) == list(range(20, 40))
    for kind in ("video", "audio"):
        copied = packets(clip.path, kind)
        assert copied and copied.items() <= packets(film.path, kind, 2.0).items()
    assert min(copied) < 0.15 and max(copied) > 1.8  # each packet of this sound lasts 0.128 s


def test_exact_times(film, tmp_path):
    clip = cut_clip(film, START_S, END_S, str(tmp_path), exact=True)
    info = probe(clip.path)
    assert clip.start_s == START_S and info.duration_s == pytest.approx(END_S - START_S, abs=1e-4)
    with av.open(clip.path) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert times == pytest.approx([0.0, *(0.05 + 0.1 * n for n in range(17))], abs=1e-4)
    assert numbers(info, times) == list(range(23, 41))
    sound = packets(clip.path, "audio")
    assert sound and set(sound.values()) <= set(packets(film.path, "audio").values())


def test_an_end_after_the_videos_is_the_videos(film, tmp_path):
    clip = cut_clip(film, 5.5, 60.0, str(tmp_path), exact=True)
    assert probe(clip.path).duration_s == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("start_s", "end_s", "problem"),
    [
        (-1.0, 2.0, "cannot go from -1 s to 2 s"),
        (0.0, -2.0, "cannot go from 0 s to -2 s"),
        (float("nan"), 2.0, "cannot go from nan s"),
        (0.0, float("nan"), "to nan s"),
        (2.0, 2.0, "cannot go from 2 s to 2 s"),
        (7.0, 8.0, "start 7 s is after the end of the video, which is 6 s long"),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_times_outside_the_video_are_refused(start_s, end_s, problem, exact, film, tmp_path):
    with pytest.raises((UsageError, VideoError), match=problem) as caught:
        cut_clip(film, start_s, end_s, str(tmp_path), exact=exact)
    assert caught.value.hint and os.listdir(tmp_path) == []


def write_with_tone(path: str, codec: str, sound: str) -> None:
    """Write six seconds of numbered frames with a tone from 3.0 s to 4.0 s."""
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=10, options={"g": "10"})
        stream.height, stream.width = numbered_frames(1)[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        heard = out.add_stream(sound, rate=22050, layout="mono")
        heard.bit_rate = 64_000
        for frame in numbered_frames(60):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        out.mux(stream.encode(None))
        time = np.arange(6 * 22050) / 22050
        tone = np.where((time >= 3.0) & (time < 4.0), np.sin(2 * np.pi * 440 * time), 0.0).astype(np.float32)
        for at in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, at : at + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 22050, at
            out.mux(heard.encode(frame))
        out.mux(heard.encode(None))


def loud(path) -> tuple[str, float, float]:
    """Return the codec of a file's sound, and the times in seconds at which its loud part begins and ends."""
    with av.open(path) as container:
        sound = container.streams.audio[0]
        times = []
        for frame in container.decode(sound):
            samples = frame.to_ndarray()[0]
            most = np.iinfo(samples.dtype).max if samples.dtype.kind == "i" else 1.0
            times += (frame.time + np.flatnonzero(np.abs(samples / most) > 0.3) / frame.rate).tolist()
        return sound.codec_context.codec.canonical_name, min(times), max(times)


@pytest.mark.parametrize(
    ("name", "codec", "sound", "exact", "made"),
    [
        ("wma.wmv", "wmv2", "wmav2", True, ("aac", ".mp4")),
        ("wma.asf", "libx264", "wmav2", False, ("aac", ".mkv")),
        ("pcm.mkv", "libx264", "pcm_s16le", True, ("aac", ".mp4")),
        ("pcm.mkv", "libx264", "pcm_s16le", False, ("pcm_s16le", ".mkv")),
    ],
)
def test_sound_that_the_clip_cannot_hold_is_encoded_anew(name, codec, sound, exact, made, tmp_path):
    apart(write_with_tone, str(tmp_path / name), codec, sound)
    info = probe(tmp_path / name)
    clip = cut_clip(info, START_S, 5.05, str(tmp_path / "clips"), exact=exact)
    codec, begin_s, end_s = loud(clip.path)
    assert (codec, os.path.splitext(clip.path)[1]) == made
    earlier_s = info.start_s + clip.start_s
    assert (begin_s, end_s) == pytest.approx([time_s - earlier_s for time_s in loud(info.path)[1:]], abs=0.01)
    assert probe(clip.path).duration_s == pytest.approx(5.05 - clip.start_s, abs=1e-3 if exact else 0.5)


def test_sound_that_is_left_out_is_a_warning(film, folder, in_process, monkeypatch, tmp_path):
    """Sound is left out if the file consists of joined files, or if FFmpeg has no decoder for the sound."""
    part = write_video(folder / "sound.ts", numbered_frames(20), audio_s=2.0)
    (folder / "joined_sound.ts").write_bytes(part.read_bytes() * 2)
    with pytest.warns(EvopruneWarning, match="joined_sound.ts: clips have no sound"):
        cut_clip(probe(folder / "joined_sound.ts"), 0.5, 1.5, str(tmp_path), exact=True)
    codec = cutting._codec
    monkeypatch.setattr(cutting, "_codec", lambda stream: codec(stream) if stream.type == "video" else "")
    for exact in (False, True):
        with pytest.warns(EvopruneWarning, match="has no decoder for its sound"):
            clip = cut_clip(film, 0.0, 1.0, str(tmp_path), exact=exact)
        assert packets(clip.path, "video") and probe(clip.path).duration_s >= 1.0


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.few(8)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name, exact, folder, tmp_path):
    """At each time, the clip shows the same frame as the video. Otherwise, an error says how to cut the clip instead."""
    info = probe(write_kind(folder, name))
    start_s = 0.45 * info.duration_s
    end_s = 0.8 * info.duration_s
    try:
        clip = cut_clip(info, start_s, end_s, str(tmp_path), exact=exact)
    except VideoError as problem:
        assert not exact and "--exact" in problem.hint and not os.listdir(tmp_path)
        assert name in NOT_COPIED, problem
        return
    made = probe(clip.path)
    assert clip.start_s <= start_s + 1e-3 and (clip.start_s == start_s or not exact)
    times = np.linspace(0.001, end_s - clip.start_s - 0.002, 30).tolist()
    assert numbers(made, times) == numbers(info, [clip.start_s + time for time in times])
    if exact:
        assert made.duration_s == pytest.approx(end_s - start_s, abs=2e-3) and made.rotation_deg == 0


@pytest.mark.parametrize("encoder", cutting.ENCODERS)
def test_colours_stay(encoder, in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(cutting, "ENCODERS", {encoder: cutting.ENCODERS[encoder]})
    # The video has 720 lines, so players assume the colors of HD.
    wide = np.kron(quarters(), np.ones((15, 15, 1), np.uint8))
    info = probe(write_video(tmp_path / "quarters.mp4", [wide] * 4, options={"crf": "1"}))
    made = probe(cut_clip(info, 0.0, 0.3, str(tmp_path / "clips"), exact=True).path)
    before, after = (next(read_chunks(each, [0.1])).pixels.astype(int) for each in (info, made))
    assert (made.width, made.height, made.duration_s) == (960, 720, pytest.approx(0.3, abs=1e-3))
    assert np.abs(before - after).mean() < 4


@pytest.mark.parametrize("exact", [False, True])
def test_what_players_show_in_another_way(exact, tmp_path):
    """The pixel aspect ratio and HDR are kept, unless frames are re-encoded."""
    found = {}
    for name in ("wide.mp4", "pq.mp4"):
        apart(write_said, tmp_path / name)
        found[name] = probe(cut_clip(probe(tmp_path / name), 0.0, 0.4, str(tmp_path / "clips"), exact=exact).path)
    assert found["wide.mp4"].pixel_aspect == (None if exact else pytest.approx(16 / 11))
    assert (found["wide.mp4"].width, found["pq.mp4"].hdr) == (94, not exact)


def test_a_file_that_was_joined(film, folder, tmp_path):
    joined = folder / "joined.ts"
    part = write_video(folder / "part.ts", numbered_frames(20))
    joined.write_bytes(part.read_bytes() * 2)
    info = probe(joined)
    with pytest.raises(VideoError, match="consists of several joined files") as caught:
        cut_clip(info, 1.0, 3.0, str(tmp_path))
    assert "--exact" in caught.value.hint
    clip = cut_clip(info, 1.5, 3.0, str(tmp_path), exact=True)
    assert shown(probe(clip.path), 0.0, 1.5) == shown(info, 1.5, 3.0)


def test_damage(film, folder, tmp_path):
    """The frame before damaged frames stays on screen, as it does when frames are read."""
    info = probe(spoil(Path(film.path), folder / "damaged.mp4", [25, 26]))
    clip = cut_clip(info, START_S, END_S, str(tmp_path), exact=True)
    assert shown(probe(clip.path), 0.05, END_S - START_S) == shown(info, START_S + 0.05, END_S)
    assert cut_clip(info, START_S, END_S, str(tmp_path)).start_s == 2.0
    (folder / "gone.mp4").write_bytes(b"")
    with pytest.raises(VideoError):
        cut_clip(info.__class__(**vars(info) | {"path": str(folder / "gone.mp4")}), 0.0, 1.0, str(tmp_path / "none"))
    assert os.listdir(tmp_path / "none") == []


def test_an_index_that_lists_the_same_bytes_again(film, in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(cutting.os.path, "getsize", lambda path: 500)
    with pytest.raises(VideoError, match="add up to more than its size"):
        cut_clip(film, START_S, END_S, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_pictures_and_folders_are_refused(folder, tmp_path):
    write_image(folder / "photo.png", quarters())
    images = folder / "images"
    images.mkdir()
    write_image(images / "1.png", quarters())
    for path in (folder / "photo.png", images):
        with pytest.raises(VideoError, match="not a video file"):
            cut_clip(probe(path), 0.0, 0.5, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_no_file_is_replaced(film, tmp_path):
    (tmp_path / "film-00-00-00.000.mp4").write_text("mine")
    paths = [Path(cut_clip(film, 0.0, 1.0, str(tmp_path)).path) for _ in range(2)]
    assert [path.name for path in paths] == ["film-00-00-00.000-2.mp4", "film-00-00-00.000-3.mp4"]
    assert (tmp_path / "film-00-00-00.000.mp4").read_text() == "mine" and len(os.listdir(tmp_path)) == 3
    with pytest.raises(UsageError, match="cannot write a clip"):
        cut_clip(film, 0.0, 1.0, str(paths[0]))


def test_names():
    assert clip_name("/a/film.de.mp4", 3723.0004) == "film.de-01-02-03.000"
    assert clip_name("https://example.org/films/a%20b.mp4?quality=1/2", 0.5) == "a%20b-00-00-00.500"
    assert clip_name("https://example.org", 0.0) == "clip-00-00-00.000"
    assert len(clip_name("x" * 250 + ".mp4", 0.0)) < 120


class Full:
    """An open file on a full disk."""

    def __init__(self, file):
        self._file = file
        self.name = file.name

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self._file.close()

    def seek(self, place):
        return self._file.seek(place)

    def write(self, content):
        self._file.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(film, monkeypatch, tmp_path):
    first = Path(cut_clip(film, 0.0, 1.0, str(tmp_path)).path)
    monkeypatch.setattr(clips, "open", lambda *how: Full(open(*how)), raising=False)  # noqa: SIM115
    with pytest.raises(UsageError, match="No space left on device") as caught:
        cut_clip(film, 2.0, 3.0, str(tmp_path))
    assert "free some space" in caught.value.hint and os.listdir(tmp_path) == [first.name]


def test_ctrl_c(film, monkeypatch, tmp_path):
    stream = clips.stream_clip

    def interrupted(info, how):
        pieces = stream(info, how)
        yield next(pieces)
        yield next(pieces)
        assert [name[-5:] for name in os.listdir(tmp_path)] == [".part"]
        raise KeyboardInterrupt

    monkeypatch.setattr(clips, "stream_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut_clip(film, 0.0, 1.0, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_clip_of_many_pieces(monkeypatch, folder, tmp_path):
    """Neither process holds more than one piece at a time."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 240, 320, 3), np.uint8)
    info = probe(write_video(folder / "noise.mkv", noise, codec="ffv1", pix_fmt="bgr0"))
    stream = isolation.stream_clip
    sizes = []

    def counted(info, how):
        pieces = stream(info, how)
        yield next(pieces)
        for at, content in pieces:
            sizes.append(len(content))
            yield at, content

    monkeypatch.setattr(clips, "stream_clip", counted)
    clip = cut_clip(info, 0.0, 2.0, str(tmp_path))
    assert len(sizes) > 3 and max(sizes) <= isolation.CLIP_PIECE and sum(sizes) >= os.path.getsize(clip.path) > 2**21
    last = next(read_chunks(probe(clip.path), [1.95])).pixels[0]
    assert np.array_equal(last, noise[-1])


needs_linux = pytest.mark.skipif(not isolation.POSSIBLE, reason="needs Linux")


@needs_linux
def test_a_process_that_crashes(film, unruly, tmp_path):
    """After a crash, the clip is cut once more in a new process."""
    for name in ("clip_once_crash", "clip_crash"):
        (tmp_path / f"{name}.mp4").write_bytes(Path(film.path).read_bytes())
    out = tmp_path / "out"
    clip = cut_clip(probe(tmp_path / "clip_once_crash.mp4"), START_S, END_S, str(out))
    assert shown(probe(clip.path), 0.0, 2.0) == list(range(20, 40))
    with pytest.raises(VideoError, match=r"the decoder crashed on .*clip_crash"):
        cut_clip(probe(tmp_path / "clip_crash.mp4"), START_S, END_S, str(out))
    assert os.listdir(out) == [os.path.basename(clip.path)]


@needs_linux
def test_a_process_that_hangs(film, unruly, monkeypatch, tmp_path):
    (tmp_path / "clip_hang.mp4").write_bytes(Path(film.path).read_bytes())
    info = probe(tmp_path / "clip_hang.mp4")
    monkeypatch.setattr(isolation, "SILENCE_S", 0.5)
    with pytest.raises(VideoError, match="is stuck"):
        cut_clip(info, START_S, END_S, str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("answer", [{"at": 10**9}, {"at": -1}])
def test_what_a_process_says_is_not_trusted(answer, film, in_process, monkeypatch, tmp_path):
    """The answers of a worker process are checked, because a malicious video may have taken control of it."""
    fill = cutting.ClipReader.fill
    monkeypatch.setattr(cutting.ClipReader, "fill", lambda self, content: fill(self, content) | answer)
    with pytest.raises(VideoError, match="its answer is invalid"):
        cut_clip(film, START_S, END_S, str(tmp_path))
    monkeypatch.setattr(cutting, "MP4", "/../../other.mp4")
    with pytest.raises(VideoError, match="its answer is invalid"):
        cut_clip(film, START_S, END_S, str(tmp_path))
    assert os.listdir(tmp_path) == []
