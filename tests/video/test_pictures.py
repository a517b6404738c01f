"""Still images of every kind are read with the same pixels as by Hugging Face, or are rejected."""

import io
from inspect import signature

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_chunks, scan
from tests.decoders import needs_avif
from tests.video.files import numbered_frames, write_video

SIZE = (37, 23)
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
ALPHA = np.dstack([RGB, np.indices(SIZE[::-1]).sum(0).astype(np.uint8) * 4])
GREY16 = (np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1]) * 77).astype(np.uint16)


def image(pixels, mode=None):
    return Image.fromarray(pixels).convert(mode) if mode else Image.fromarray(pixels)


def jpeg(made):
    content = io.BytesIO()
    made.save(content, "JPEG")
    return content.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# Before 5.21, transformers returned a Pillow image without transparency instead of putting the image over white.
OVER_WHITE = "return_numpy" in signature(convert_to_rgb).parameters
# How to make a file of each format, and the expected result.
KINDS = {
    "rgb.jpg": (image(RGB), {}),
    "grey.jpg": (image(RGB, "L"), {}),
    "cmyk.jpg": (image(RGB, "CMYK"), {}),
    "progressive.jpg": (image(RGB), {"progressive": True}),
    "thumbnail.jpg": (image(RGB), {"comment": jpeg(image(RGB[:9, :9]))}),
    "turned.jpg": (image(RGB), {"exif": exif(6)}),
    "mirrored.jpg": (image(RGB), {"exif": exif(5)}),
    "rgb.png": (image(RGB), {}),
    "alpha.png": (image(ALPHA), {}),
    "grey.png": (image(RGB, "L"), {}),
    "grey_alpha.png": (image(ALPHA, "LA"), {}),
    "palette.png": (image(RGB, "P"), {}),
    "palette_transparent.png": (image(RGB, "P"), {"transparency": 3}),
    "black_and_white.png": (image(RGB, "1"), {}),
    "turned.png": (image(RGB), {"exif": exif(3)}),
    "turned.tif": (image(RGB), {"exif": exif(8)}),
    "mirrored.tif": (image(RGB), {"exif": exif(7)}),
    "rgb.webp": (image(RGB), {"lossless": True}),
    "alpha.webp": (image(ALPHA), {"lossless": True}),
    "rgb.tiff": (image(RGB), {}),
    "cmyk.tiff": (image(RGB, "CMYK"), {}),
    "deflated.tiff": (image(RGB), {"compression": "tiff_deflate"}),
    "rgb.bmp": (image(RGB), {}),
    "one.gif": (image(RGB, "P"), {}),
    "rgb.avif": (image(RGB), {}),
    "picture.mp4": (image(RGB), {"format": "PNG"}),  # the extension does not matter
    "no_ending": (image(RGB), {"format": "JPEG"}),
}


def written(path, made, how):
    made.save(path, **how)
    return path


def read(info):
    (chunk,) = read_chunks(info, [0.0])
    return chunk.pixels[0]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_avif if name == "rgb.avif" else ()) for name in KINDS])
def test_every_kind_is_what_hugging_face_sees(name, tmp_path):
    path = written(tmp_path / name, *KINDS[name])
    info = probe(path)
    picture = ImageOps.exif_transpose(Image.open(path))
    if not OVER_WHITE and picture.has_transparency_data:
        pytest.skip("transformers before 5.21 drops transparency")
    theirs = np.array(convert_to_rgb(picture, return_numpy=True) if OVER_WHITE else convert_to_rgb(picture))
    assert (info.kind, info.height, info.width, info.duration_s) == ("picture", *theirs.shape[:2], None)
    assert np.array_equal(read(info), theirs)


@pytest.mark.parametrize(
    ("comment", "tags"),
    [("by the sea", {"comment": "by the sea"}), (b"", {}), (b"\xff\xd8\xff", {}), (b"x" * 60_000, {})],
    ids=["text", "none", "no text", "too long"],
)
def test_a_comment_is_a_tag(tmp_path, comment, tags):
    assert probe(written(tmp_path / "a.jpg", image(RGB), {"comment": comment})).tags == tags


@pytest.mark.parametrize(("name", "mode"), [("grey.png", None), ("grey.tiff", None), ("wide.tiff", "I")])
def test_16_bits_become_8_by_their_upper_half(name, mode, tmp_path):
    made = Image.fromarray(GREY16) if mode is None else Image.fromarray(GREY16.astype(np.int32))
    shown = read(probe(written(tmp_path / name, made, {})))
    assert np.array_equal(shown, np.repeat((GREY16 >> 8).astype(np.uint8)[..., None], 3, 2))


def test_a_jpeg_with_a_second_picture_behind_it_is_the_first(tmp_path):
    path = tmp_path / "phone.jpg"
    image(RGB).save(path, "MPO", save_all=True, append_images=[image(RGB[::2, ::2])])
    info = probe(path)
    assert (info.codec, info.width, info.height) == ("jpeg", *SIZE) and read(info).shape == RGB.shape


def animation(path, **how):
    first, *others = [Image.fromarray(frame) for frame in numbered_frames(3)]
    first.save(path, save_all=True, append_images=others, **how)
    return path


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "h264.jpg"])
def test_animated_gif_and_png_and_what_only_ends_like_a_picture_are_videos(name, tmp_path):
    if name == "h264.jpg":
        write_video(tmp_path / "a.mp4", numbered_frames(3)).rename(tmp_path / name)
    else:
        animation(tmp_path / name, duration=100)
    info = probe(tmp_path / name)
    assert info.kind == "video" and info.duration_s == pytest.approx(0.3)


def raw(path):
    """Write a file that looks like a camera raw file, in which a small preview comes first."""
    image(RGB).save(path, tiffinfo={254: 1})
    return path


def truncated(path):
    content = io.BytesIO()
    image(np.tile(RGB, (9, 9, 1))).save(content, path.suffix[1:].replace("jpg", "jpeg"))
    path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    return path


def plain(pixels):
    return lambda path: written(path, image(pixels), {})


REFUSED = {
    "pages.tiff": (animation, "has several pages"),
    "raw.tiff": (raw, "only the preview"),
    "float.tiff": (plain(RGB[..., 0].astype(np.float32)), "floating-point"),
    **{f"truncated.{end}": (truncated, "cannot read the image") for end in ("jpg", "png", "webp", "bmp", "tiff")},
    "picture.ppm": (plain(RGB), "image in an unsupported format"),
    "picture.jp2": (plain(RGB), "image in an unsupported format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_as_it_is_is_refused(name, tmp_path):
    make, says = REFUSED[name]
    path = make(tmp_path / name)
    with pytest.raises(VideoError, match=says) as caught:
        read(probe(path))
    assert caught.value.hint and caught.value.exit_code == 3


def test_there_is_nothing_to_scan_in_a_picture(tmp_path):
    with pytest.raises(VideoError, match="nothing to scan"):
        scan(written(tmp_path / "a.png", *KINDS["rgb.png"]))
