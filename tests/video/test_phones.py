"""Tests of images and animations from phones and browsers: HEIC, animated WebP and animated AVIF."""

import struct
import sys

import numpy as np
import pytest
from PIL import Image

from evoprune.errors import VideoError
from evoprune.video.clips import cut_clip
from evoprune.video.frames import choose_decoder, frame_times, probe, read_chunks, scan
from evoprune.video.input_files import Folder
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.live import LiveReader
from tests.decoders import needs_avif, needs_heic
from tests.video.files import in_this_process, number_of, numbered_frame, pixels, quarters

DURATIONS_S = [0.1, 0.2, 0.1, 0.3, 0.1]
BEGINS_S = [0.0, 0.1, 0.3, 0.4, 0.7]
ANIMATED = ["webp", pytest.param("avif", marks=needs_avif)]


def animation(path, alpha=False, **how):
    """Write an animation of numbered frames. If `alpha` is True, the upper half of each frame is transparent."""
    frames = [Image.fromarray(numbered_frame(i)) for i in range(len(DURATIONS_S))]
    if alpha:
        opaque = np.full((48, 64), 255, np.uint8)
        opaque[:24] = 0
        for frame in frames:
            frame.putalpha(Image.fromarray(opaque))
    durations = [round(1000 * each) for each in DURATIONS_S]
    frames[0].save(path, save_all=True, append_images=frames[1:], **{"duration": durations, "quality": 95} | how)
    return path


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("ending", ANIMATED)
def test_an_animation_is_a_video(ending, alpha, tmp_path):
    info = probe(animation(tmp_path / f"a.{ending}", alpha))
    assert (info.kind, info.width, info.height, info.frames_total) == ("video", 64, 48, 5)
    assert info.duration_s == pytest.approx(0.8) and info.variable_rate and info.warnings == []
    assert frame_times(info).times_s == pytest.approx(BEGINS_S)
    times = [-1.0, 0.05, 0.1, 0.29, 0.65, 0.65, 0.75, 9.0]
    (chunk,) = read_chunks(info, times)
    assert [number_of(rgb[24:]) for rgb in chunk.pixels] == [0, 0, 1, 1, 3, 3, 4, 4]
    assert chunk.times_s == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.4, 0.4, 0.7, 0.7])
    assert (chunk.pixels[:, :20] > 250).all() == alpha
    found = scan(info.path)
    assert (found.frames, found.damaged, found.largest_gap_s) == (5, 0, pytest.approx(0.3))


def test_frames_without_a_duration_last_as_long_as_in_browsers(tmp_path):
    info = probe(animation(tmp_path / "fast.webp", duration=[0, 5, 10, 20, 40]))
    assert frame_times(info).times_s == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.32])


def test_one_frame_is_a_picture(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "one.webp", save_all=True)
    assert probe(tmp_path / "one.webp").kind == "picture"


@pytest.mark.parametrize("ending", ANIMATED)
def test_a_damaged_animation(ending, tmp_path):
    path = animation(tmp_path / f"a.{ending}", alpha=True)
    content = path.read_bytes()
    for end in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:end] + b"\xff" * 9 + content[end + 9 :])
        try:
            info = probe(path)
            assert next(read_chunks(info, [0.0, 0.75])).pixels.shape == (2, info.height, info.width, 3)
        except VideoError as error:
            assert error.hint and error.exit_code == 3
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError):
        list(read_chunks(probe(path), [0.0]))


def test_animations_that_are_too_large(tmp_path, monkeypatch):
    path = animation(tmp_path / "a.webp")
    with in_this_process():
        monkeypatch.setattr(ffmpeg, "MAX_VIDEO_PIXELS", 100)
        with pytest.raises(VideoError, match="64 x 48"):
            probe(path)
        monkeypatch.setattr(ffmpeg, "MAX_VIDEO_PIXELS", 10**6)
        monkeypatch.setattr(ffmpeg, "MAX_DECODED_PIXELS", 1000)
        monkeypatch.setattr(ffmpeg, "MAX_PIXELS_PER_BYTE", 1)
        with pytest.raises(VideoError, match="in 5 frames, too many"):
            probe(path)


def test_what_cannot_be_done_with_an_animation_is_said(tmp_path):
    path = animation(tmp_path / "a.webp")
    with pytest.raises(VideoError, match="not a video file"):
        cut_clip(probe(path), 0.0, 0.3, str(tmp_path), exact=True)
    with pytest.raises(VideoError, match="animation"):
        LiveReader(str(path), "a.webp", 1.0)
    with pytest.raises(VideoError, match="decord cannot read"):
        list(read_chunks(probe(path), [0.0], decoder="decord"))
    assert choose_decoder("auto", probe(path)) == "pillow"


def heic(path, image, **how):
    import pillow_heif

    pillow_heif.from_pillow(image).save(path, **{"quality": 95} | how)
    return path


def picture(path):
    info = probe(path)
    return info, pixels(read_chunks(info, [0.0]))[0].astype(int)


@needs_heic
def test_a_heic_is_a_picture(tmp_path):
    info, rgb = picture(heic(tmp_path / "a.heic", Image.fromarray(quarters())))
    assert (info.kind, info.codec, info.width, info.height) == ("picture", "heic", 64, 48)
    assert np.abs(rgb - quarters()).mean() < 5
    clear = Image.fromarray(quarters())
    clear.putalpha(0)
    _, rgb = picture(heic(tmp_path / "clear.heic", clear))
    assert rgb.min() >= 254


@needs_heic
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_is_turned_once(orientation, tmp_path):
    """The encoder states the orientation twice, as phones do: as a property of the image, which counts, and in the EXIF data."""
    from PIL import ImageOps

    tags = Image.Exif()
    tags[0x0112] = orientation
    path = heic(tmp_path / "turned.heic", Image.fromarray(quarters()), exif=tags.tobytes())
    assert struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) in path.read_bytes()
    stored = Image.fromarray(quarters())
    stored.getexif()[0x0112] = orientation
    info, rgb = picture(path)
    assert np.abs(rgb - np.asarray(ImageOps.exif_transpose(stored))).mean() < 5
    assert (info.rotation_deg, info.mirrored) == (0, False)


@needs_heic
def test_ten_bits_become_eight(tmp_path):
    import pillow_heif

    levels = (np.indices((64, 64)).sum(0) * 500).astype(np.uint16)[..., None].repeat(3, 2)
    made = pillow_heif.from_bytes("RGB;16", (64, 64), levels.tobytes())
    made.save(tmp_path / "ten.heic", quality=-1, chroma=444)
    _, rgb = picture(tmp_path / "ten.heic")
    assert np.abs(rgb - (levels >> 8)).max() <= 2


@needs_heic
def test_a_heic_that_states_a_huge_or_wrong_size(tmp_path):
    path = heic(tmp_path / "bomb.heic", Image.new("RGB", (128, 64)))
    content = bytearray(path.read_bytes())
    at = content.index(b"ispe") + 8
    for size, says in (((30_000, 30_000), "too large"), ((9_000, 9_000), "cannot read"), ((16, 16), "cannot read")):
        content[at : at + 8] = struct.pack(">II", *size)
        path.write_bytes(content)
        with pytest.raises(VideoError, match=says) as caught:
            picture(path)
        assert caught.value.hint and caught.value.exit_code == 3
    for end in (60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(VideoError):
            picture(path)


def test_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "photo.heic"
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(99))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with in_this_process(), pytest.raises(VideoError, match="HEIC, which needs pillow-heif") as caught:
        probe(path)
    assert "[heic]'" in caught.value.hint and caught.value.exit_code == 3


def test_photos_in_a_folder_are_no_frames(tmp_path):
    for name in ("IMG_1.HEIC", "IMG_1.MOV", "IMG_2.avif", "3.jpg"):
        (tmp_path / name).touch()
    inside = Folder(str(tmp_path))
    assert [path.rpartition("/")[2] for path in inside.images] == ["3.jpg"]
    assert len(inside.files) == 4
