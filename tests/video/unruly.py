"""A worker process that misbehaves when it reads files with certain names. For example, `crash.mp4` makes it crash."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from evoprune.errors import VideoError
from evoprune.video.readers import ffmpeg
from evoprune.video.sandbox import channel, worker

C = ctypes.PyDLL(None)  # calls into C do not release the GIL, as may happen in a decoder's callbacks
PROGRAM = "import sys; sys.path[:] = {paths}; from tests.video.unruly import main; main({socket})"


def sleep_in_c() -> None:
    C.sleep(1000)


def slow() -> None:
    for _ in range(30):
        time.sleep(0.1)
        ffmpeg.alive()


def talk_nonsense() -> None:
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"\xff" * 100)
        except OSError:
            continue
    time.sleep(1000)


def take_memory() -> None:
    bytearray(2**33)


def write_a_file() -> None:
    with open("written", "wb") as file:
        file.write(b"x")


def tell_modules() -> None:
    raise VideoError(" ".join(sys.modules))


def bug() -> None:
    raise ZeroDivisionError("1/0")


DEEDS = {
    "crash": lambda: C.memset(0, 0, 1),
    "abort": os.abort,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(7),
    "hang": sleep_in_c,
    "slow": slow,
    "nonsense": talk_nonsense,
    "memory": take_memory,
    "write": write_a_file,
    "modules": tell_modules,
    "bug": bug,
}


def behave(path: str) -> None:
    """Misbehave in the way that the file's name says (see `DEEDS`).

    A name that begins with `once_` has an effect only the first time. Folders next to the file record that this has happened, or
    that the process is about to hang.
    """
    name = Path(path).stem
    if name.startswith("once_"):
        try:
            os.mkdir(path + ".done")
        except FileExistsError:
            return
        name = name.removeprefix("once_")
    if name == "hang":
        os.makedirs(path + ".begun", exist_ok=True)
    DEEDS.get(name, lambda: None)()


class UnrulyReader(worker.FrameReader):
    """Misbehaves before the third array of frames, or before the first array if the file's name begins with `first_`."""

    def __init__(self, info, times_s, **how):
        super().__init__(info, times_s, **how)
        self.path, self.filled = info.path, 0

    def fill(self, frames):
        self.filled += 1
        if self.filled == (1 if "first_" in self.path else 3):
            behave(self.path.replace("later_", "").replace("first_", ""))
        return super().fill(frames)


class UnrulyClip(worker.ClipReader):
    """Misbehaves before it returns a clip's bytes, if the file's name begins with `clip_`."""

    def fill(self, content):
        if "clip_" in self._path:
            behave(self._path.replace("clip_", ""))
        return super().fill(content)


class UnrulySound(worker.SoundReader):
    """Misbehaves before it returns sound, if the file's name begins with `sound_`."""

    def __init__(self, info, **how):
        super().__init__(info, **how)
        self.path = info.path

    def fill(self, content):
        if "sound_" in self.path:
            behave(self.path.replace("sound_", ""))
        return super().fill(content)


def main(socket: int) -> None:
    channel.ALIVE_EVERY_S = 0.05
    probe = worker.probe
    worker.TASKS["probe"] = lambda path, folder_fps: behave(path) or probe(path, folder_fps)
    worker.FrameReader = UnrulyReader
    worker.ClipReader = UnrulyClip
    worker.SoundReader = UnrulySound
    worker.main(socket)
