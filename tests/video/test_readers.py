"""Test what every reader must do. A reader without an entry in `WRITERS` fails."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise

import pytest
from PIL import Image

from evoprune.errors import VideoError
from evoprune.video.clips import cut_clip
from evoprune.video.frames import choose_decoder, frame_times, probe, read_chunks, read_subtitles, scan
from evoprune.video.input_files import Folder
from evoprune.video.reader_table import FILES, READERS, package_of, reader_at, reader_of
from evoprune.video.readers.live import LiveReader
from tests.video.files import number_of, numbered_frame, numbered_frames, numbers, write_image, write_video

COUNT = 4
FPS = 2.0
FUNCTIONS = ("claims", "probe", "read", "intervals", "frame_times")


def folder(path):
    path.mkdir()
    for number, rgb in enumerate(numbered_frames(COUNT)):
        write_image(path / f"{number}.png", rgb)


def animation(path):
    first, *others = (Image.fromarray(rgb) for rgb in numbered_frames(COUNT))
    first.save(path, save_all=True, append_images=others, duration=500, lossless=True)


# For each reader: a file name, and a function that writes COUNT frames there, FPS per second. Frame i shows the number i.
WRITERS = {
    "folder": ("frames", folder),
    "picture": ("a.png", lambda path: write_image(path, numbered_frame(0))),
    "animation": ("a.webp", animation),
    "pyav": ("a.mp4", lambda path: write_video(path, numbered_frames(COUNT), fps=2)),
}
every_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.module)


@pytest.fixture
def path(reader, tmp_path):
    name, write = WRITERS[reader.module]
    write(tmp_path / name)
    return str(tmp_path / name)


def damage(path, tmp_path):
    """Cut off a file after its first bytes. In a folder, cut off every file."""
    for each in (tmp_path / path).glob("*") if Folder.is_at(path) else [tmp_path / path]:
        each.write_bytes(each.read_bytes()[:40] + bytes(range(256)))


@every_reader
def test_a_reader_reads_its_inputs_at_exact_times(reader, path):
    assert reader_at(path) is reader
    info = probe(path, folder_fps=FPS)
    assert reader_of(info) is reader and info.kind == reader.kind
    assert (info.path, info.width, info.height) == (path, 64, 48)
    if info.is_picture:
        assert numbers(info, [0.0, 0.0]) == [0, 0] and frame_times(info).times_s == [0.0]
        with pytest.raises(VideoError, match=r"nothing to scan") as caught:
            scan(path)
        assert caught.value.hint
        return
    assert (info.frames_total, info.fps, info.duration_s) == (COUNT, FPS, COUNT / FPS)
    assert frame_times(info).times_s == [0.0, 0.5, 1.0, 1.5]
    wanted = [-1.0, 0.0, 0.49, 0.5, 0.9, 1.0, 1.0, 1.6, 99.0]
    (chunk,) = read_chunks(info, wanted)
    assert [number_of(rgb) for rgb in chunk.pixels] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert chunk.times_s == (0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5) and not chunk.damaged
    found = scan(path, folder_fps=FPS)
    assert (found.frames, found.damaged, found.duration_s) == (COUNT, 0, COUNT / FPS)


@every_reader
def test_a_damaged_input_is_explained_by_its_reader(reader, path, tmp_path):
    info = probe(path, folder_fps=FPS)
    damage(path, tmp_path)
    with pytest.raises(VideoError) as caught:
        probe(path, folder_fps=FPS)
    assert path in caught.value.message and caught.value.hint
    try:
        reader.load().probe(path, FPS)
    except VideoError as problem:  # not replaced by a more general error
        assert caught.value.message == problem.message
    with pytest.raises(VideoError) as caught:
        numbers(info, [0.0])
    assert path in caught.value.message and caught.value.hint


@every_reader
def test_an_input_that_disappears_is_an_error(reader, path, tmp_path):
    info = probe(path, folder_fps=FPS)
    if Folder.is_at(path):
        shutil.rmtree(path)
    else:
        (tmp_path / path).unlink()
    for read in (lambda: numbers(info, [0.0]), lambda: probe(path)):
        with pytest.raises(VideoError) as caught:
            read()
        assert path in caught.value.message and caught.value.hint


@every_reader
def test_what_only_video_files_have(reader, path, tmp_path):
    info = probe(path, folder_fps=FPS)
    assert not read_subtitles(info, "auto").lines
    assert not info.has_sound
    if reader is FILES:
        return
    with pytest.raises(VideoError, match="not a video file") as caught:
        cut_clip(info, 0.0, 1.0, str(tmp_path))
    assert caught.value.hint
    with pytest.raises(VideoError, match=f"is {reader.noun}") as caught:
        LiveReader(path, path, 1.0)
    assert caught.value.hint


@every_reader
def test_an_entry_of_the_table(reader, path):
    module = reader.load()
    assert all(callable(getattr(module, name)) for name in FUNCTIONS)
    assert choose_decoder("auto", probe(path)) == reader.decoder
    assert version(package_of(reader.decoder))  # the package is installed
    assert all(extension == extension.lower() and extension[0] == "." for extension in reader.extensions)
    assert reader is FILES or reader.containers


def test_the_table_is_unambiguous():
    assert len({reader.module for reader in READERS}) == len(READERS) and READERS[-1] is FILES
    for names in ("containers", "extensions"):
        listed = sorted(name for reader in READERS for name in getattr(reader, names))
        assert all(a != b for a, b in pairwise(listed)), names


def test_a_folder_lists_the_files_of_every_reader(tmp_path):
    names = [f"a{extension}" for reader in READERS for extension in reader.extensions]
    for name in names:
        (tmp_path / name).touch()
    assert {path.rpartition("/")[2] for path in Folder(str(tmp_path)).files} == {*names}


def test_the_table_imports_no_decoder():
    code = "import sys, evoprune.video.input_files; sys.exit(str({'av', 'PIL', 'numpy', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "set()\n"
