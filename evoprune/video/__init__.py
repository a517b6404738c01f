"""Video input: probing files, planning which frames to sample, and decoding them.

`frames` probes files and reads their frames, `info` defines the classes that describe a video, and `plan` chooses which frames to
read. The decoders in `readers` are based on PyAV (FFmpeg), decord, and Pillow. Because input files are untrusted, `sandbox` runs
the decoders in a separate process, so that a malformed file cannot crash the calling program.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.video.arrays import in_one, read_frames
    from evoprune.video.clips import cut_clip
    from evoprune.video.download import downloaded
    from evoprune.video.frames import (
        FrameChunk,
        choose_decoder,
        frame_times,
        local_file,
        probe,
        read_chunks,
        read_subtitles,
        scan,
    )
    from evoprune.video.given import GivenInput, Input
    from evoprune.video.held import HeldVideo
    from evoprune.video.info import Subtitles, Video
    from evoprune.video.input_files import Folder, input_state
    from evoprune.video.live import LiveSource
    from evoprune.video.plan import InputLimits, Plan, SamplingOptions, SamplingPlan
    from evoprune.video.sandbox.isolation import Scope, Stopped, keep_idle, warm_up
    from evoprune.video.sound import read_audio
    from evoprune.video.temporary import temporary_file, temporary_folder

__all__ = [
    "Folder",
    "FrameChunk",
    "GivenInput",
    "HeldVideo",
    "Input",
    "InputLimits",
    "LiveSource",
    "Plan",
    "SamplingOptions",
    "SamplingPlan",
    "Scope",
    "Stopped",
    "Subtitles",
    "Video",
    "choose_decoder",
    "cut_clip",
    "downloaded",
    "frame_times",
    "in_one",
    "input_state",
    "keep_idle",
    "local_file",
    "probe",
    "read_audio",
    "read_chunks",
    "read_frames",
    "read_subtitles",
    "scan",
    "temporary_file",
    "temporary_folder",
    "warm_up",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "arrays": ["in_one", "read_frames"],
        "clips": ["cut_clip"],
        "download": ["downloaded"],
        "frames": [
            "FrameChunk",
            "choose_decoder",
            "frame_times",
            "local_file",
            "probe",
            "read_chunks",
            "read_subtitles",
            "scan",
        ],
        "given": ["GivenInput", "Input"],
        "held": ["HeldVideo"],
        "info": ["Subtitles", "Video"],
        "input_files": ["Folder", "input_state"],
        "live": ["LiveSource"],
        "plan": ["InputLimits", "Plan", "SamplingOptions", "SamplingPlan"],
        "sandbox.isolation": ["Scope", "Stopped", "keep_idle", "warm_up"],
        "sound": ["read_audio"],
        "temporary": ["temporary_file", "temporary_folder"],
    },
)
