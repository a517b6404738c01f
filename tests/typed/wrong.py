"""Mistakes that a type checker finds, one per line, and no other errors."""

import torch

import evoprune


def mistakes(qa: evoprune.VideoQA, video: evoprune.EncodedInputs, model: torch.nn.Module) -> None:
    evoprune.VideoQA.load("demo", budget=["fast"])
    evoprune.VideoQA.load("demo", devise="cpu")
    evoprune.VideoQA.load("demo", quantize="int2")
    evoprune.VideoQA.load("demo", seed="one")
    evoprune.VideoQA.load("demo", dtype="fp61")
    evoprune.VideoQA.load("demo", threads="all")
    qa.encode("clip.mp4", frams=4)
    qa.encode("clip.mp4", seek="exactly")
    qa.encode("clip.mp4", start_s="1:30")
    qa.encode(3)
    qa.ask("clip.mp4", "What?", think="yes")
    video.ask("What?", temperature="hot")
    video.ask("What?", max_tokens=3)
    video.ask(["What?"])
    video.ask("What?", schema=int, max_tokens=3)
    print(video.ask("What?", schema=int).parsed.color)
    qa.stream(window="2s")
    evoprune.EvoPrune(budget=None)
    evoprune.EvoPrune(bugdet=0.1)
    evoprune.apply(model, budget=b"fast")
    evoprune.apply(model, position="host")
    evoprune.encode(model, torch.zeros(1), torch.zeros(1), budget=None)
    evoprune.processor_inputs("demo", "clip.mp4", "What?", frams=4)
    evoprune.read_frames("clip.mp4", frames="all")
    evoprune.read_ahead("clip.mp4", fsp=2.0)
    evoprune.Cache(limit_bytes="2 GiB")
    evoprune.VideoQa.load("demo")
