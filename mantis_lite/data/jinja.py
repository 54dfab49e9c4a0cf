"""A Template as a Jinja chat template, for clients that know nothing of this package."""

from __future__ import annotations

import json
import re
import string

from .template import ROLES, Role, Template, Token
from .vision import Vision

WRITTEN_HERE = ("<|vision_start|>", "<|vision_end|>", "|IMAGE|", "|ENDOFIMAGE|")
"""Tokens of a picture that the published processors leave to the chat template; all but a placeholder they write."""

FAR = 1000
"""A picture's number by which it is found where a wrap writes numbers."""

# All whitespace between tags is trimmed by the tags themselves: environments differ in what else they trim.
#
# The start token is written, as in our own prompts, and a tokenizer that puts one in front does not here: transformers'
# processors have it add nothing to a chat that begins with its bos_token, transformers' tokenizers and vLLM to no chat.
#
# transformers' {% generation %} marks are left out: plain Jinja, as many servers use, refuses a template with them.
TEXT = """\
{#- $name, written by Mantis-Lite -#}
{%- set headers = $headers -%}
{%- set ends = $ends -%}
{%- set seen = namespace(images=0) -%}
$beginning
{%- for message in messages -%}
  {%- if message['role'] not in headers -%}
    {{- raise_exception('a turn is by system, user or assistant, not by ' ~ message['role']) -}}
  {%- endif -%}
  $header
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- elif message['content'] -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {%- set seen.images = seen.images + 1 -%}
        {{- $picture -}}
      {%- elif part['type'] in ['video', 'video_url'] -%}
        {{- raise_exception('a video is not taken whole: give its frames as images') -}}
      {%- else -%}
        {{- raise_exception('content is text or image, not ' ~ part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- ends[message['role']] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- $prompt -}}
{%- endif -%}
"""

SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
  {{- $turn -}}
{%- endif -%}"""

HEADER = "{{- headers[message['role']] -}}"

HEADER_OR_BARE = """\
{%- if message['content'] and message['content'] is not string and message['content'][0]['type'] != 'text' -%}
    {{- $bare[message['role']] -}}
  {%- else -%}
    {{- headers[message['role']] -}}
  {%- endif -%}"""

CHUNK = """\
{%- for message in messages if message['content'] and message['content'] is not string -%}
  {%- for part in message['content'] if part['type'] != 'text' and not seen.images -%}
    {{- $chunk -}}
    {%- set seen.images = 1 -%}
  {%- endfor -%}
{%- endfor -%}
{%- set seen.images = 0 -%}"""


def chat_template(template: Template, vision: Vision, system: str | None) -> str:
    """The Jinja text that writes a conversation as `render` does, and as `prompt` where an answer is asked for.

    `system` is as there. A picture is the placeholder that its family's published processor puts all its tokens for.
    Text that looks like a special token becomes one, which only `Encoder` prevents: Jinja makes one text of it all.
    """
    headers = {role: "".join(template.headers[role]) for role in ROLES}
    ends = {role: "".join(template.ends[role]) + template.gap for role in ROLES}
    bare = {role: _bare(template, role) for role in ROLES}
    words = template.system if system is None else system
    beginning = [
        _filled(CHUNK, chunk=vision.wrap.chunk) if vision.wrap.chunk else "",
        f"{{{{- {_quoted(template.start)} -}}}}" if template.start else "",
        _filled(SYSTEM, turn=headers["system"] + words + ends["system"]) if words else "",
    ]
    return string.Template(TEXT).substitute(
        name=template.name,
        headers=_quoted(headers),
        ends=_quoted(ends),
        beginning="\n".join(filter(None, beginning)),
        header=HEADER if template.blank_before_picture else _filled(HEADER_OR_BARE, bare=bare),
        picture=_picture(vision),
        prompt=_quoted(bare["assistant"]),
    )


def _filled(text: str, **values: str | dict[Role, str]) -> str:
    return string.Template(text).substitute({name: _quoted(value) for name, value in values.items()})


def _quoted(value: str | dict[Role, str]) -> str:
    """Words as Jinja writes them: its strings have JSON's escapes, but no halves of letters."""
    return json.dumps(value, ensure_ascii=False)


def _bare(template: Template, role: Role) -> str:
    """A header without its last blank, as before a picture and at a prompt's end."""
    return "".join(part if isinstance(part, Token) else part.rstrip(" ") for part in template.headers[role])


def _picture(vision: Vision) -> str:
    """What is written for the picture whose number is seen.images."""
    wrap = vision.wrap
    own = dict.fromkeys(part for part, _ in vision.tokens((4096, 4096)))  # in order, each once
    kept = [part for part in own if part in (vision.placeholder, *WRITTEN_HERE)]
    written = "".join([wrap.before(FAR), *kept, wrap.chunk or "", wrap.after(FAR)])
    parts = re.split(r"(\d{3,})", written)
    return " ~ ".join(_number(int(part)) if at % 2 else _quoted(part) for at, part in enumerate(parts) if part)


def _number(far: int) -> str:
    return "seen.images" if far == FAR else f"(seen.images - {FAR - far})"
