"""Encrypted videos are rejected in every container, because a decoder would produce noise."""

import random
from contextlib import closing

import av
import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe
from evoprune.video.readers.live import LiveReader
from tests.video.files import numbered_frames, write_video

FRAMES = numbered_frames(20)


def add_boxes(content, path, boxes):
    """Return an MP4's contents with boxes added at the end of the innermost box in `path`. The index must be at the end."""
    content = bytearray(content)
    at = 0
    places = []
    for kind in path:
        at = content.index(kind, at) - 4
        places.append(at)
    end = at + int.from_bytes(content[at : at + 4], "big")
    for place in places:
        size = int.from_bytes(content[place : place + 4], "big") + len(boxes)
        content[place : place + 4] = size.to_bytes(4, "big")
    content[end:end] = boxes
    return content


def box(kind, *contents):
    content = b"".join(contents)
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def write_cenc(path, told=True):
    """Write an MP4 whose packets are encrypted, so that they contain only noise.

    If `told` is True, the packets are marked as encrypted with CENC. Otherwise, only the type of the track's entry shows that they
    are encrypted, which is all that FFmpeg recognizes in PIFF.
    """
    content = bytearray(write_video(path, FRAMES).read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                noise = random.Random(packet.pos).randbytes(packet.size - 5)  # noise after the packet's length and type
                content[packet.pos + 5 : packet.pos + packet.size] = noise
    kinds = b"moov", b"trak", b"mdia", b"minf", b"stbl"
    scheme = box(b"schm", bytes(4), b"cenc", bytes([0, 1, 0, 0]))
    key = box(b"schi", box(b"tenc", bytes([0, 0, 0, 0, 0, 0, 1, 8]), b"k" * 16))
    sinf = box(b"sinf", box(b"frma", b"avc1"), *((scheme, key) if told else ()))
    content = add_boxes(content, (*kinds, b"stsd", b"avc1"), sinf)
    entry = content.index(b"avc1", content.index(b"stsd"))
    content[entry : entry + 4] = b"encv"
    if told:
        count = len(FRAMES).to_bytes(4, "big")
        vectors = b"".join(number.to_bytes(8, "big") for number in range(len(FRAMES)))
        content = add_boxes(content, kinds, box(b"senc", bytes(4), count, vectors))
    path.write_bytes(content)


def write_matroska(path):
    """Write a Matroska file and replace the track's name with ContentEncodings."""
    plain = write_video(path.with_name("plain.mkv"), FRAMES)
    with av.open(str(plain)) as source, av.open(str(path), "w", container_options={"write_crc32": "0"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.metadata["title"] = "K" * 30
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)

    def element(name, content):
        return bytes.fromhex(name) + bytes([0x80 | len(content)]) + content

    encryption = element("47e1", b"\x05") + element("47e2", b"key of 9 ")
    encoding = element("5033", b"\x01") + element("5032", b"\x01") + element("5035", encryption)
    path.write_bytes(path.read_bytes().replace(element("536e", b"K" * 30), element("6d80", element("6240", encoding))))


def write_sample_aes(path):
    """Write an MPEG-TS file whose stream table states the type that HLS uses for encrypted H.264."""
    content = bytearray(write_video(path, FRAMES).read_bytes())
    for at in range(0, len(content), 188):
        if content[at + 1] & 0x40 and int.from_bytes(content[at + 1 : at + 3], "big") & 0x1FFF == 0x1000:
            begin = at + 5 + content[at + 4]
            end = begin + 3 + (int.from_bytes(content[begin + 1 : begin + 3], "big") & 0xFFF)
            content[content.index(0x1B, begin + 12, end)] = 0xDB
            content[end - 4 : end] = mpeg_crc(content[begin : end - 4]).to_bytes(4, "big")
    path.write_bytes(content)


def mpeg_crc(content):
    value = 2**32 - 1
    for byte in content:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) % 2**32
    return value


WRITERS = {
    "cenc.mp4": write_cenc,
    "piff.mp4": lambda path: write_cenc(path, told=False),
    "matroska.mkv": write_matroska,
    "sample_aes.ts": write_sample_aes,
}


@pytest.mark.parametrize("name", WRITERS)
def test_encrypted_files_are_refused(name, tmp_path):
    WRITERS[name](tmp_path / name)
    with pytest.raises(VideoError, match=f"{name} is encrypted") as caught:
        probe(tmp_path / name)
    assert "DRM" in caught.value.hint


@pytest.mark.parametrize("name", ["cenc.mp4", "matroska.mkv", "sample_aes.ts"])
def test_encrypted_live_video_is_refused(name, tmp_path):
    WRITERS[name](tmp_path / name)
    with (
        pytest.raises(VideoError, match=f"{name} is encrypted"),
        closing(LiveReader(str(tmp_path / name), name, 1.0)) as reader,
    ):
        reader.next(0.0)
