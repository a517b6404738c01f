"""Labels, prompts and packing for training on the second world, and the table that defines its mix."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from experiments.demo.batches import ROW, packed
from experiments.demo.muon import Muon
from experiments.demo.painting import CHARACTERS
from experiments.demo.questions import Question
from experiments.demo.scenes.clip import Camera, Clip, Thing
from experiments.demo.scenes.drawing import render_with_map
from experiments.demo.scenes_batches import GROUPS, IMAGE, ScenesRecipe, question_batches, vision_batches
from experiments.demo.scenes_labels import (
    BLANK,
    CAME,
    CHANGED,
    EMPTY,
    GONE,
    IGNORED,
    LEFT,
    NEW,
    STILL,
    Head,
    dense_labels,
    story_labels,
)
from experiments.demo.scenes_model import keep_large, scenes_config, scenes_tokenizer
from experiments.demo.team import run_team
from experiments.demo.train_scenes import build
from experiments.demo.training import answer_loss
from experiments.demo.validity import CELLS, rank_correlation, ranks, table


@pytest.fixture(scope="module")
def tokenizer():
    return scenes_tokenizer(clips=100)


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    made = Qwen2_5_VLForConditionalGeneration._from_config(
        scenes_config(), dtype=torch.float32, attn_implementation="sdpa"
    )
    keep_large(made.model.visual)
    return made.eval()


# --- labels ----------------------------------------------------------------------------------------------------------


def labels(clip: Clip, times=(0.2, 0.7)):
    """Return labels of patches by row and column, and of units."""
    patches, units = dense_labels(clip, times, render_with_map(clip, times)[1])
    pairs, height, width = len(times) // 2, clip.height // 28, clip.width // 28
    by_place = patches.reshape(pairs, height, width, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return by_place.reshape(pairs, 2 * height, 2 * width, -1), units.reshape(pairs, height, width)


def test_labels_follow_the_camera_and_what_changes():
    sign = Thing("sign", "plain", "white", (235, 235, 230), 10, 84.0, 56.0, text="77", turn=2.0, after="88")
    clip = Clip((0, 1), 112, 168, 4.0, 4, (sign,), Camera("pan", dx=14.0))
    patches, units = labels(clip, (0.0, 0.1, 3.0, 3.1))
    for pair, text, x in ((0, "77", 84), (1, "88", 42)):
        rows, columns, halves = (patches[pair, ..., 3:5] != BLANK).nonzero()
        assert {CHARACTERS[c] for c in patches[pair, rows, columns, 3 + halves]} == set(text)
        assert abs((columns * 14 + halves * 7 + 3.5).mean() - x) < 6 and units[pair].nonzero()[1].tolist() == [x // 28]


def test_patches_say_which_way_a_thing_goes_on_the_frame():
    """The direction includes the camera's motion, and unclear directions are ignored."""
    look = ("square", "plain", "red", (200, 50, 45), 20, 84.0, 56.0)
    for camera, thing, expected in (
        (Camera(), Thing(*look, motion="left", speed=10.0), 1),
        (Camera(), Thing(*look), 0),
        (Camera("pan", dy=10.0), Thing(*look), 3),
        (Camera("pan", dx=-10.0), Thing(*look, motion="down", speed=10.0), IGNORED),
    ):
        patches, _ = labels(Clip((0, 1), 112, 168, 4.0, 4, (thing,), camera), (0.0, 0.5))
        assert set(patches[..., 5].flatten().tolist()) == {expected, IGNORED}


def test_units_are_labelled_with_what_has_become_of_them():
    """The clip has an object that moves down by a unit per second, one that appears, one that vanishes, and a sign that changes."""
    look = {"texture": "plain", "colour": "red", "rgb": (200, 50, 45), "radius": 12}
    things = (
        Thing("square", **look, x=14.0, y=14.0, motion="down", speed=28.0),
        Thing("square", **look, x=70.0, y=14.0, spans=((1.0, math.inf),)),
        Thing("square", **look, x=98.0, y=14.0, spans=((0.0, 1.0),)),
        Thing("sign", **look, x=126.0, y=70.0, text="7", turn=1.0, after="8"),
    )
    clip, times = Clip((0, 1), 112, 168, 2.0, 2, things, noise=0.0), (0.0, 0.1, 1.0, 1.1)
    story = story_labels(clip, times, render_with_map(clip, times)[1])
    assert (story[0] == IGNORED).all()
    expected = np.full((4, 6), EMPTY)
    expected[0, 0], expected[1, 0], expected[0, 2], expected[0, 3] = LEFT, CAME + 3, NEW, GONE
    expected[2, 4] = CHANGED
    assert np.array_equal(story[1].reshape(4, 6), expected)


def test_the_head_learns_from_every_label():
    frames, patches, units, (height, width) = next(vision_batches(ScenesRecipe(vision_units=96), 0))
    pairs = len(frames) // 2
    assert patches.shape == (pairs, height * width, 4, 6) and units.shape == (pairs, height * width)
    head, flat = Head(16, 8), torch.randn(pairs, height * width, 64)
    loss, right = head(flat, patches, units, height, width)
    told, _ = head.told(torch.randn(2, 3, 8), torch.tensor([[IGNORED, STILL, CAME], [NEW, GONE, EMPTY]]))
    (loss + told).backward()
    assert (
        all(p.grad.abs().sum() > 0 for p in head.parameters())
        and {"outline", "texture", "colour", "middle"} <= right.keys()
    )


# --- the model and its prompts ---------------------------------------------------------------------------------------


def test_batches_hold_pictures_videos_two_inputs_and_late_positions(tokenizer):
    recipe, seen = ScenesRecipe(units=100), set()
    batches = question_batches(recipe, tokenizer, recipe.still_steps)
    for _ in range(40):
        batch = next(batches)
        pairs, height, width = batch["grid"]
        n, slots = pairs * height * width, int(batch["slots"].sum())
        prompts = len(batch["pack"]["tokens"])
        assert slots in (n, 2 * n) and len(batch["frames"]) == 2 * pairs * prompts * (slots // n)
        assert batch["groups"].shape[1] == len(GROUPS) and batch["where"].shape == (3, len(batch["prefix"]))
        seen |= {
            ("image", IMAGE in batch["prefix"]),
            ("two", slots == 2 * n),
            ("late", int(batch["where"].max()) > 1000),
        }
    assert len(seen) == 6


def test_questions_are_packed_into_rows(tokenizer):
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    asked = [Question("look", "What colour is the star? " * n, "red") for n in (1, 4, 1, 2, 1)]
    pack = packed([asked, asked[:1]], ids, 50)
    assert pack["tokens"].shape[0] == 2 and pack["tokens"].shape[2] == ROW and pack["tokens"].shape[1] < len(asked)
    for number, q in enumerate(asked, 1):
        held = pack["segment"][0] == number
        assert tokenizer.decode(pack["tokens"][0][held]).startswith(f"{q.question}<|im_end|>")
        assert pack["place"][0][held].tolist() == list(range(50, 50 + int(held.sum())))
        assert pack["target"][0][held].tolist()[-3:] == [*ids("red"), 2, -100]
    assert (pack["segment"][1] > 0).sum() == (pack["segment"][0] == 1).sum()


def _average(team, folder):
    one, two = torch.full((2,), float(team.rank)), torch.full((1, 3), 10.0 * team.rank)
    team.average([one, two])
    lonely, absent = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    if team.rank == 1:
        lonely.grad = torch.ones(3)
    team.complete([absent, lonely])
    torch.save([one, two, team.any(team.rank == 1), lonely.grad, absent.grad], folder / f"{team.rank}.pt")


def test_a_team_learns_from_the_mean_of_all(tmp_path):
    run_team(_average, 2, tmp_path)
    for rank in (0, 1):
        one, two, flag, lonely, absent = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert one.tolist() == [0.5, 0.5] and two.tolist() == [[5.0, 5.0, 5.0]] and flag
        assert lonely.tolist() == [float(rank)] * 3 and absent is None


@torch.no_grad()
def test_the_loss_is_hugging_faces_also_with_two_pictures(model, tokenizer):
    """Two pictures in a prompt, and the answer to the second of its questions."""
    ids, units = tokenizer("ab", add_special_tokens=False).input_ids, 4
    prefix = [*ids, 3, *[IMAGE] * units, 4, 3, *[IMAGE] * units, 4]
    asked, answer = [300, 301, 302], [303, 304]
    video = torch.randn(1, 2 * units, 256)
    where = torch.arange(len(prefix)).expand(3, -1)
    pack = {
        "tokens": torch.tensor([[[299, 298, *asked, *answer]]]),
        "place": torch.tensor([[[*range(2), *range(5)]]]) + len(prefix),
        "segment": torch.tensor([[[1, 1, *[2] * 5]]]),
        "target": torch.tensor([[[-100, -100, -100, -100, *answer, -100]]]),  # only the second question's answer
    }
    batch = {"prefix": torch.tensor(prefix), "slots": torch.tensor([t == IMAGE for t in prefix]), "where": where}
    loss, numbers, right, states = answer_loss(model, video, batch, pack)
    tokens = torch.tensor([[*prefix, *asked, *answer]])
    embeds = model.get_input_embeddings()(tokens)
    embeds[0, [i for i, t in enumerate(prefix) if t == IMAGE]] = video[0]
    logits = model(
        inputs_embeds=embeds, position_ids=torch.arange(tokens.shape[1]).expand(4, 1, -1), use_cache=False
    ).logits
    expected = torch.nn.functional.cross_entropy(logits[0, -3:-1], torch.tensor(answer))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5) and numbers.tolist() == [2] and len(right) == 1
    read = model.model.language_model.layers[: len(model.model.language_model.layers) // 2]
    kept = {}
    hook = read[-1].register_forward_hook(lambda layer, given, out: kept.update(out=out))
    model(inputs_embeds=embeds, position_ids=torch.arange(tokens.shape[1]).expand(4, 1, -1), use_cache=False)
    hook.remove()
    expected = kept["out"][0, : len(prefix)][batch["slots"]]
    assert torch.allclose(states[0], expected, atol=1e-4)


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_ranks_and_counts_cells_that_are_near():
    assert ranks([3.0, 1.0, 3.0]).tolist() == [2.5, 1.0, 2.5]
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1) and math.isnan(
        rank_correlation([1, 2], [5, 5])
    )
    text = table({cell: cell.published + (5 if cell.method == "scope" else 7) for cell in CELLS}, ["a fact"])
    assert "- 2 of 12 cells within 6 points" in text and "| picture | 0.25 | scope | 92.5 | 97.5 | +5.0 |" in text


def test_a_second_set_may_start_with_the_language_model_of_the_first(tmp_path):
    first = "evoprune/bundled/demo-scenes"
    trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(first, dtype=torch.float32).state_dict()
    model, _, tokenizer = build(tmp_path, ScenesRecipe(seed=1, reader=first))
    same = {name for name, value in model.state_dict().items() if torch.equal(value, trained[name])}
    assert {name for name in trained if "language_model" in name} <= same
    assert "model.visual.patch_embed.proj.weight" not in same
    question = "Which way does the heart move?"
    assert tokenizer(question).input_ids == AutoTokenizer.from_pretrained(first)(question).input_ids


def test_muon_is_pytorch_s_but_for_its_precision():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (64, 160), (160, 64), (64, 64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon([{"params": ours, "lr": 0.01}], momentum=0.95, weight_decay=0.05)
    other = torch.optim.Muon(theirs, lr=0.01, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    first = [p.detach().clone() for p in ours]
    for _ in range(3):
        for p, q in zip(ours[:3], theirs[:3], strict=True):  # the last one has no gradient
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q, begun in zip(ours[:3], theirs[:3], first[:3], strict=True):
        assert (p - q).norm() < 0.05 * (q - begun).norm()
    assert torch.equal(ours[3], first[3])
