import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.bundled import DEMOS
from evoprune.errors import ModelError
from evoprune.language.prompt import Tokenizer, load_tokenizer
from tests.tiny import SPECIAL_TOKENS, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_it_is_the_one_that_transformers_loads(folder):
    own, theirs = load_tokenizer(folder), tiny_tokenizer()
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
    ids += list(own.specials().values())
    assert own.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_lengths_left_over_from_training_do_not_cut_questions():
    theirs = tiny_tokenizer()
    backend = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=40)
    text = "What happens after the man opens the door?"
    assert Tokenizer(backend, "").encode(text) == theirs(text)["input_ids"]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]},
]
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
    own, theirs = load_tokenizer(folder), tiny_tokenizer()
    own.chat_template = template or own.chat_template
    for messages in (MESSAGES, MESSAGES[1:]):
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=template
        )
        assert own.render(messages) == expected


@pytest.mark.parametrize("template", REFUSED)
def test_what_transformers_refuses_is_refused(folder, template):
    own = load_tokenizer(folder)
    own.chat_template = template
    with pytest.raises(Exception, match=r"underscore|argument"):
        tiny_tokenizer().apply_chat_template(MESSAGES, chat_template=template)
    with pytest.raises(ValueError, match=r"underscore|argument"):
        own.render(MESSAGES)


def test_templates_run_in_a_sandbox(folder):
    own = load_tokenizer(folder)
    for template in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"):
        own.chat_template = template
        with pytest.raises(Exception, match=r"unsafe|no"):
            own.render(MESSAGES)


def test_where_templates_are_kept(folder):
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    by_name = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    for found in (text, by_name):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": found}))
        assert load_tokenizer(folder).chat_template == text
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "the processor's"}))
    assert load_tokenizer(folder).chat_template == "the processor's"


def test_vocabulary_and_merges_alone_will_do(folder, tmp_path_factory):
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    bare = tmp_path_factory.mktemp("bare")
    (bare / "vocab.json").write_text(json.dumps(state["vocab"]))
    (bare / "merges.txt").write_text("\n".join(m if isinstance(m, str) else " ".join(m) for m in state["merges"]))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (bare / name).write_text((folder / name).read_text())
    (bare / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    assert load_tokenizer(bare).encode("What happens?") == load_tokenizer(folder).encode("What happens?")


def test_the_demo_has_one():
    tokenizer = load_tokenizer(DEMOS["demo"].folder)
    assert tokenizer.decode(tokenizer.encode("What colour is the square?")) == "What colour is the square?"
