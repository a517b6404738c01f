"""Test prompts: the tokenizer, the chat template, and M-RoPE positions."""

import copy
import json
import pickle
from functools import partial
from math import prod

import pytest
import tokenizers
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from evoprune.errors import ModelError, UsageError
from evoprune.language.prompt import (
    Prompt,
    Tokenizer,
    opens_thoughts,
    prompt_positions,
    timestamps,
    video_positions,
)
from evoprune.language.template import render
from evoprune.language.turns import Placed, Turn
from tests.thinking import THINKING, thinking_tokenizer
from tests.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_config, tiny_tokenizer

PICTURE, VIDEO = "picture", "video"


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_it_is_the_one_that_transformers_loads(folder):
    own, theirs = Tokenizer.load(folder), tiny_tokenizer()
    assert own.chat_template == theirs.chat_template
    assert own.specials() == {token: theirs.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert own.named["eos_token"] == "<|im_end|>"


@settings(deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(SPECIAL_TOKENS).map(lambda token: f"a{token} b"))
def test_ids_and_text_are_those_of_transformers(text):
    theirs = tiny_tokenizer()
    own = Tokenizer(tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str()), "")
    ids = own.encode(text)
    assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert b"".join(map(own.bytes_of, ids)).decode() == own.backend.normalizer.normalize_str(text)
    assert own.bytes_of(10**6) == b"" and own.bytes_of(own.specials()["<|im_end|>"]) == b"<|im_end|>"
    ids += list(own.specials().values())
    assert own.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_lengths_left_over_from_training_do_not_cut_questions():
    theirs = tiny_tokenizer()
    backend = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=40)
    text = "What happens after the man opens the door?"
    assert Tokenizer(backend, "").encode(text) == theirs(text)["input_ids"]


SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = [SYSTEM, {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}]
TEMPLATES = [
    "{% for m in messages %}\n    {{ m.role }}\n{% endfor %}",
    "{{ bos_token }}{{ eos_token }}{{ messages | tojson }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% if tools %}tools{% endif %}{% if add_generation_prompt %}go{% endif %}",
    "{% for m in messages %}\n{% generation %}\n  {{ m.role }}\n{% endgeneration %}\n{%- endfor %}",
    "{{ strftime_now('%Y %B') }}",
    "{% set seen = namespace(n=1) %}{% set seen.n = 2 %}{{ seen.n }}{{ dict(b='ä', a=1) | tojson(indent=2, sort_keys=true) }}",
    "{{ dict.fromkeys(['a', 'b'], 1) }}{{ ['ä', 1] | tojson(true, separators=(',', ':')) }}",
]
REFUSED = ["{{ namespace(_a=1) }}", "{% set n = namespace() %}{% set n.__a = 1 %}", "{{ [1] | tojson(default=none) }}"]


@pytest.mark.few(7)
@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_rendering_is_that_of_transformers(folder, template):
    own, theirs = Tokenizer.load(folder), tiny_tokenizer()
    own.chat_template = template or own.chat_template
    for messages in (MESSAGES, MESSAGES[1:]):
        how = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
        assert own.render(messages) == theirs.apply_chat_template(messages, **how)


def test_a_template_that_tells_the_time_is_not_cached():
    source = "{{ strftime_now('%f') }}"
    assert len({render(source, {}) for _ in range(3)}) > 1


@pytest.mark.parametrize("template", REFUSED)
def test_what_transformers_refuses_is_refused(folder, template):
    own = Tokenizer.load(folder)
    own.chat_template = template
    with pytest.raises(ValueError, match=r"underscore|argument"):
        own.render(MESSAGES)
    if "namespace" in template and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers before 5.23 lets a namespace store any name")
    with pytest.raises(Exception, match=r"underscore|argument"):
        tiny_tokenizer().apply_chat_template(MESSAGES, chat_template=template)


def test_a_template_does_not_see_pythons_insides(folder):
    own = Tokenizer.load(folder)
    own.chat_template = "{{ ('{0.__globals__}' | attr('format'))(raise_exception) }}"
    assert own.render(MESSAGES) == ""


def test_where_templates_are_kept(folder):
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer.load(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    by_name = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    for found in (text, by_name):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": found}))
        assert Tokenizer.load(folder).chat_template == text
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "the processor's"}))
    assert Tokenizer.load(folder).chat_template == "the processor's"


def test_vocabulary_and_merges_alone_will_do(folder, tmp_path_factory):
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    bare = tmp_path_factory.mktemp("bare")
    (bare / "vocab.json").write_text(json.dumps(state["vocab"]))
    (bare / "merges.txt").write_text("\n".join(m if isinstance(m, str) else " ".join(m) for m in state["merges"]))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (bare / name).write_text((folder / name).read_text())
    (bare / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    assert Tokenizer.load(bare).encode("What happens?") == Tokenizer.load(folder).encode("What happens?")


ORDINARY = [
    *[
        "What happens after the man opens the door?",
        "",
        " leading and trailing ",
        "\n\nnewlines\r\n first, and last\n",
        "  \n ",
    ],
    *[
        "Größe? 你好 👩‍👩‍👧 é e\u0301",
        "user\nassistant\n",
        "<|im_end, almost|> <video> |>",
        "1234567 !!?? 'll it's",
        "\nWhy?",
    ],
]
SAID = "Subtitles:\n[0:01] Who is there?\n[0:03] <|im_end, almost|> Größe\n\n"
QUESTION_IS = CHAT_TEMPLATE.replace("else part.text", "else 'Question: ' + part.text")


@pytest.fixture
def tokenizer():
    return own(tiny_tokenizer())


def own(hf):
    return Tokenizer(tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()), hf.chat_template)


def about_video(tokenizer, question, visual_tokens, **more) -> Prompt:
    return Prompt.build(tokenizer, question, [(VIDEO, visual_tokens)], **more)


def whole(question, visual_tokens, system, template=None):
    """Render a conversation and tokenize all of it at once with transformers."""
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=template)
    return tokenizer(text.replace("<|video_pad|>", "<|video_pad|>" * visual_tokens))["input_ids"]


@pytest.mark.few(20)
@pytest.mark.parametrize("subtitles", ["", SAID])
@pytest.mark.parametrize("system", [None, "", "Be brief.", "\n\nStart on a new line. "])
@pytest.mark.parametrize("question", ORDINARY)
def test_ids_are_those_of_the_conversation_as_a_whole(tokenizer, question, system, subtitles):
    """The subtitles appear between the video and the question."""
    prompt = about_video(tokenizer, question, 7, system=system, subtitles=subtitles)
    assert prompt.input_ids.dtype == torch.int64
    assert prompt.input_ids.tolist() == whole(subtitles + question, 7, system)


PADS = (
    "<|video_pad|>",
    "<|image_pad|>",
    "<|vision_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
)


@pytest.mark.parametrize("times", [(), [["<1.0 seconds>"] * 2]])
@pytest.mark.parametrize(
    "tag", ["<video>", "<image>", "<video>\n", "<|vision_start|><|video_pad|><|vision_end|>", *PADS]
)
def test_placeholders_in_a_question_are_text(tokenizer, tag, times):
    """Placeholders anywhere in a question or system prompt do not change the number of special tokens in the prompt."""
    specials = set(tokenizer.specials().values())

    def special(prompt: Prompt) -> list[int]:
        return [token for token in prompt.input_ids.tolist() if token in specials]

    plain = about_video(tokenizer, "What?", 8, system="Hm.", times=times)
    for question in (f"{tag}What?", f"What is {tag} here?", f"What?\n{tag}", tag):
        prompt = about_video(tokenizer, question, 8, system=f"Hm. {tag}", times=times)
        assert special(prompt) == special(plain) and prompt.visual_tokens == 8
        assert question in tokenizer.backend.decode(prompt.input_ids.tolist(), skip_special_tokens=False)


@pytest.mark.full
@settings(deadline=None)
@given(question=st.text(max_size=30), system=st.none() | st.text(max_size=10))
def test_any_text_without_special_tokens_gives_the_ids_of_the_whole(question, system):
    assume(not any(token in question + (system or "") for token in (*SPECIAL_TOKENS, "\0")))
    tokenizer = own(tiny_tokenizer())
    assert about_video(tokenizer, question, 2, system=system).input_ids.tolist() == whole(question, 2, system)


@pytest.mark.parametrize("kinds", [[PICTURE], [VIDEO, PICTURE], [PICTURE, VIDEO, VIDEO, PICTURE]])
def test_several_inputs_stand_in_their_order(tokenizer, kinds):
    prompt = Prompt.build(tokenizer, "Which?", [(kind, 2 + i) for i, kind in enumerate(kinds)])
    start, end, *pads = tiny_tokenizer().convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
    )
    ids, at = prompt.input_ids.tolist(), prompt.places[0].runs[0].start - 1
    rooms = [[start, *[pads[kind == PICTURE]] * (2 + i), end] for i, kind in enumerate(kinds)]
    assert ids[at : prompt.prefix_length] == [token for room in rooms for token in room]
    assert [len(place) for place in prompt.places] == [2 + i for i in range(len(kinds))]
    assert all(ids[i] in pads for place in prompt.places for i in place.columns)
    assert prompt.visual_tokens == sum(map(len, prompt.places)) == len(ids) - prompt.text_tokens


PLACED = [
    (Placed(["Image 1:", None, "Image 2:", None, "Which is older?"]), []),
    (Placed(["Which is older?\n", None, None]), []),
    (Placed([None, " and ", None, "?"]), []),
    (Placed(["Then this: ", None, "Which?"]), [Turn("What is it?", "A car.")]),
    ("Which?", [Turn(Placed(["First", None, "What?"]), "A car."), Turn(Placed(["Now", None, "and"]), "")]),
]


@pytest.mark.parametrize(("question", "earlier"), PLACED)
def test_inputs_keep_their_places_between_texts(tokenizer, question, earlier):
    """The prompt has the same parts as in transformers. Inputs that are not placed between texts come first."""
    kinds = iter([{"type": "image"}, {"type": "video"}])
    texts = [*(turn.question for turn in earlier), question]
    places = sum(getattr(text, "parts", ()).count(None) for text in texts)
    contents = [[next(kinds) for _ in range(2 - places)]]
    for text in texts:
        parts = getattr(text, "parts", [text])
        contents[-1] += [next(kinds) if part is None else {"type": "text", "text": part} for part in parts]
        contents.append([])
    messages = [{"role": "user", "content": contents[0]}]
    for turn, content in zip(earlier, contents[1:], strict=False):
        messages += [{"role": "assistant", "content": turn.answer}, {"role": "user", "content": content}]
    theirs = tiny_tokenizer()
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|video_pad|>", "<|video_pad|>" * 3).replace("<|image_pad|>", "<|image_pad|>" * 2)
    prompt = Prompt.build(tokenizer, question, [(PICTURE, 2), (VIDEO, 3)], earlier=earlier)
    assert prompt.input_ids.tolist() == theirs(text)["input_ids"]
    assert prompt.prefix_length == prompt.places[-1].runs[-1].stop + 1


def test_a_placed_question_is_copied_with_its_places():
    placed = Placed(["a", None, "b"])
    for copied in (copy.deepcopy(placed), pickle.loads(pickle.dumps(placed))):
        assert (copied, copied.parts) == ("a\nb", ("a", None, "b"))


def test_a_system_prompt_that_the_template_leaves_out_is_refused(tokenizer, monkeypatch):
    changed = CHAT_TEMPLATE.replace("for message in messages", "for message in messages if message.role != 'system'")
    assert changed != CHAT_TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", changed)
    with pytest.raises(UsageError, match="has no place for a system prompt") as caught:
        about_video(tokenizer, "Why?", 1, system="Be brief.")
    assert "in the question" in caught.value.hint
    for nothing in (None, ""):
        assert about_video(tokenizer, "Why?", 1, system=nothing).visual_tokens == 1


@pytest.mark.few(3)
@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "\ue000system\ue001", "\ue000question\ue001", "\x1b[31m"])
def test_special_tokens_in_the_users_words_are_plain_text(tokenizer, token):
    """Text that looks like a special token stays unchanged."""
    attack = f"a{token}b {token}{token}"
    plain = about_video(tokenizer, "a", 3, system="b", subtitles="c")
    attacked = about_video(tokenizer, attack, 3, system=attack, subtitles=attack)
    specials = tiny_tokenizer().convert_tokens_to_ids(SPECIAL_TOKENS)
    only_special = [[i for i in prompt.input_ids.tolist() if i in specials] for prompt in (plain, attacked)]
    assert only_special[0] == only_special[1]
    # The model still reads every character of it.
    assert tiny_tokenizer().decode(attacked.input_ids).count(attack) == 3


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QUESTION_IS])
@pytest.mark.parametrize("subtitles", ["", SAID])
def test_the_prefix_does_not_depend_on_the_question(tokenizer, monkeypatch, template, subtitles):
    """If there are subtitles, the text between video and question is part of the prefix, because no question merges with it."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ask = partial(about_video, tokenizer, visual_tokens=4, system="Be brief.", subtitles=subtitles)
    one, other = (ask(question) for question in ("\nWhy?", "How many?"))
    assert one.input_ids.tolist() == whole(f"{subtitles}\nWhy?", 4, "Be brief.", template)
    assert one.prefix_length == other.prefix_length >= one.places[0].runs[0].stop + 1
    assert one.input_ids[: one.prefix_length].tolist() == other.input_ids[: other.prefix_length].tolist()
    rest = tiny_tokenizer().decode(one.input_ids[one.prefix_length :])
    before = "Question: " if template == QUESTION_IS and not subtitles else ""
    assert rest.startswith(f"{before}\nWhy?<|im_end|>")


CONTENT = "part in message.content"
NO_TEMPLATES = {
    "{{ messages[-1].content[1].text }}": "chat template",
    "<|video_pad|>": "chat template",
    "<|video_pad|><|video_pad|>{{ messages[-1].content[1].text }}": "chat template",
    "{{ messages[-1].content[1].text }}<|video_pad|>": "chat template",
    "{{ raise_exception('text only') }}": "chat template",
    "{% for %}": "chat template",
    CHAT_TEMPLATE.replace(CONTENT, f"{CONTENT} | reverse"): "inputs in order",
    CHAT_TEMPLATE.replace(CONTENT, f"{CONTENT}[1:]"): "inputs in order",
}


@pytest.mark.few(4)
@pytest.mark.parametrize("template", NO_TEMPLATES)
def test_templates_without_the_inputs_in_order_and_a_question_after_them_are_refused(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    inputs = [(VIDEO, 1), (PICTURE, 2)] if "order" in NO_TEMPLATES[template] else [(VIDEO, 1)]
    with pytest.raises(ModelError, match=NO_TEMPLATES[template]):
        Prompt.build(tokenizer, "Why?", inputs)


def test_a_question_that_merges_with_the_subtitles_shares_the_video_alone(tokenizer):
    apart, merged = (about_video(tokenizer, question, 2, subtitles="said: Wh") for question in ("?", "at?"))
    assert merged.input_ids.tolist() == whole("said: What?", 2, None)
    assert merged.prefix_length == merged.places[0].runs[0].stop + 1 < apart.prefix_length


def test_what_is_refused(tokenizer):
    for inputs in ([], [(VIDEO, 0)], [(VIDEO, 2), (PICTURE, 0)]):
        with pytest.raises(ValueError, match="at least one"):
            Prompt.build(tokenizer, "Why?", inputs)
    for content in (b"\xff?", "why?".encode("utf-16-le")):
        with pytest.raises(UsageError, match="not valid text"):
            about_video(tokenizer, content.decode(errors="surrogateescape"), 1)


TIMES = ["<0.3 seconds>", "<0.8 seconds>", "<11.3 seconds>"]


def test_times_stand_before_frame_pairs_between_their_own_markers(tokenizer):
    prompt = Prompt.build(tokenizer, "Why?", [(PICTURE, 2), (VIDEO, 6)], subtitles="said", times=[(), TIMES])
    picture, video = prompt.places
    frames = "".join(f"{time}<|vision_start|>{'<|video_pad|>' * 2}<|vision_end|>" for time in TIMES)
    text = tiny_tokenizer().decode(prompt.input_ids)
    assert f"<|vision_start|>{'<|image_pad|>' * 2}<|vision_end|>{frames}saidWhy?<|im_end|>" in text
    assert prompt.input_ids.tolist() == tiny_tokenizer().encode(text) and picture.around == ()
    assert (len(picture), len(video), prompt.visual_tokens) == (2, 6, 8) and list(map(len, video.runs)) == [2, 2, 2]
    pads = {tiny_tokenizer().convert_tokens_to_ids("<|video_pad|>")}
    assert {*prompt.input_ids[video.columns].tolist()} == pads
    for run, around, time in zip(video.runs, video.around, TIMES, strict=True):
        assert tiny_tokenizer().decode(prompt.input_ids[around.start : run.start]) == f"{time}<|vision_start|>"
        assert around.stop == run.stop + 1
    assert (
        video.left_out(torch.tensor([0, 4, 5])) == [video.around[1]] and picture.left_out(torch.tensor([]).long()) == []
    )
    starts, inside = zip(*video.positions((3, 1, 2), 0.5, None), strict=True)
    assert starts == tuple(run.start for run in video.runs)
    assert all(torch.equal(own, video_positions((1, 1, 2), 0.5, None)) for own in inside)
    # A timestamp that merged with the template's text before it stays.
    merging = Tokenizer(
        tokenizer.backend, tokenizer.chat_template.replace("'<|vision_start|>", "'said: Wh<|vision_start|>")
    )
    (place,) = Prompt.build(merging, "Why?", [(VIDEO, 2)], times=[["at", "at"]]).places
    before = [run.start - around.start for run, around in zip(place.runs, place.around, strict=True)]
    assert before == [1, 1 + len(tokenizer.encode("at"))]


def test_the_time_of_a_frame_pair_is_the_middle_of_its_frames():
    assert timestamps([0.25, 0.75, 9.96, 10.04], 2) == ["<0.5 seconds>", "<10.0 seconds>"]
    assert timestamps([0.3, 1.0], 1) == ["<0.3 seconds>", "<1.0 seconds>"]


def by_hand(length, videos, tokens_per_second):
    """Compute M-RoPE positions one token at a time."""
    starts = {start: video for start, *video in videos}
    positions, following, at = [], 0, 0
    while at < length:
        if at in starts:
            (t, h, w), seconds = starts[at]
            inside = [
                [following + int(i * seconds * tokens_per_second), following + y, following + x]
                for i in range(t)
                for y in range(h)
                for x in range(w)
            ]
        else:
            inside = [[following] * 3]
        positions += inside
        at += len(inside)
        following = max(max(position) for position in positions) + 1
    return torch.tensor(positions).reshape(-1, 3).T


def test_text_goes_on_after_the_time_of_a_video_that_is_longer_than_wide():
    positions = prompt_positions(8, [(2, video_positions((2, 1, 2), 5.0, 2))])
    assert positions.tolist() == [
        [0, 1, 2, 2, 12, 12, 13, 14],
        [0, 1, 2, 2, 2, 2, 13, 14],
        [0, 1, 2, 3, 2, 3, 13, 14],
    ]


@st.composite
def prompts(draw):
    videos, at = [], 0
    for _ in range(draw(st.integers(0, 3))):
        at += draw(st.integers(0, 4))
        grid = tuple(draw(st.integers(1, 5)) for _ in range(3))
        videos.append((at, grid, draw(st.floats(0.05, 30))))
        at += prod(grid)
    return at + draw(st.integers(0, 4)), videos, draw(st.sampled_from([1, 2, 4]))


@settings(deadline=None)
@given(prompts())
def test_any_prompt_matches_counting_by_hand(prompt):
    length, videos, tokens_per_second = prompt
    inside = [(start, video_positions(grid, seconds, tokens_per_second)) for start, grid, seconds in videos]
    positions = prompt_positions(length, inside)
    assert positions.dtype == torch.int64
    assert torch.equal(positions, by_hand(length, videos, tokens_per_second).reshape(3, -1))


VIDEOS = [(start, video_positions((1, 2, 2), 1.0, 2)) for start in (0, 3)]


@pytest.mark.parametrize(("length", "videos"), [(3, VIDEOS[:1]), (6, VIDEOS[1:]), (9, VIDEOS)])
def test_videos_that_do_not_fit_are_refused(length, videos):
    with pytest.raises(ValueError, match="does not fit"):
        prompt_positions(length, videos)


ENDS = {  # ends of a prompt, with thinking and without
    "unless off": ("<think>\n", "<think>\n\n</think>\n\n"),
    "if on": ("<think>\n", "<think>\n\n</think>\n\n"),
    "always": ("<think>\n", "<think>\n"),
    "by itself": ("", "<think>\n\n</think>\n\n"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("thinking", [True, False])
def test_thoughts_begin_where_the_template_says(name, thinking):
    own = thinking_tokenizer(name)
    prompt = about_video(own, "Why?", 3, thinking=thinking)
    text = own.backend.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    ends = ENDS[name][not thinking]
    assert text.endswith(f"Why?<|im_end|>\n<|im_start|>assistant\n{ends}")
    expected = tiny_tokenizer().apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, chat_template=THINKING[name], enable_thinking=thinking
    )
    assert own.render(MESSAGES, thinking) == expected and opens_thoughts(expected) is (ends == "<think>\n")
    assert own.can_switch_thinking is (name != "always") and own.always_thinks is (name == "always")
    plain = about_video(own, "Why?", 3)
    assert plain.input_ids[: plain.prefix_length].tolist() == prompt.input_ids[: prompt.prefix_length].tolist()


def test_a_template_that_knows_nothing_of_thinking(tokenizer):
    assert not tokenizer.can_switch_thinking and not tokenizer.always_thinks
    with pytest.raises(UsageError, match="does not support thinking"):
        about_video(tokenizer, "Why?", 3, thinking=True)
    assert about_video(tokenizer, "Why?", 3).input_ids.tolist() == whole("Why?", 3, None)


def test_ids_of_placeholders_are_those_that_the_tokenizer_has_by_name():
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    content = json.loads(backend.to_str())
    moved = {"<|image_pad|>": 248056, "<|video_pad|>": 248057, "<|vision_start|>": 248053, "<|vision_end|>": 248054}
    content["added_tokens"] = [
        token | {"id": moved.get(token["content"], token["id"])} for token in content["added_tokens"]
    ]
    content["model"]["vocab"] |= moved
    own = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), CHAT_TEMPLATE)
    prompt = Prompt.build(own, "Why?", [(PICTURE, 2), (VIDEO, 4)], times=[(), ("<0.5 seconds>", "<1.5 seconds>")])
    ids = prompt.input_ids
    assert ids[prompt.places[0].columns].tolist() == [248056] * 2
    assert ids[prompt.places[1].columns].tolist() == [248057] * 4
    assert (ids == 248053).sum() == (ids == 248054).sum() == 3


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp"])
def test_positions_of_frame_pairs_with_times_are_those_of_transformers(family):
    from transformers import AutoModelForImageTextToText

    grids = [(3, 2, 4), (1, 5, 2)]  # a video, and an image
    tokenizer, times = own(tiny_tokenizer()), [("<0.3 seconds>", "<1.3 seconds>", "<2.3 seconds>"), ()]
    prompt = Prompt.build(tokenizer, "Why?", [(VIDEO, 24), (PICTURE, 10)], times=times)
    videos = [run for place, grid in zip(prompt.places, grids, strict=True) for run in place.positions(grid, 1.0, None)]
    made = prompt_positions(len(prompt.input_ids), videos)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(tiny_config(family)).model
    kinds = torch.zeros_like(prompt.input_ids)
    for place, kind in zip(prompt.places, (2, 1), strict=True):
        kinds[place.columns] = kind
    thw = [torch.tensor([[t, 2 * h, 2 * w]]) for t, h, w in grids]
    expected, delta = model.get_rope_index(
        input_ids=prompt.input_ids[None], mm_token_type_ids=kinds[None], video_grid_thw=thw[0], image_grid_thw=thw[1]
    )
    assert torch.equal(made, expected[:, 0])
    assert int(delta) == int(made.max()) + 1 - len(prompt.input_ids)
