"""Clips with questions, the answers of `VideoQA`, and vLLM requests with the same frames."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import evoprune
from evoprune.session import EncodedInputs, open_inputs
from evoprune.video import SamplingOptions
from evoprune.video_qa import VideoQA
from evoprune_vllm import PREFIX

DEMO = Path(evoprune.__file__).parent / "bundled" / "demo"
SAMPLES = Path(evoprune.__file__).parent.parent / "samples"
VIDEO, PICTURE = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NEW = 16  # tokens of an answer
QUESTIONS = {
    "square.mp4": ("What colour is the square?", "What digit is it?", "Describe the video."),
    "three.mp4": ("How many shapes are there?", "What shape is green?", "Describe the video."),
    "vanish.webm": ("What happens to the circle?", "Which way does the green diamond move?", "Describe the video."),
    "pan.mp4": ("How many shapes are there?", "Describe the video."),
    "flash.mp4": ("Which thing flashes?", "Describe the video."),
    "arrivals.webm": ("What appears first?", "Describe the video."),
}


@dataclass(frozen=True)
class Clip:
    """Frames, uint8 `[F, H, W, 3]`, with the seconds of a frame pair."""

    frames: np.ndarray
    seconds: float

    def item(self):
        """Return the video in vLLM's form."""
        count = len(self.frames)
        metadata = {"fps": 2 / self.seconds, "duration": count * self.seconds / 2, "total_num_frames": count}
        return self.frames, metadata | {"frames_indices": list(range(count)), "do_sample_frames": False}


@dataclass(frozen=True)
class Asked:
    """A question about videos and images, the right answer, and a single video as `VideoQA` encoded it."""

    media: tuple
    question: str
    answer: str = ""
    encoded: EncodedInputs | None = None

    def request(self, budget=None):
        """Return the vLLM request, optionally with its own budget."""
        videos = [each.item() for each in self.media if isinstance(each, Clip)]
        pictures = [each for each in self.media if not isinstance(each, Clip)]
        text = "".join(VIDEO if isinstance(each, Clip) else PICTURE for each in self.media) + self.question
        data = {name: items for name, items in (("video", videos), ("image", pictures)) if items}
        made = {"prompt": PROMPT.format(text), "multi_modal_data": data}
        return made if budget is None else made | {"mm_processor_kwargs": {"evoprune_budget": budget}}


def clip_of(qa: VideoQA, path: Path, fps: float):
    """Return a video as `qa` encodes it, and a clip of the frames that it read."""
    held = []

    def kept(plan, chunks):
        for chunk in chunks:
            held.append(chunk.pixels.copy())
            yield chunk

    with closing(open_inputs(qa.session, [path], SamplingOptions(fps=fps), frames=kept)) as video:
        encoded = video.encode()
        return encoded, Clip(np.concatenate(held), video.plans[0].sampling.seconds_per_pair(2))


def samples(fps: float = 2.0, names=tuple(QUESTIONS), model=str(DEMO), dtype="fp32", **pruning) -> list[Asked]:
    """Return the questions about the samples, with the answers of `VideoQA` for these settings."""
    qa, asked = VideoQA.load(model, dtype=dtype, **pruning), []
    for name in names:
        encoded, clip = clip_of(qa, SAMPLES / name, fps)
        for question in QUESTIONS[name]:
            answer = encoded.ask(question, max_new_tokens=NEW).text
            asked.append(Asked((clip,), question, answer, encoded))
    return asked


def pruning(rate: float, method: str | None = None) -> dict:
    """Return the options of a server that prunes."""
    section = {} if method is None else {"additional_config": {"evoprune": {"method": method}}}
    return {"video_pruning_rate": rate, **section}


def make_llm(model=DEMO, ours: bool = True, family: str = "Qwen2_5_VL", **options):
    """Return vLLM's engine with evoprune's encoder, or with its own."""
    from vllm import LLM

    override = {"hf_overrides": {"architectures": [f"{PREFIX}{family}ForConditionalGeneration"]}} if ours else {}
    limits = {"max_model_len": 4096, "max_num_seqs": 8, "limit_mm_per_prompt": {"video": 2, "image": 2}}
    how = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "seed": 0}
    return LLM(model=str(model), **{**how, **limits, **override, **options})


def answers(llm, requests, together: bool = True) -> list[str]:
    """Return the answers to requests, in one batch or one after another."""
    return [output.outputs[0].text for output in outputs(llm, requests, together)]


def outputs(llm, requests, together: bool = True):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW)
    batches = [requests] if together else [[request] for request in requests]
    return [output for batch in batches for output in llm.generate(batch, greedy, use_tqdm=False)]


def farthest(llm, asked: list[Asked], budget=None) -> float:
    """Return the largest difference of a token's log probability between this engine's answers and `VideoQA`."""
    from vllm import SamplingParams

    greedy, most = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0), 0.0
    for output, each in zip(
        llm.generate([a.request(budget) for a in asked], greedy, use_tqdm=False), asked, strict=True
    ):
        said = output.outputs[0]
        logits, _ = each.encoded.read_along(each.question, said.token_ids)
        right = logits.float().log_softmax(-1)
        for i, (token, found) in enumerate(zip(said.token_ids, said.logprobs, strict=True)):
            most = max(most, abs(found[token].logprob - float(right[i, token])))
    return most


def same(found: list[str], asked: list[Asked]) -> bool:
    """Return True if all answers are right. Prints the wrong ones."""
    wrong = [(a, b.answer, b.question) for a, b in zip(found, asked, strict=True) if a.strip() != b.answer.strip()]
    for row in wrong:
        print(row)
    return not wrong
