"""The video decoder: it reads the frames that vLLM's loaders request, and reports the same metadata as OpenCV."""

import numpy as np
import pytest

from evoprune_vllm import DECODER, register
from tests.plugins.vllm.server import data_url, message
from tests.plugins.vllm.serving import NEW, SAMPLES, pruning
from tests.video.files import number_of, numbered_frames, write_image, write_video
from tests.video.kinds import KINDS, write_kind

pytestmark = pytest.mark.vllm

# Files that OpenCV reads completely; others come below.
WHOLE = (
    "h264.mp4", "h264.mov", "h264.mkv", "h264.avi", "hevc.mp4", "hevc.mkv", "vp8.webm", "vp9.webm", "vp9_hidden.webm",
    "picture.gif", "mpeg4.mp4", "prores.mov", "h264_10.mp4", "subtitles.mkv", "cover.mp4", "late.mp4", "late.mkv",
    "h264.flv", "negative.mkv", "negative.mp4", "open_gop.mp4", "fragments.mp4", "odd.mp4", "odd.webm", "turned.mp4",
    "turned_back.mov",
)  # fmt: skip
# OpenCV loses frames of these files, because it has no decoder or its frame numbers differ from its frame count. vLLM 0.33 corrects
# this in six of them: h264.ts, hevc.ts, h264.h264, no_length.mkv, one.mp4 and one.mkv.
LOST = (
    "av1.mp4", "h264.ts", "hevc.ts", "h264.h264", "mpeg1.mpg", "mpeg2.mpg", "vary.mp4", "vary.mkv", "no_length.mkv", "one.mp4",
    "one.mkv",
)  # fmt: skip
LOADERS = {  # vLLM's loaders, with the number of frames requested
    "opencv": {"num_frames": 7},
    "qwen2_vl": {"fps": 3},
    "qwen3_vl": {"fps": 3},
    "opencv_dynamic": {"fps": 2},
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


def load(data: bytes, loader: str = "opencv", **how):
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    return VIDEO_LOADER_REGISTRY.load(loader).load_bytes(data, **how)


def numbers(frames) -> list[int]:
    return [number_of(rgb) for rgb in frames]


@pytest.mark.parametrize("name", WHOLE)
def test_frames_and_metadata_are_those_of_opencv(folder, name):
    data = write_kind(folder, name).read_bytes()
    for loader, how in LOADERS.items():
        theirs, said = load(data, loader, **how)
        ours, found = load(data, loader, backend=DECODER, **how)
        assert found["video_backend"].startswith(DECODER) and said["video_backend"].startswith("opencv")
        del found["video_backend"], said["video_backend"]
        assert found == said and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.abs(np.subtract(ours, theirs, dtype=int)).max() <= 4  # 8-bit pixels are equal
        assert numbers(ours) == [number + KINDS[name].hidden for number in found["frames_indices"]]


@pytest.mark.parametrize("name", LOST)
def test_all_frames_are_read_that_opencv_loses(folder, name):
    data = write_kind(folder, name).read_bytes()
    frames, found = load(data, backend=DECODER)
    assert numbers(frames) == found["frames_indices"] == list(range(KINDS[name].frames))
    assert found["total_num_frames"] == KINDS[name].frames and found["fps"] > 0


def test_each_frame_of_uneven_times_is_read(folder):
    path = write_video(folder / "uneven.mp4", numbered_frames(60), pts=[0.04 * i + 0.013 * (i % 3) for i in range(60)])
    frames, found = load(path.read_bytes(), num_frames=23, backend=DECODER)
    assert numbers(frames) == found["frames_indices"] == np.linspace(0, 59, 23, dtype=int).tolist()


def test_threads_change_nothing_and_must_be_a_number(folder):
    data = write_kind(folder, "h264.mp4").read_bytes()
    right, _ = load(data, num_frames=9, backend=DECODER)
    one, _ = load(data, num_frames=9, backend=DECODER, num_ffmpeg_threads=1)
    assert np.array_equal(one, right)
    for wrong in (-1, "2"):
        with pytest.raises(ValueError, match="num_ffmpeg_threads"):
            load(data, backend=DECODER, num_ffmpeg_threads=wrong)
    with pytest.raises(ValueError, match="device is not supported"):
        load(data, backend=DECODER, device="cuda")


def test_what_is_no_video_is_the_client_s_error(folder, tmp_path, monkeypatch):
    good = write_kind(folder, "h264.mp4").read_bytes()
    picture = write_image(tmp_path / "a.png", numbered_frames(1)[0]).read_bytes()
    for data, says in (
        (b"", "the video is empty"),
        (b"no video", "text file"),
        (good[:500], "the video"),
        (picture, "send it as image_url"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            load(data, backend=DECODER)
        assert "/proc" not in str(caught.value)
    short = write_kind(folder, "short.mp4").read_bytes()
    assert numbers(load(short, num_frames=2, backend=DECODER)[0]) == [0, 2]
    with pytest.raises(ValueError, match=r"no frame is sampled from a video of 0\.3 s"):
        load(short, "opencv_dynamic", fps=2, backend=DECODER)
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(ValueError, match="exceed the maximum"):
        load(good, backend=DECODER)


def test_a_model_answers_as_with_opencv(start):
    """Both choose frames by the rules of the model's loader."""
    asked = [message(data_url((SAMPLES / "square.mp4").read_bytes()), "What colour is the square?")]

    def said(backend: str) -> list[str]:
        from vllm import SamplingParams

        llm = start(**pruning(0.75), media_io_kwargs={"video": {"fps": 2, "backend": backend}})
        greedy = SamplingParams(temperature=0, max_tokens=NEW)
        return [output.outputs[0].text for output in llm.chat(asked, greedy, use_tqdm=False)]

    assert said(DECODER) == said("opencv") == ["green"]
