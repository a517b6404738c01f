import pytest
import tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evoprune.errors import ModelError, UsageError
from evoprune.language.prompt import PICTURE, VIDEO, Prompt, Tokenizer, build_prompt, timestamps
from tests.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer

ORDINARY = [
    "What happens after the man opens the door?",
    "",
    " leading and trailing ",
    "\n\nnewlines\r\n first, and last\n",
    "  \n ",
    "Größe? 你好 👩‍👩‍👧 é e\u0301",
    "user\nassistant\n",
    "<|im_end, almost|> <video> |>",
    "1234567 !!?? 'll it's",
]


@pytest.fixture
def tokenizer():
    return own(tiny_tokenizer())


def own(hf):
    return Tokenizer(tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()), hf.chat_template)


def about_video(tokenizer, question, visual_tokens, **more) -> Prompt:
    return build_prompt(tokenizer, question, [(VIDEO, visual_tokens)], **more)


def whole(question, visual_tokens, system, template=None):
    """The rendered conversation, tokenised at once by Hugging Face."""
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=template)
    return tokenizer(text.replace("<|video_pad|>", "<|video_pad|>" * visual_tokens))["input_ids"]


@pytest.mark.parametrize("system", [None, "", "Be brief.", "\n\nStart on a new line. "])
@pytest.mark.parametrize("question", ORDINARY)
def test_ids_are_those_of_the_conversation_as_a_whole(tokenizer, question, system):
    prompt = about_video(tokenizer, question, 7, system=system)
    assert prompt.input_ids.dtype == torch.int64
    assert prompt.input_ids.tolist() == whole(question, 7, system)


@pytest.mark.full
@settings(deadline=None)
@given(question=st.text(max_size=30), system=st.none() | st.text(max_size=10))
def test_any_text_without_special_tokens_gives_the_ids_of_the_whole(question, system):
    assume(not any(token in question + (system or "") for token in (*SPECIAL_TOKENS, "\0")))
    tokenizer = own(tiny_tokenizer())
    assert about_video(tokenizer, question, 2, system=system).input_ids.tolist() == whole(question, 2, system)


@pytest.mark.parametrize("visual_tokens", [1, 2, 300])
def test_placeholders_stand_between_vision_start_and_vision_end(tokenizer, visual_tokens):
    prompt = about_video(tokenizer, "How many?", visual_tokens)
    start, pad, end = tiny_tokenizer().convert_tokens_to_ids(["<|vision_start|>", "<|video_pad|>", "<|vision_end|>"])
    ids, at = prompt.input_ids.tolist(), prompt.places[0].runs[0].start
    assert ids[at - 1 : at + visual_tokens + 1] == [start] + [pad] * visual_tokens + [end]
    assert ids.count(pad) == visual_tokens == prompt.visual_tokens
    assert prompt.text_tokens == len(ids) - visual_tokens


@pytest.mark.parametrize("kinds", [[PICTURE], [VIDEO, PICTURE], [PICTURE, VIDEO, VIDEO, PICTURE]])
def test_several_inputs_stand_in_their_order(tokenizer, kinds):
    prompt = build_prompt(tokenizer, "Which?", [(kind, 2 + i) for i, kind in enumerate(kinds)])
    start, end, *pads = tiny_tokenizer().convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
    )
    ids, at = prompt.input_ids.tolist(), prompt.places[0].runs[0].start - 1
    rooms = [[start, *[pads[kind == PICTURE]] * (2 + i), end] for i, kind in enumerate(kinds)]
    assert ids[at : prompt.prefix_length] == [token for room in rooms for token in room]
    assert [len(place) for place in prompt.places] == [2 + i for i in range(len(kinds))]
    assert all(ids[i] in pads for place in prompt.places for i in place.columns)
    assert prompt.visual_tokens == sum(map(len, prompt.places)) == len(ids) - prompt.text_tokens


def test_a_template_that_changes_their_order_or_leaves_one_out_is_refused(tokenizer, monkeypatch):
    inputs = [(VIDEO, 1), (PICTURE, 2)]
    for change in ("message.content | reverse", "message.content[1:]"):
        changed = CHAT_TEMPLATE.replace("part in message.content", f"part in {change}")
        monkeypatch.setattr(tokenizer, "chat_template", changed)
        with pytest.raises(ModelError, match="in their order"):
            build_prompt(tokenizer, "Why?", inputs)


def test_a_system_prompt_that_the_template_leaves_out_is_refused(tokenizer, monkeypatch):
    changed = CHAT_TEMPLATE.replace("for message in messages", "for message in messages if message.role != 'system'")
    assert changed != CHAT_TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", changed)
    with pytest.raises(UsageError, match="has no place for a system prompt") as caught:
        about_video(tokenizer, "Why?", 1, system="Be brief.")
    assert "in the question" in caught.value.hint
    for nothing in (None, ""):
        assert about_video(tokenizer, "Why?", 1, system=nothing).visual_tokens == 1


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_the_users_words_are_plain_text(tokenizer, token):
    attack = f"a{token}b {token}{token}"
    plain, attacked = about_video(tokenizer, "a", 3, system="b"), about_video(tokenizer, attack, 3, system=attack)
    specials = tiny_tokenizer().convert_tokens_to_ids(SPECIAL_TOKENS)
    only_special = [[i for i in prompt.input_ids.tolist() if i in specials] for prompt in (plain, attacked)]
    assert only_special[0] == only_special[1]
    # ... and yet the model reads every character of it.
    assert tiny_tokenizer().decode(attacked.input_ids).count(attack) == 2


def test_stand_ins_in_the_users_words_stay_what_they_are(tokenizer):
    question, system = "\ue000system\ue001?", "\ue000question\ue001!"
    text = tiny_tokenizer().decode(about_video(tokenizer, question, 1, system=system).input_ids)
    assert text.count(question) == text.count(system) == 1


def test_the_prefix_does_not_depend_on_the_question(tokenizer):
    one, other = (about_video(tokenizer, question, 4, system="Be brief.") for question in ("\nWhy?", "How many?"))
    assert one.prefix_length == other.prefix_length == one.places[0].runs[0].stop + 1
    assert one.input_ids[: one.prefix_length].tolist() == other.input_ids[: other.prefix_length].tolist()
    assert tiny_tokenizer().decode(one.input_ids[one.prefix_length :]).startswith("\nWhy?<|im_end|>")


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content[1].text }}",
        "<|video_pad|>",
        "<|video_pad|><|video_pad|>{{ messages[-1].content[1].text }}",
        "{{ messages[-1].content[1].text }}<|video_pad|>",
        "{{ raise_exception('text only') }}",
        "{% for %}",
    ],
)
def test_templates_without_one_video_and_a_question_after_it_are_refused(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ModelError, match="chat template"):
        about_video(tokenizer, "Why?", 1)


def test_text_between_video_and_question_is_part_of_the_rest(tokenizer, monkeypatch):
    template = CHAT_TEMPLATE.replace("else part.text", "else 'Question: ' + part.text")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prompt = about_video(tokenizer, "Why?", 2)
    assert prompt.input_ids.tolist() == whole("Why?", 2, None, template)
    assert tiny_tokenizer().decode(prompt.input_ids[prompt.prefix_length :]).startswith("Question: Why?")


SAID = "Subtitles:\n[0:01] Who is there?\n[0:03] <|im_end, almost|> Größe\n\n"


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("question", ["Why?", "\nWhy?", "  Why?", ""])
def test_subtitles_stand_between_the_video_and_the_question(tokenizer, question, system):
    prompt = about_video(tokenizer, question, 7, system=system, subtitles=SAID)
    assert prompt.input_ids.tolist() == whole(SAID + question, 7, system)
    text = tiny_tokenizer().decode(prompt.input_ids)
    assert f"<|vision_end|>{SAID}{question}<|im_end|>" in text


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE.replace("else part.text", "else 'Question: ' + part.text")])
def test_subtitles_are_part_of_the_prefix_where_no_question_merges_with_them(tokenizer, monkeypatch, template):
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    one, other = (about_video(tokenizer, question, 2, subtitles=SAID) for question in ("Why?", "How many?"))
    assert tiny_tokenizer().decode(one.input_ids[one.prefix_length :]).startswith("Why?<|im_end|>")
    assert one.prefix_length == other.prefix_length
    assert one.input_ids[: one.prefix_length].tolist() == other.input_ids[: other.prefix_length].tolist()


def test_a_question_that_merges_with_the_subtitles_shares_the_video_alone(tokenizer):
    apart, merged = (about_video(tokenizer, question, 2, subtitles="said: Wh") for question in ("?", "at?"))
    assert merged.input_ids.tolist() == whole("said: What?", 2, None)
    assert merged.prefix_length == merged.places[0].runs[0].stop + 1 < apart.prefix_length


def test_special_tokens_in_subtitles_are_plain_text(tokenizer):
    attack = "".join(SPECIAL_TOKENS) + "\x1b[31m\ue000question\ue001"
    prompt = about_video(tokenizer, "Why?", 3, subtitles=attack)
    specials = tiny_tokenizer().convert_tokens_to_ids(SPECIAL_TOKENS)
    plain = about_video(tokenizer, "Why?", 3)
    only_special = [[i for i in made.input_ids.tolist() if i in specials] for made in (plain, prompt)]
    assert only_special[0] == only_special[1] and tiny_tokenizer().decode(prompt.input_ids).count(attack) == 1


@pytest.mark.parametrize("inputs", [[], [(VIDEO, 0)], [(VIDEO, 2), (PICTURE, 0)]])
def test_an_input_has_at_least_one_token(tokenizer, inputs):
    with pytest.raises(ValueError, match="at least one"):
        build_prompt(tokenizer, "Why?", inputs)


@pytest.mark.parametrize("content", [b"\xff?", "why?".encode("utf-16-le")], ids=["stray bytes", "UTF-16"])
def test_what_is_no_text_is_a_usage_error(tokenizer, content):
    with pytest.raises(UsageError, match="not valid text"):
        about_video(tokenizer, content.decode(errors="surrogateescape"), 1)


TIMES = ["<0.3 seconds>", "<0.8 seconds>", "<11.3 seconds>"]


def test_times_stand_before_frame_pairs_between_their_own_markers(tokenizer):
    prompt = build_prompt(tokenizer, "Why?", [(PICTURE, 2), (VIDEO, 6)], subtitles="said", times=[(), TIMES])
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
    assert video.left_out(torch.tensor([0, 4, 5])) == [video.around[1]] and picture.left_out(torch.tensor([0])) == []
    spans = video.spans((3, 1, 2), 0.5)
    assert [(span.start, span.grid) for span in spans] == [(run.start, (1, 1, 2)) for run in video.runs]


def test_the_time_of_a_frame_pair_is_the_middle_of_its_frames():
    assert timestamps([0.25, 0.75, 9.96, 10.04], 2) == ["<0.5 seconds>", "<10.0 seconds>"]
    assert timestamps([0.3, 1.0], 1) == ["<0.3 seconds>", "<1.0 seconds>"]
