"""Chat templates for GGUF files without a template, or with a template for text only. They equal Qwen's own for questions."""

INPUTS = "_pad|>"  # part of the placeholders that a chat template inserts for images and videos

_TEMPLATE = """\
SYSTEM{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'video') -%}
{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}THOUGHTS{%- endif -%}
"""
_SYSTEM = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
_THINK = "{{- '<think>\\n' -}}"
_SWITCH = "{{- '<think>\\n' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n' -}}"


def template_of(system: bool, switch: bool, thinks: bool) -> str:
    """Return a chat template as Jinja source.

    Args:
        system: Whether conversations begin with Qwen2's system prompt by default.
        switch: Whether `enable_thinking` turns thinking on and off.
        thinks: Whether the model always thinks.
    """
    thoughts = _SWITCH if switch else _THINK if thinks else ""
    return _TEMPLATE.replace("SYSTEM", _SYSTEM if system else "").replace("THOUGHTS", thoughts)
