import io
import os
import pickle
import random
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import probe, read_chunks
from evoprune.video.info import FOLDER_FPS
from evoprune.video.input_files import Folder
from evoprune.video.readers import folder as backend
from evoprune.video.readers import images
from evoprune.video.readers.folder import list_images
from evoprune.video.readers.images import decode_image
from tests.video.files import number_of, numbered_frame, numbered_frames, numbers, pixels, quarters, write_image


def write_images(folder, count, name="frame{}.png"):
    for i, rgb in enumerate(numbered_frames(count)):
        write_image(folder / name.format(i), rgb)
    return folder


def test_facts(tmp_path):
    info = probe(write_images(tmp_path, 12))
    assert (info.codec, info.container, info.pix_fmt) == ("png", "folder", "rgb24")
    assert (info.fps, info.frames_total, info.duration_s, info.start_s) == (FOLDER_FPS, 12, 12 / FOLDER_FPS, 0.0)
    assert (info.width, info.height, info.rotation_deg, info.mirrored, info.variable_rate) == (64, 48, 0, False, False)
    assert info.path == str(tmp_path)
    assert pickle.loads(pickle.dumps(info)) == info
    assert numbers(info, [i / info.fps for i in range(12)]) == list(range(12))  # frame2 before frame10


NATURAL = "1 9 010 a a1 a1b a02 a2 a10 b shot1_frame9 Shot1_frame10 shot02_frame1"


def test_files_of_a_folder(tmp_path):
    write_images(tmp_path, 1)
    for name in ("clip10.mp4", "clip2.mp4", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to("missing.mp4")
    (tmp_path / "link.mp4").symlink_to("clip2.mp4")
    found = Folder(str(tmp_path))
    assert found.videos == [str(tmp_path / name) for name in ("clip2.mp4", "clip10.mp4", "link.mp4")]
    assert found.images == [str(tmp_path / "frame0.png")] and set(found.files) == {*found.videos, *found.images}
    with pytest.raises(FileNotFoundError):
        Folder(str(tmp_path / "missing"))


def test_a_folder_is_listed_once_until_its_entries_change(tmp_path, monkeypatch):
    info = probe(write_images(tmp_path, 4))
    time.sleep(0.05)  # until the folder's ctime is in the past
    listed, list_folder = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or list_folder(path))

    def seen(time_s):
        return [number_of(shown.rgb) for shown in backend.read(info, [time_s], pytest.fail)]

    assert [seen(number / 2) for number in range(4)] == [[0], [1], [2], [3]] and len(listed) == 1
    write_image(tmp_path / "frame2.png", numbered_frame(7))  # the same entry with another content
    assert seen(1.0) == [7] and len(listed) == 1
    write_image(tmp_path / "frame00.png", numbered_frame(9))
    assert seen(1.0) == [1] and len(listed) == 2
    (tmp_path / "frame1.png").unlink()
    assert seen(1.0) == [7] and len(listed) == 3


def test_the_first_image_is_decoded_once_until_it_changes(tmp_path, monkeypatch):
    write_images(tmp_path, 3)
    time.sleep(0.05)
    decoded = []
    monkeypatch.setattr(images, "decode_image", lambda *image: decoded.append(image) or decode_image(*image))
    first = backend.probe(str(tmp_path), 2.0)
    assert backend.probe(str(tmp_path), 2.0) == first and len(decoded) == 1
    write_image(tmp_path / "frame0.png", numbered_frame(0, height=24))
    assert backend.probe(str(tmp_path), 2.0).height == 24
    (tmp_path / "frame0.png").write_text("damaged")
    assert backend.probe(str(tmp_path), 2.0) == first
    write_image(tmp_path / "frame1.png", numbered_frame(0, height=24))
    assert backend.probe(str(tmp_path), 2.0).height == 24


def test_a_folder_with_links_is_always_listed_again(tmp_path):
    for number, name in enumerate("ab"):
        write_image(tmp_path / f"{name}.png", numbered_frame(number))
    (tmp_path / "links").mkdir()
    for name in "ab":
        (tmp_path / "links" / f"{name}.png").symlink_to(f"../{name}.png")
    time.sleep(0.05)
    assert len(list_images(str(tmp_path / "links"))) == 2
    (tmp_path / "a.png").unlink()
    assert list_images(str(tmp_path / "links")) == Folder.images_in(str(tmp_path / "links"))
    assert len(list_images(str(tmp_path / "links"))) == 1


def test_files_that_are_read(tmp_path):
    info = probe(write_images(tmp_path, 12))

    def numbers_read(*times_s):
        return [int(os.path.basename(path)[5:-4]) for path in Folder.files_read(info, times_s)]

    assert numbers_read(2.0, 2.9, 3.5) == [0, 4, 5, 6, 7]
    assert numbers_read(-1.0) == [0, 0] and numbers_read(5.4, 99.0) == [0, 10, 11]
    assert Folder.files_read(replace(info, container="mp4"), [1.0]) == [str(tmp_path)]


def test_a_rate_of_ones_own(tmp_path):
    info = probe(write_images(tmp_path, 10), folder_fps=5)
    assert (info.fps, info.duration_s) == (5, 2.0)
    chunks = list(read_chunks(info, [-1.0, 0.0, 0.19, 0.2, 1.0, 1.99, 50.0]))
    assert [number_of(rgb) for rgb in pixels(chunks)] == [0, 0, 0, 1, 5, 9, 9]
    assert [t for chunk in chunks for t in chunk.times_s] == [0.0, 0.0, 0.0, 0.2, 1.0, 1.8, 1.8]
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="images per second"):
            probe(tmp_path, folder_fps=fps)


@pytest.mark.parametrize(
    "names",
    [
        "frame2 frame10",
        "frame_0.08 frame_0.16 frame_0.80 frame_1.20 frame_10.04",
        "frame.9 frame.10",
        "img-1 img-2 img-10",
        "a-1-5 a-1-10 a-2-1",
        "2024-01-02_9.45 2024-01-02_10.30 2024-01-10_8.00",
        "s1e2 s1e10 s2e1",
        "take take1 take2 Take10",
        NATURAL,
    ],
)
def test_images_come_by_the_numbers_in_their_names(names, tmp_path):
    """The order of the directory listing does not matter."""
    right = names.split()
    for name in random.Random(0).sample(right, len(right)):
        (tmp_path / f"{name}.png").touch()
    assert [os.path.basename(path)[:-4] for path in list_images(str(tmp_path))] == right


@pytest.mark.parametrize("names", ["0.16 0.8", "v1.9 v1.10"])
def test_an_order_that_is_not_clear_is_refused(names, tmp_path):
    for name in names.split():
        (tmp_path / f"{name}.png").touch()
    with pytest.raises(VideoError, match="no clear order") as caught:
        list_images(str(tmp_path))
    assert "0.25 and 0.50" in caught.value.hint


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_all_kinds_of_pixels_become_rgb(mode, tmp_path):
    image = Image.fromarray(numbered_frame(77)).convert(mode)
    image.save(tmp_path / "a.png")
    info = probe(tmp_path)
    assert numbers(info, [0.0]) == [77]
    got = next(read_chunks(info, [0.0])).pixels[0].astype(int)
    assert np.abs(got - np.asarray(image.convert("RGB"))).max() <= 2


@pytest.mark.few(8)
@pytest.mark.parametrize("ending", ["jpg", "jpeg", "JPG", "png", "Png", "webp", "bmp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_each_image_is_turned_by_its_own_exif_data(tag, ending, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = tag
    path = tmp_path / f"a.{ending}"
    Image.fromarray(quarters()).save(path, exif=exif, quality=95, lossless=True)  # BMP has no EXIF data
    with Image.open(path) as image:
        right = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    for info in (probe(tmp_path), probe(path)):  # even a folder with a single image is a video
        assert (info.height, info.width) == right.shape[:2] == ((48, 64) if tag < 5 or ending == "bmp" else (64, 48))
        got = next(read_chunks(info, [0.0])).pixels[0]
        # Sharp color edges differ a little; with the wrong rotation, the mean is above 80.
        assert np.abs(got - right).mean() < 4


def test_images_that_are_turned_differently(tmp_path):
    for i, (tag, turns) in enumerate([(1, 0), (3, 2), (6, 3), (8, 1)]):  # turns: counterclockwise, by 90 degrees each
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = np.ascontiguousarray(np.rot90(numbered_frame(70 + i), -turns))
        Image.fromarray(stored).save(tmp_path / f"{i}.jpg", exif=exif, quality=95)
    write_image(tmp_path / "4.png", numbered_frame(74))
    info = probe(tmp_path)
    assert (info.width, info.height) == (64, 48)
    assert numbers(info, [i / 2 for i in range(5)]) == [70, 71, 72, 73, 74]


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_of_either_byte_order(order, tmp_path):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(order + "HHHII", 2, 0x010F, 2, 1, 0) + struct.pack(order + "HHIHH", 0x0112, 3, 1, 5, 0)
    tiff = mark + struct.pack(order + "I", 8) + entries
    picture = jpeg(1, b"Exif\0\0" + tiff)
    before = b"\xff\xe1" + struct.pack(">H", 2 + 9) + b"http://ns"  # XMP is stored in an APP1 segment too
    picture = picture[:2] + before + picture[2:]

    def orientation(content):
        return decode_image(content, "a.jpg")[2]

    assert orientation(picture) == (270, True)
    tag = struct.pack(order + "IHH", 1, 5, 0)
    for value in (0, 9, 77):
        assert orientation(picture.replace(tag, struct.pack(order + "IHH", 1, value, 0))) == (0, False)


def test_other_sizes_are_scaled_to_the_first_and_other_sizes_refused(tmp_path):
    for number, (name, size) in enumerate(
        [("0.png", (48, 64)), ("1.jpg", (96, 128)), ("2.bmp", (36, 48)), ("3.png", (48, 65)), ("4.png", (64, 48))]
    ):
        write_image(tmp_path / name, numbered_frame(number, *size))
    info = probe(tmp_path)
    assert (info.width, info.height) == (64, 48)
    assert numbers(info, [0.0, 0.5, 1.0, 1.5]) == [0, 1, 2, 3]  # one more pixel does not count as a different shape
    with pytest.raises(VideoError, match=r"different shapes: .*4\.png is 48x64, the first is 64x48"):
        numbers(info, [0.0, 2.0])


def test_whatever_is_no_image_is_ignored_and_names_are_no_patterns(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(VideoError, match="no images in the folder") as caught:
        probe(tmp_path)
    assert ".webp" in caught.value.hint
    (tmp_path / "f0.mp4").write_bytes(b"hello")
    (tmp_path / "._f0.png").write_bytes(b"hidden by macOS")
    (tmp_path / "f3.png").mkdir()
    for i, name in enumerate(["f%d.png", "f%03d.png", "file:f.png", "g*.png", "h\n?.png", "-.png", "f1.png"]):
        write_image(tmp_path / name, numbered_frame(i))
    info = probe(tmp_path)
    assert sorted(numbers(info, [i / info.fps for i in range(info.frames_total)])) == [0, 1, 2, 3, 4, 5, 6]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp"])
def test_the_image_before_a_damaged_one_stays_on_screen(ending, tmp_path):
    write_images(tmp_path, 10, "f{}." + ending)
    for i in (0, 4, 5, 9):
        cut(tmp_path / f"f{i}.{ending}")
    (tmp_path / f"f7.{ending}").write_bytes(b"")
    info = probe(tmp_path)
    assert info.duration_s == 5.0
    times = [i / 2 for i in range(10)]
    chunks = list(read_chunks(info, times))
    assert [number_of(rgb) for rgb in pixels(chunks)] == [1, 1, 2, 3, 3, 3, 6, 6, 8, 8]
    assert chunks[0].times_s == (0.5, 0.5, 1.0, 1.5, 1.5, 1.5, 3.0, 3.0, 4.0, 4.0)
    assert numbers(info, [2.5, 4.5]) == [3, 8] and [chunk.damaged for chunk in chunks] == [5]
    assert [chunk.damaged for chunk in read_chunks(info, [0.5, 1.0])] == [0]


def test_all_images_damaged_is_an_error(tmp_path):
    info = probe(write_images(tmp_path, 3))
    for i in range(3):
        cut(tmp_path / f"frame{i}.png")
    with pytest.raises(VideoError, match=r"no image in the folder .* can be decoded"):
        probe(tmp_path)
    with pytest.raises(VideoError, match=r"no image in the folder .* can be decoded"):
        numbers(info, [0.5])


@pytest.fixture
def opened(in_process, monkeypatch):
    """A list of the names of the images that have been opened, in order."""
    names = []

    def opened(content, path):
        names.append(os.path.basename(path))
        return decode_image(content, path)

    monkeypatch.setattr(images, "decode_image", opened)
    return names


def test_only_images_that_are_shown_are_opened_one_by_one(tmp_path, opened):
    write_images(tmp_path, 30)
    cut(tmp_path / "frame20.png")
    info = probe(tmp_path)
    assert opened == ["frame0.png"]
    opened.clear()
    chunks = read_chunks(info, [1.0, 1.1, 5.0, 5.0, 10.0, 10.1, 10.5, 10.6], chunk_bytes=1)
    assert [number_of(rgb) for rgb in next(chunks).pixels] == [2, 2]
    assert opened == ["frame2.png"]
    assert [number_of(rgb) for rgb in pixels(chunks)] == [10, 10, 19, 19, 21, 21]
    assert opened == [f"frame{i}.png" for i in (2, 10, 20, 19, 21)]


def test_a_folder_that_vanished_is_an_error(tmp_path):
    info = probe(write_images(tmp_path, 2))
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    with pytest.raises(VideoError, match="no images"):
        numbers(info, [0.0])
    tmp_path.rmdir()
    with pytest.raises(VideoError, match="cannot read the folder"):
        numbers(info, [0.0])


def test_exif_data_in_a_video_do_not_disturb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 1
    (tmp_path / "camera.mjpeg").write_bytes(b"".join(jpeg(i, exif) for i in range(8)))
    info = probe(tmp_path / "camera.mjpeg")
    assert numbers(info, [0.0, 99.0]) == [0, 7]


def jpeg(number, exif):
    out = io.BytesIO()
    Image.fromarray(numbered_frame(number)).save(out, "JPEG", exif=exif)
    return out.getvalue()
