"""The context that prunes inside a Hugging Face model: what it does, what it refuses, and that it leaves nothing behind."""

import copy
import functools
import inspect
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import evoprune
from evoprune.bench.hugging_face import hugging_face_model
from evoprune.contrib.video import Evs
from evoprune.language.prompt import VIDEO, build_prompt
from evoprune.session.loading.model import load_model
from evoprune.video.frames import read_frames
from evoprune.vision.preprocess import patchify, resize
from tests.prompts import processed
from tests.tiny import tiny_model

CLIP, LONG = "samples/square.mp4", "samples/arrivals.webm"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def inputs(*grids):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=generator), torch.tensor(grids)


@pytest.mark.parametrize("grids", [[(3, 8, 12)], [(1, 2, 2)], [(2, 10, 14), (1, 4, 4), (3, 6, 18)]])
def test_full_budget_is_the_models_own_tower(model, grids):
    patches, thw = inputs(*grids)
    with torch.inference_mode():
        expected = torch.cat(model.model.get_video_features(patches, thw).pooler_output)
    made = evoprune.encode(model, patches, thw, budget=1.0)
    assert (made.features - expected).norm() <= 1e-5 * expected.norm()
    assert made.kept.tolist() == list(range(len(expected))) and made.live_share == 1.0


def test_several_videos_are_pruned_each_on_its_own(model):
    grids = [(2, 10, 14), (1, 4, 4), (3, 6, 18)]
    patches, thw = inputs(*grids)
    made = evoprune.encode(model, patches, thw, budget=0.25)
    first_unit = first_row = 0
    for i, (t, h, w) in enumerate(grids):
        start, n = first_unit * 4, t * h * w
        alone = evoprune.encode(model, patches[start : start + n], thw[i : i + 1], budget=0.25)
        mine = (made.kept >= first_unit) & (made.kept < first_unit + n // 4)
        assert torch.equal(made.kept[mine] - first_unit, alone.kept)
        torch.testing.assert_close(made.features[mine], alone.features)
        assert torch.equal(made.owner[first_unit : first_unit + n // 4] - first_row, alone.owner)
        first_unit, first_row = first_unit + n // 4, first_row + len(alone.rows)
    assert sum(made.kept_per_pair) == len(made.kept) and len(made.kept_per_pair) == 6


def test_patches_that_do_not_fit_the_grids_are_refused(model):
    patches, thw = inputs((1, 4, 4))
    with pytest.raises(evoprune.UsageError, match="do not fit"):
        evoprune.encode(model, patches[:-4], thw)


PATCHES, GRIDS = torch.zeros(32, 1176), torch.tensor([[2, 4, 4]])
ARGUMENTS = {
    "pixel_values_videos are of type list, not floating-point": {"pixels": PATCHES.tolist()},
    "pixel_values_videos are of type ndarray": {"pixels": PATCHES.numpy()},
    r"pixel_values_videos are int64 \[1, 3\]": {"pixels": GRIDS, "grids": PATCHES},
    r"pixel_values_videos are float32 \[32, 588\]": {"pixels": PATCHES[:, :588]},
    r"pixel_values_videos are float32 \[32\]": {"pixels": PATCHES[:, 0]},
    "pixel_values_videos are uint8": {"pixels": PATCHES.byte()},
    "pixel_values_videos are int64": {"pixels": PATCHES.long()},
    "pixel_values_videos are bool": {"pixels": PATCHES.bool()},
    "pixel_values_videos hold NaN": {"pixels": PATCHES / 0},
    "video_grid_thw are of type list": {"grids": GRIDS.tolist()},
    r"video_grid_thw are float32 \[1, 3\]": {"grids": GRIDS.float()},
    "video_grid_thw are bool": {"grids": GRIDS.bool()},
    r"video_grid_thw are int64 \[3\]": {"grids": GRIDS[0]},
    "are not .T, H, W., H and W in multiples of 2": {"grids": torch.tensor([[2, 16, 1]])},
    "video_grid_thw .. are not|do not fit": {"grids": GRIDS[:0]},
    "the question is of type str": {"question": "What?"},
    "the question is int64": {"question": torch.tensor([3, 4])},
    r"the question is float32 \[3, 5\], not floating-point \[tokens, 64\]": {"question": torch.zeros(3, 5)},
    "the question is of type bool": {"question": True},
}


@pytest.mark.parametrize("says", ARGUMENTS)
def test_encode_refuses_what_no_processor_returns(model, says):
    given = {"pixels": PATCHES, "grids": GRIDS} | ARGUMENTS[says]
    with pytest.raises(evoprune.UsageError, match=says) as caught:
        evoprune.encode(model, given.pop("pixels"), given.pop("grids"), **given)
    assert caught.value.hint


def test_encode_keeps_what_the_other_ways_keep_by_default(model):
    assert len(evoprune.encode(model, PATCHES, GRIDS).kept) == 2


def test_methods_that_act_on_frames_are_refused():
    with pytest.raises(evoprune.UsageError, match="acts on frames"):
        evoprune.encode(None, torch.zeros(4, 1176), torch.tensor([[1, 2, 2]]), method="downscale")


def test_encode_gives_the_question_to_methods_that_read_it(model):
    patches, thw = inputs((2, 10, 14))
    with pytest.raises(evoprune.UsageError, match="cdpruner reads the question") as caught:
        evoprune.encode(model, patches, thw, budget=0.25, method="cdpruner")
    assert "pass question=..." in caught.value.hint
    asked = [model.get_input_embeddings()(torch.tensor(ids)) for ids in ([5, 9, 40], [77, 3])]
    kept = [evoprune.encode(model, patches, thw, budget=0.25, method="cdpruner", question=q).kept for q in asked]
    assert [len(each) for each in kept] == [18, 18] and not torch.equal(*kept)


def loaded_by_hand(name, question, clip=CLIP):
    """For VideoQA a loaded model; for Hugging Face the same model, and its processor's inputs for a question about a clip."""
    loaded = load_model(name, dtype="fp32", pack=False)
    model, special = hugging_face_model(loaded.model), loaded.tokenizer.specials()
    model.config.video_token_id = special["<|video_pad|>"]
    model.config.image_token_id = special["<|image_pad|>"]
    model.generation_config.eos_token_id = list(loaded.eos_ids)
    video = evoprune.VideoQA(loaded, budget=1.0).encode(clip)
    plan, info = video.plan, video.plan.info
    frames = np.concatenate([chunk.frames for chunk in read_frames(info, plan.sampling.times_s)])
    t, h, w = plan.grid
    ids = build_prompt(loaded.tokenizer, question, [(VIDEO, t * h * w)]).input_ids[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id),
        "pixel_values_videos": patchify(resize(torch.from_numpy(frames), plan.height, plan.width)),
        "video_grid_thw": torch.tensor([[t, 2 * h, 2 * w]]),
        "second_per_grid_ts": torch.tensor([plan.sampling.seconds_per_pair()], dtype=torch.float64),
    }
    return loaded, model, inputs


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "clip", "question"), [
    ("tiny", CLIP, "Describe the video."), ("tiny", LONG, "What happens?"), ("demo", CLIP, "What colour is the square?"),
    ("demo", LONG, "What happens?"),
])  # fmt: skip
def test_the_answer_is_that_of_video_qa(saved, name, clip, question):
    loaded, model, inputs = loaded_by_hand(str(saved) if name == "tiny" else name, question, clip)
    for budget in (1.0, 0.5, 0.1):
        expected = "".join(evoprune.VideoQA(loaded, budget=budget).encode(clip).ask(question, max_new_tokens=24))
        with evoprune.EvoPrune(budget=budget, positions="qwen")(model):
            out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        answer = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert loaded.tokenizer.decode(answer) == expected, budget


def state(model):
    """All of a model that a caller can see."""
    return (
        {name: copy.copy(value) for name, value in vars(model).items()},
        {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()},
    )


def same_state(model, before):
    attributes, weights = state(model)
    assert attributes == before[0]
    for name, (address, value) in weights.items():
        assert address == before[1][name][0] and torch.equal(value, before[1][name][1])


@pytest.mark.parametrize("leaves", ["remove", "with", "error"])
def test_nothing_is_left_behind(leaves):
    model = tiny_model()
    prompt = processed(model, (5, ("video", 4, 8, 12), 7))
    expected = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    logits, before = model(**prompt).logits, state(model)
    inner = state(model.model)
    if leaves == "remove":
        handle = evoprune.apply(model, budget=0.1, method="evoprune")
        assert not torch.equal(model(**prompt).logits[:, -1], logits[:, -1])
        model.generate(**prompt, max_new_tokens=4, do_sample=False)
        handle.remove()
        handle.remove()
    elif leaves == "with":
        with evoprune.EvoPrune(budget=0.1)(model):
            model.generate(**prompt, max_new_tokens=4)
    else:
        with pytest.raises(ZeroDivisionError), evoprune.EvoPrune(budget=0.1)(model):
            model.generate(**prompt, max_new_tokens=4, prefix_allowed_tokens_fn=lambda *_: 1 / 0)
        same_state(model, before)
    same_state(model, before)
    same_state(model.model, inner)
    assert torch.equal(model(**prompt).logits, logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), expected)


def test_after_an_error_in_generate_the_model_still_prunes(model):
    prompt = processed(model, (5, ("video", 4, 8, 12), 7))
    with evoprune.EvoPrune(budget=0.1)(model) as run:
        with pytest.raises(ZeroDivisionError):
            model.generate(**prompt, max_new_tokens=4, prefix_allowed_tokens_fn=lambda *_: 1 / 0)
        assert model(**prompt).logits.shape[1] == run.columns.places < prompt["input_ids"].shape[1]


def test_a_forward_that_was_replaced_before_comes_back(model):
    """Accelerate and others put a `forward` of their own on a model."""
    stock, calls = model.forward, []

    @functools.wraps(stock)
    def counting(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    prompt = processed(model, (5, ("video", 4, 8, 12), 7))
    model.forward = counting
    try:
        with evoprune.EvoPrune(budget=0.1)(model):
            model.generate(**prompt, max_new_tokens=4, do_sample=False)
            assert len(calls) == 4
        assert model.forward is counting
    finally:
        del model.forward


def test_pruning_a_model_twice_is_refused(model):
    with evoprune.EvoPrune(budget=0.5)(model) as run:
        for again in (lambda: evoprune.apply(model), lambda: evoprune.EvoPrune()(model).__enter__()):
            with pytest.raises(evoprune.UsageError, match="pruned already"):
                again()
        with run:  # the same one
            pass
        assert "generate" not in vars(model)
    handle = evoprune.apply(model)
    pruning, model.forward = model.forward, functools.wraps(model.forward)(lambda *a, **k: None)
    with pytest.raises(evoprune.UsageError, match="pruned already"):
        evoprune.apply(model)
    model.forward = pruning
    handle.remove()
    assert not {"forward", "generate"} & vars(model).keys()


def test_pruning_that_nobody_holds_can_be_removed(model):
    with pytest.raises(evoprune.UsageError, match="pruned already") as caught:
        evoprune.apply(model), evoprune.apply(model)
    assert "evoprune.remove(model)" in caught.value.hint and "at its start" in caught.value.hint
    own = functools.wraps(model.forward)(lambda *a, **k: None)
    pruning, model.forward = model.forward, own
    evoprune.remove(model)
    assert vars(model).pop("forward") is own and pruning is not own and "generate" not in vars(model)
    evoprune.remove(model)
    with evoprune.EvoPrune(pack=True)(model) as run:
        evoprune.remove(model)
        assert run._packed is None and "not active" in repr(run)
    assert not {"forward", "generate"} & vars(model).keys()


def test_what_belongs_to_the_model_is_asked_of_the_model(model):
    run = evoprune.EvoPrune()(model)
    with pytest.raises(AttributeError, match=r"no attribute 'generate'; take model\.generate"):
        run.generate()
    with pytest.raises(TypeError, match="call the model itself"):
        run()
    with pytest.raises(AttributeError, match=r"no attribute 'nope'$"):
        _ = run.nope
    assert not hasattr(run, "forward") and hasattr(run, "report")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.save(model, io.BytesIO())])
def test_copying_a_model_that_prunes_is_refused(model, copied):
    with evoprune.EvoPrune()(model), pytest.raises(evoprune.UsageError, match="copied or pickled"):
        copied(model)


def test_other_models_are_refused():
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {
        "num_key_value_heads": 1,
        "vocab_size": 50,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    small["rope_parameters"]["mrope_section"] = [2, 3, 3]
    small |= {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 32}
    vision["deepstack_visual_indexes"] = [0]
    other = Qwen3VLMoeForConditionalGeneration._from_config(Qwen3VLMoeConfig(text_config=small, vision_config=vision))
    for model in (other, tiny_model().model, torch.nn.Linear(2, 2), None):
        with pytest.raises(evoprune.ModelError, match="cannot be pruned") as caught:
            evoprune.apply(model)
        assert "Qwen2_5_VLForConditionalGeneration" in caught.value.hint
        with pytest.raises(evoprune.ModelError, match="no vision tower"):
            evoprune.encode(model, *inputs((1, 4, 4)))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_a_tower_with_another_activation_is_refused(family):
    model = tiny_model(family=family)
    model.model.visual.config.hidden_act = "gelu"
    with pytest.raises(evoprune.ModelError, match="cannot be run: activation gelu"):
        evoprune.apply(model)


def test_offloaded_weights_are_refused():
    model = tiny_model()
    model.model.visual.to("meta")
    with pytest.raises(evoprune.ModelError, match="offloaded"):
        evoprune.apply(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"method": "nope"}, "no pruning method"),
        ({"method": "subsample"}, "acts on frames"),
        ({"method": "fastv"}, "inside the language model"),
        ({"method": "evoprune+fastv"}, "inside the language model"),
        ({"method_args": {"nope": "1"}}, "no argument"),
        ({"positions": "mine"}, "positions"),
    ],
)
def test_settings_are_checked_at_once(settings, message):
    with pytest.raises(evoprune.UsageError, match=message):
        evoprune.EvoPrune(**settings)


def test_the_context_refuses_methods_that_read_the_question(monkeypatch):
    monkeypatch.setattr(Evs, "reads_question", True)
    with pytest.raises(evoprune.UsageError, match="reads the question"):
        evoprune.EvoPrune(method="evs")
    with pytest.raises(evoprune.UsageError, match="reads the question"):
        evoprune.encode(None, torch.zeros(4, 1176), torch.tensor([[1, 2, 2]]), method="evs")


@pytest.mark.parametrize("method", ["evoprune-paper", "divprune", "pool", "evs-nofloor", "random", "none"])
def test_methods_of_each_kind_prune_inside_generate(model, method):
    prompt = processed(model, (5, ("video", 4, 8, 12), 3, ("video", 2, 4, 4), 7))
    with evoprune.EvoPrune(budget=0.25, method=method)(model) as run:
        out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    tokens = run.report.pruning.visual_tokens_kept
    assert tokens == 104 if method == "none" else tokens <= 26
    assert run.columns.places == 19 + tokens and out.shape[1] == 19 + 104 + 3


def changed(prompt, **changes):
    return {name: value for name, value in (prompt | changes).items() if value is not None}


def refusals(model, prompt):
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    packed = torch.cat([torch.arange(60), torch.arange(ids.shape[1] - 60)]).expand(4, 1, -1)
    cache = model(input_ids=ids[:, :4]).past_key_values
    video = {"video": SimpleNamespace(pooler_output=[])}
    yield "inputs_embeds", changed(prompt, inputs_embeds=embeds)
    yield "inputs_embeds", changed(prompt, inputs_embeds=embeds, input_ids=None)
    yield "attention_mask is", changed(prompt, attention_mask=mask[:, :-1])
    yield "attention_mask is", changed(prompt, attention_mask=mask[:, None, None])
    yield "video tokens, video_grid_thw makes", changed(prompt, video_grid_thw=prompt["video_grid_thw"][:1])
    yield "video tokens, video_grid_thw makes", changed(prompt, video_grid_thw=None)
    yield "video tokens, video_grid_thw makes", changed(prompt, input_ids=ids[:, :-12], attention_mask=mask[:, :-12])
    yield "patches do not fit", changed(prompt, pixel_values_videos=prompt["pixel_values_videos"][:-4])
    yield "second_per_grid_ts", changed(prompt, second_per_grid_ts=torch.ones(3))
    yield "packed", changed(prompt, position_ids=packed)
    yield "past_key_values", changed(prompt, past_key_values=cache)
    yield "input_ids are of class list, not a tensor", changed(prompt, input_ids=ids.tolist())
    yield "attention_mask are of class list, not a tensor", changed(prompt, attention_mask=mask.tolist())
    yield "video_grid_thw are of class list", changed(prompt, video_grid_thw=prompt["video_grid_thw"].tolist())
    yield "encoded already", changed(prompt, pixel_values_videos=None, mm_encoder_outputs=video)


@pytest.mark.parametrize("number", range(15))
@pytest.mark.parametrize("way", ["generate", "forward"])
def test_what_cannot_be_pruned_is_refused(model, number, way):
    prompt = processed(model, (5, ("video", 4, 8, 12), 3, ("video", 2, 4, 4), 7))
    message, call = list(refusals(model, prompt))[number]
    with evoprune.EvoPrune(budget=0.25)(model), torch.no_grad():
        with pytest.raises(evoprune.UsageError, match=message) as caught:
            model.generate(**call, max_new_tokens=2) if way == "generate" else model(**call)
        assert caught.value.hint and "\n" not in caught.value.message


def test_arguments_for_columns_that_cannot_be_pruned_are_refused(model):
    prompt = processed(model, (5, ("video", 4, 8, 12), 7), (5, ("video", 4, 8, 12), 7))
    ids = prompt["input_ids"]
    with evoprune.EvoPrune(budget=0.25)(model), torch.no_grad():
        for more in (
            {"token_type_ids": ids},
            {"cu_seq_lens_q": torch.tensor([0, 110])},
            {"logits_to_keep": torch.arange(3)},
        ):
            with pytest.raises(evoprune.UsageError, match=next(iter(more))):
                model(**prompt, **more)


def test_calls_that_cannot_go_on_from_a_pruned_prompt_are_refused(model):
    prompt = processed(model, (5, ("video", 4, 8, 12), 7), (4, ("video", 4, 8, 12), 7))
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    text = {"input_ids": ids[:, :2], "attention_mask": mask}
    wrong = "110 columns go on from past_key_values that represent 110"
    calls = [
        (wrong, text),
        (wrong.replace("110", "50", 1), text | {"attention_mask": mask[:, :50]}),
        ("only text", text | {"pixel_values": torch.zeros(4, 1176)}),
        ("rows go on", {"input_ids": ids[:1, :2]}),
        ("video cannot go on", prompt),
    ]
    with evoprune.EvoPrune(budget=0.25)(model), torch.no_grad():
        cache = model(**prompt, use_cache=True).past_key_values
        for message, call in calls:
            for way in (model, model.generate):
                with pytest.raises(evoprune.UsageError, match=message):
                    way(**call, past_key_values=cache)
        cache.crop(-20)
        with pytest.raises(evoprune.UsageError, match="cut in the middle of a padded batch"):
            model(input_ids=ids[:, :2], past_key_values=cache)


def test_the_report_counts_tokens_rows_and_times(model):
    prompt = processed(model, (5, ("image", 8, 8), 2, ("video", 4, 8, 12), 7), (3, ("video", 2, 8, 8), 2))
    with evoprune.EvoPrune(budget=0.25, method="evoprune", positions="qwen")(model) as run:
        assert run.report.pruning.visual_tokens_in is None
        model.generate(**prompt, max_new_tokens=3)
    report = evoprune.Report.from_json(run.report.to_json())
    pruning, times = report.pruning, report.time_ms
    assert (pruning.visual_tokens_in, pruning.visual_tokens_kept, pruning.kept_ratio) == (96 + 32, 24 + 8, 0.25)
    assert sum(pruning.kept_per_pair) == 32 and len(pruning.kept_per_pair) == 6
    assert (report.tokens.text, report.tokens.visual, report.tokens.prompt) == (14 + 4 + 7, 32 + 16, 73)
    assert [layer for layer, _ in pruning.layers] == [0, 1] and 0 < pruning.encoder_live_share < 1
    assert pruning.encoder_live_share == pytest.approx(sum(rows for _, rows in pruning.layers) / 2 / 128)
    assert 0 < times.encode_prune < times.encode < times.total
    assert (pruning.method, pruning.budget, pruning.positions) == ("evoprune", 0.25, "qwen")
    assert report.sampling.grid_thw is None and report.env.transformers and report.model.dtype == "fp32"
    assert report.model.id == "Qwen2_5_VLForConditionalGeneration"  # it has no name


@pytest.mark.few(1)
@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/guide.md", 2)])
def test_the_documents_run(model, page, count):
    """Their code for a Hugging Face model, as it is printed there."""
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    prompt = processed(model, (5, ("video", 4, 8, 12), 7))
    names = {"evoprune": evoprune, "model": model, "inputs": prompt}
    names |= {name: prompt[name] for name in ("pixel_values_videos", "video_grid_thw")}
    mine = [block for block in blocks if re.search(r"\bmodel\b", block) and "from_pretrained" not in block]
    assert len(mine) == count
    for block in mine:
        exec(block, names)
    assert names["run"].report.pruning.budget == 0.1 and "generate" not in vars(model)
    assert torch.equal(names["out"][:, :110], prompt["input_ids"])


def test_the_guide_makes_inputs_with_arguments_that_the_processor_has(monkeypatch):
    """Without a download, and without torchvision."""
    text = (Path(__file__).parents[2] / "docs/guide.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(from transformers.*?)^```", text, re.S | re.M)
    known, calls = inspect.signature(transformers.ProcessorMixin.apply_chat_template), []

    class Processor:
        def apply_chat_template(self, *args, **given):
            calls.append(known.bind(self, *args, **given).arguments)
            return transformers.BatchFeature()

    stubs = {"AutoProcessor": Processor(), "Qwen2_5_VLForConditionalGeneration": SimpleNamespace(device="cpu")}
    for name, made in stubs.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, made=made, **__: made)
    exec(block, {})
    assert len(calls) == 1 and "kwargs" not in calls[0]


def test_what_apply_returned_can_be_removed():
    model = tiny_model()
    run = evoprune.apply(model, budget=0.5)
    evoprune.remove(run)
    assert repr(run).endswith("not active>")
