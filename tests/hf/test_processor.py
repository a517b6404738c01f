"""Inputs made by transformers' processors, which need torchvision (`python -m experiments.environments processor`)."""

import av
import pytest
import torch

import evoprune
from tests.tiny import save_tiny

pytest.importorskip("torchvision", exc_type=ImportError)
pytestmark = pytest.mark.full

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "qwen4_exp"]
NEW = 6


def read(path: str):
    """Return all frames `[T, 3, H, W]` of a video, and the metadata that a processor uses to sample them."""
    from transformers.video_utils import VideoMetadata

    with av.open(path) as file:
        stream = file.streams.video[0]
        rate = float(stream.average_rate)
        frames = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in file.decode(stream)])
    frames = frames.permute(0, 3, 1, 2)
    count, (height, width) = len(frames), frames.shape[2:]
    return frames, VideoMetadata(count, fps=rate, duration=count / rate, width=width, height=height)


SQUARE, PAN, VANISH = (read(f"samples/{name}") for name in ("square.mp4", "pan.mp4", "vanish.webm"))
PROMPTS = {"video": [SQUARE], "several": [PAN, "image", VANISH], "picture": ["image"], "text": []}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A function that makes inputs from prompt names, and a model."""
    from torchvision.transforms.functional import to_pil_image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = save_tiny(tmp_path_factory.mktemp(request.param), family=request.param)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    picture = to_pil_image(SQUARE[0][30])

    def inputs(*names: str):
        texts = []
        for name in names:
            kinds = [{"type": "image" if each == "image" else "video"} for each in PROMPTS[name]]
            content = [*kinds, {"type": "text", "text": "What happens?"}]
            chat = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        every = [each for name in names for each in PROMPTS[name]]
        videos = [each for each in every if each != "image"]
        given = {"images": [picture] * (len(every) - len(videos))} if len(every) > len(videos) else {}
        if videos:
            given |= {"videos": [frames for frames, _ in videos], "video_metadata": [facts for _, facts in videos]}
            given |= {"do_sample_frames": True, "fps": 1}
        return processor(text=texts, padding=True, return_tensors="pt", **given)

    return inputs, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def generated(model, inputs) -> list[list[int]]:
    made = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return made[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("names", [*((name,) for name in PROMPTS), tuple(PROMPTS)], ids="+".join)
def test_answers_to_what_a_processor_made(family, names):
    """At budget 1.0 the answers equal the stock model's; below it, they equal those to each prompt alone."""
    make, model = family
    inputs = make(*names)
    stock = generated(model, inputs)
    with evoprune.EvoPrune(budget=1.0)(model):
        assert generated(model, inputs) == stock
    for pictures in (False, True):
        with evoprune.EvoPrune(budget=0.25, pictures=pictures)(model) as run:
            together = generated(model, inputs)
            columns = run.columns.places if "video" in names else None
            assert together == [generated(model, make(name))[0] for name in names]
        assert columns is None or columns < inputs["input_ids"].shape[1]
