"""Compare Qwen3-VL with transformers at full budget, and with a hand-written prompt at smaller budgets."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import evoprune
from evoprune import methods
from evoprune.bench import hugging_face_model
from evoprune.bench.clips import place_of
from evoprune.language import LanguageModel, prompt_positions, prune_prompt
from evoprune.methods import EncoderPlan, TowerShape
from evoprune.model import QwenVL
from evoprune.session.cache import Cache
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions
from evoprune.session.published import BUNDLED_CONFIGS
from evoprune.video import read_chunks
from evoprune.video_qa import VideoQA
from evoprune.vision import encode_rows, normalised, pixel_patches, resize
from evoprune.vision.patches import patch_means, scan
from tests.hf.reference import skip_where_not_taken
from tests.methods.tokens import plan_of
from tests.quantized import parameters
from tests.tiny import save_tiny
from tests.vision.reference import tokens_slowly

CLIP, LONG, QUESTION = "samples/square.mp4", "samples/arrivals.webm", "What happens?"
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"])
def folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), family=request.param)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder), dtype="fp32", pack=False)


@pytest.fixture(scope="module")
def host(loaded):
    """Return a transformers model with the same weights."""
    model, special = hugging_face_model(loaded.model), loaded.tokenizer.specials()
    for name in ("video", "image"):
        setattr(model.config, f"{name}_token_id", special[f"<|{name}_pad|>"])
    model.config.vision_end_token_id = special["<|vision_end|>"]
    model.generation_config.eos_token_id = list(loaded.eos_ids)
    return model


def generated(host, inputs, n=12) -> list[int]:
    out = host.generate(**inputs, max_new_tokens=n, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def answered(loaded, path, n=12, **pruning) -> list[int]:
    answer = VideoQA(loaded, **pruning).encode(path).ask(QUESTION, max_new_tokens=n)
    return answer.ids if answer.text is not None else []


@pytest.mark.few(3)
@pytest.mark.parametrize("path", [CLIP, LONG, [CLIP, LONG], "samples/square.png"])
def test_full_budget_is_hugging_faces_generate(folder, loaded, host, path, tmp_path):
    if path == "samples/square.png":
        path = picture(tmp_path)
    inputs = evoprune.processor_inputs(folder, path, QUESTION, max_visual_tokens=4096)
    theirs = [i for i in generated(host, inputs) if i not in loaded.eos_ids]
    assert answered(loaded, path, budget=1.0) == theirs


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_answers_attend_to_a_sliding_window_as_in_transformers(family, tmp_path):
    """transformers obeys `sliding_window` in the KV cache only, so prompts have no window. Questions share a prefix."""
    from transformers import AutoModelForImageTextToText

    folder = save_tiny(tmp_path, family=family)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= {"sliding_window": 8, "use_sliding_window": False}
    (folder / "config.json").write_text(json.dumps(content))
    how = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    host = AutoModelForImageTextToText.from_pretrained(folder, **how).eval()
    few = {"frames": 4, "max_visual_tokens": 64}
    inputs = evoprune.processor_inputs(folder, CLIP, QUESTION, **few)
    theirs = host.generate(
        **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = theirs.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    qa = VideoQA.load(str(folder), budget=1.0, method="none", dtype="fp32", device="cpu")
    video = qa.encode(CLIP, **few)
    for question in (QUESTION, "How many?", QUESTION):
        answer = video.ask(question, max_new_tokens=12)
        assert answer.text and (question != QUESTION or answer.ids in (ids, ids[:-1]))
    chat = video.chat()
    assert chat.ask(QUESTION, max_new_tokens=12).text
    later = qa.encode(CLIP, **few).chat(None, chat.messages[:2])
    assert chat.ask("Why?", max_new_tokens=12).text == later.ask("Why?", max_new_tokens=12).text
    logits, _ = video.read_along(QUESTION, ids)
    assert torch.allclose(logits, torch.cat(theirs.logits), atol=1e-3)


def picture(folder):
    from PIL import Image

    path, noise = folder / "noise.png", np.random.default_rng(0).integers(0, 255, (130, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


def patches_of(plan) -> torch.Tensor:
    chunks = read_chunks(plan.info, plan.sampling.times_s)
    frames = torch.from_numpy(np.concatenate([chunk.pixels for chunk in chunks]))
    return normalised(pixel_patches(resize(frames, plan.height, plan.width), 16), HALF)


class Written:
    """A prompt written by hand: token ids, their positions in time, height and width, and the places of visual tokens."""

    def __init__(self, tokenizer):
        self.tokenizer, self.specials = tokenizer, tokenizer.specials()
        self.ids, self.places, self.visual, self.at = [], [], [], 0

    def say(self, *pieces, write=True):
        for piece in pieces:
            for token in [self.specials[piece]] if piece in self.specials else self.tokenizer.encode(piece):
                if write:
                    self.ids.append(token)
                    self.places.append((self.at,) * 3)
                self.at += 1

    def show(self, height, width, kept):
        for y in range(height):
            for x in range(width):
                if y * width + x in kept:
                    self.visual.append(len(self.ids))
                    self.ids.append(self.specials["<|video_pad|>"])
                    self.places.append((self.at, self.at + y, self.at + x))
        self.at += max(height, width)


def written(tokenizer, plan, kept) -> Written:
    made, (pairs, height, width) = Written(tokenizer), plan.grid
    made.say("<|im_start|>", "system\nYou are a helpful assistant.", "<|im_end|>", "\n", "<|im_start|>", "user\n")
    frames, duration = 2 * pairs, plan.info.duration_s
    for pair in range(pairs):
        here = {unit % (height * width) for unit in kept if unit // (height * width) == pair}
        seconds = (2 * pair + 1) * duration / frames  # the mean of (2 p + 0.5) / n and (2 p + 1.5) / n
        made.say(f"<{seconds:.1f} seconds>", "<|vision_start|>", write=bool(here))
        made.show(height, width, here)
        made.say("<|vision_end|>", write=bool(here))
    made.say(QUESTION, "<|im_end|>", "\n", "<|im_start|>", "assistant\n")
    return made


@torch.no_grad()
def logits_by_hand(host, tokenizer, plan, kept, features, sizes, answer) -> torch.Tensor:
    """Return the logits of each token in an answer. `features` is `[1 + n, K, D]`."""
    prompt = written(tokenizer, plan, kept)
    count = len(prompt.ids)
    for token in answer[:-1]:
        prompt.ids.append(token)
        prompt.places.append((prompt.at,) * 3)
        prompt.at += 1
    text, length = host.model.language_model, len(prompt.ids)
    embeds = text.embed_tokens(torch.tensor(prompt.ids))
    embeds[prompt.visual] = features[0].float()
    mask = torch.full((length, length), -torch.inf).triu(1)
    if sizes is not None:
        mask[:, prompt.visual] += sizes.log()
    is_visual = torch.zeros(1, length, dtype=torch.bool)
    is_visual[0, prompt.visual] = True
    positions = torch.cat([torch.arange(length)[None], torch.tensor(prompt.places).T])[:, None]
    hidden = text(
        inputs_embeds=embeds[None],
        position_ids=positions,
        attention_mask=mask[None, None],
        **({"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(features[1:])} if len(features) > 1 else {}),
    ).last_hidden_state[0, count - 1 :]
    return host.lm_head(hidden)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", ["evoprune", "evoprune:reuse=0", "divprune", "reuse+divprune", "tome", "evs", "reuse+evs"]
)
@pytest.mark.parametrize("budget", [0.4, 0.06])
def test_pruned_logits_against_a_prompt_by_hand(loaded, host, name, budget):
    if loaded.language.reads_ids:
        pytest.skip("transformers cannot read a pruned prompt, because it derives the token ids from the embeddings")
    budget = max(budget, 0.2) if name == "tome" else budget  # leaves one row per frame pair
    video = VideoQA(loaded, budget=budget, method=name).encode(LONG, max_visual_tokens=60)
    plan, answer = video.plan, [5, 300, 7]
    ours, _ = video.read_along(QUESTION, answer)
    method, grid, patches = methods.MethodChain.parse(name), plan.grid, patches_of(plan)
    keep, visual = plan.encoder.keep, host.model.visual
    units = grid[1] * grid[2]
    source, _ = scan(patch_means(patches, units, HALF), threshold=8.0)
    reuse = plan_of(method, TowerShape.of_tower(visual), grid, keep).reuse
    changed = source == torch.arange(grid[0])[:, None] if reuse else None
    kept, features, sizes = tokens_slowly(visual, patches, grid, method, keep, changed)
    assert video.encoded.kept.tolist() == kept
    theirs = logits_by_hand(host, loaded.tokenizer, plan, kept, features, sizes, answer)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_a_frame_pair_without_tokens_is_left_out_of_the_text(loaded):
    full = VideoQA(loaded, budget=1.0).encode(LONG, max_visual_tokens=60).ask(QUESTION, max_new_tokens=1)
    few = VideoQA(loaded, budget=0.06, method="random").encode(LONG, max_visual_tokens=60)
    asked = few.ask(QUESTION, max_new_tokens=1)
    assert full.text is not None and asked.text is not None
    empty = sum(count == 0 for count in few.encoded.kept_per_pair)
    stamp = len(loaded.tokenizer.encode("<0.3 seconds>")) + 2
    assert empty and full.report.tokens.text - asked.report.tokens.text == empty * stamp
    again = few.ask("Which one?", max_new_tokens=3).text  # with the keys and values of the first prompt
    assert again == VideoQA(loaded, budget=0.06, method="random").encode(LONG, max_visual_tokens=60).ask(
        "Which one?", max_new_tokens=3
    )


def test_the_cache_keeps_deepstack(loaded, tmp_path):
    cache, qa = Cache(tmp_path), VideoQA(loaded, budget=0.3)
    first = qa.encode(CLIP, cache=cache)
    again = qa.encode(CLIP, cache=cache)
    assert again.encoded.rows.is_meta  # it was loaded from the cache
    if loaded.model.config.vision_config.deepstack_visual_indexes:
        assert torch.equal(first.encoded.deepstack, again.encoded.deepstack)
    assert first.ask(QUESTION, max_new_tokens=5).text == again.ask(QUESTION, max_new_tokens=5).text


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["fastv", "evoprune+fastv", "sparsevlm", "visionzip", "cdpruner", "ipcv", "subsample"])
def test_every_kind_of_method_runs(loaded, name):
    if methods.MethodChain.parse(name).language and not loaded.model.native:
        pytest.skip("transformers runs this language model")
    made = VideoQA(loaded, budget=0.3, method=name).encode(LONG).ask(QUESTION, max_new_tokens=4)
    assert made.text is not None and made.report.tokens.new <= 4


@pytest.mark.parametrize("quantize", parameters("int8", "int4"))
def test_it_answers_in_fewer_bits(folder, loaded, quantize):
    if not loaded.model.native:
        pytest.skip("transformers runs this language model")
    loaded = load_model(str(folder), dtype="fp32", quantize=quantize)
    made = VideoQA(loaded, budget=0.5).encode(CLIP).ask(QUESTION, max_new_tokens=4)
    assert made.text is not None and made.report.model.quantize == quantize


@pytest.mark.parametrize("name", [name for name in BUNDLED_CONFIGS if "Qwen3-VL" in name and "-A3B" not in name])
def test_the_bundled_dimensions_are_those_of_transformers(name):
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = describe(ModelOptions(name, load_format="dummy")).config
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(BUNDLED_CONFIGS[name]))
    ours = {key: value.shape for key, value in QwenVL.empty(config).state_dict().items()}
    assert ours == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["evoprune", "divprune", "tome", "evs"])
@pytest.mark.parametrize("budget", [0.3, 0.05])
@pytest.mark.parametrize("path", [LONG, [CLIP, LONG]])
def test_a_model_in_hand_is_pruned_alike(folder, loaded, host, name, budget, path):
    skip_where_not_taken(host)
    inputs = evoprune.processor_inputs(folder, path, QUESTION, max_visual_tokens=4096)
    with evoprune.EvoPrune(budget=budget, method=name)(host) as run:
        theirs = [i for i in generated(host, inputs) if i not in loaded.eos_ids]
    ours = VideoQA(replace(loaded), budget=budget, method=name).encode(path).ask(QUESTION, max_new_tokens=12)
    assert ours.text is not None and ours.ids == theirs
    assert run.report.tokens == replace(ours.report.tokens, new=None)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in BUNDLED_CONFIGS if "Qwen3-VL" in name and "-A3B" not in name])
def test_full_budget_at_true_dimensions(name):
    """The test uses the whole tower, one more language layer than DeepStack needs, and frames of an odd shape."""
    config = describe(ModelOptions(name, load_format="dummy")).config
    few = replace(config.text_config, num_hidden_layers=4, vocab_size=1000)
    model = QwenVL.random(replace(config, text_config=few), torch.float32, torch.device("cpu"))
    theirs, grid = hugging_face_model(model), (2, 3, 7)
    patches = torch.randn(2 * 3 * 7 * 4, 1536, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.model.visual(patches, torch.tensor([[2, 6, 14]]))
    plan = EncoderPlan.full(TowerShape.of_tower(model.model.visual), grid)
    made = encode_rows(model.model.visual, [patches], plan).select_tokens()
    for ours, other in zip(
        [made.features, *made.deepstack], [expected.pooler_output, *expected.deepstack_features], strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    place = place_of(grid, times=True)
    ids = torch.arange(place.around[-1].stop + 9) % 1000
    positions = prompt_positions(len(ids), place.positions(grid, 1.0, None))
    prompt = prune_prompt(ids, [place], [made], positions, LanguageModel(model).embed)
    logits = LanguageModel(model).prefill(prompt.embeds, positions, 0, deepstack=prompt.deepstack).logits
    is_visual = torch.zeros(1, len(ids), dtype=torch.bool).index_fill_(1, place.columns, True)
    with torch.inference_mode():
        hidden = theirs.model.language_model(
            inputs_embeds=prompt.embeds[None],
            position_ids=torch.cat([torch.arange(len(ids))[None], positions])[:, None],
            visual_pos_masks=is_visual,
            deepstack_visual_embeds=expected.deepstack_features,
        ).last_hidden_state[0, -1]
        other = theirs.lm_head(hidden)
    torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
