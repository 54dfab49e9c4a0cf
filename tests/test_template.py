"""What a conversation is written out as, to the letter, and which letters carry loss."""

import pytest

from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.template import (
    LLAMA_3,
    MFUYU_V1,
    MLLAVA_V1,
    NEVER,
    TEMPLATES,
    Token,
    Wrap,
    choose_template,
    prompt,
    render,
)
from mantis_lite.errors import RecipeError

A, B, C = (Image(name.encode()) for name in "ABC")
PIRATE = "You are a pirate chatbot who always responds in pirate speak!"
CURIOUS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def sample(*turns: tuple) -> Sample:
    return Sample("a:1", None, tuple(Turn(role, tuple(content)) for role, *content in turns))


NUMBERED = Wrap(before=lambda j: f"({j}:", after=lambda j: ")")


def written(pieces) -> str:
    """The pieces as text: pictures as [A], what carries loss in «», and a special token in its own brackets."""
    out = ""
    for content, loss_from in pieces:
        if isinstance(content, Image):
            assert loss_from == NEVER
            out += f"[{content.source.decode()}]"
        elif loss_from >= len(content):
            out += content
        else:
            out += f"{content[:loss_from]}«{content[loss_from:]}»"
    return out.replace("»«", "")


def in_llama_3(*turns, system=None, labels="answer") -> str:
    return written(render(sample(*turns), LLAMA_3, system, labels, NUMBERED))


def in_mllava_v1(*turns, system=None, labels="answer") -> str:
    return written(render(sample(*turns), MLLAVA_V1, system, labels, NUMBERED))


QUESTION = ("user", "Hi ", A, " there ", B)
ANSWER = ("assistant", "Ho")
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
USER, ASSISTANT, SYSTEM = (HEADER.format(role) for role in ("user", "assistant", "system"))


def test_llama_3():
    asked = f"<|begin_of_text|>{SYSTEM}{PIRATE}<|eot_id|>{USER}Hi (1:[A]) there (2:[B])<|eot_id|>"
    assert in_llama_3(QUESTION, ANSWER) == f"{asked}{ASSISTANT}«Ho<|eot_id|>»"
    assert in_llama_3(QUESTION, ANSWER, labels="upstream") == f"{asked}«{ASSISTANT}Ho<|eot_id|>»"


def test_mllava_v1():
    asked = f"<s>{CURIOUS}</s>USER: Hi (1:[A]) there (2:[B])</s>"
    assert in_mllava_v1(QUESTION, ANSWER) == f"{asked}ASSISTANT: «Ho</s>»"
    assert in_mllava_v1(QUESTION, ANSWER, labels="upstream") == f"{asked}«ASSISTANT: Ho</s>»"


@pytest.mark.parametrize(
    ("system", "turns", "expected"),
    [
        (None, (), f"{CURIOUS}</s>"),
        ("Be brief.", (), "Be brief.</s>"),
        ("", (), ""),
        (None, (("system", "Row's own."),), "Row's own.</s>"),
        ("Be brief.", (("system", "Row's own."),), "Row's own.</s>"),
        ("", (("system", "Row's own."),), "Row's own.</s>"),
    ],
    ids=["template", "recipe", "removed", "row", "row over recipe", "row over removed"],
)
def test_system_words(system, turns, expected):
    assert (
        in_mllava_v1(*turns, ("user", "Hi"), ANSWER, system=system) == f"<s>{expected}USER: Hi</s>ASSISTANT: «Ho</s>»"
    )


def test_pictures_are_counted_through_all_turns():
    text = in_mllava_v1(("user", A, "x"), ("assistant", "y", B), ("user", C), ("assistant", "z"), system="")
    assert text == "<s>USER: (1:[A])x</s>ASSISTANT: «y(2:»[B]«)</s>»USER: (3:[C])</s>ASSISTANT: «z</s>»"


def test_text_beside_text_is_one_piece():
    pieces = render(sample(("user", "Hi ", A, " there"), ANSWER), MLLAVA_V1, "", "answer", NUMBERED)
    texts = [piece.content for piece in pieces if type(piece.content) is str]
    assert texts == ["USER: Hi (1:", ") there", "ASSISTANT: Ho"]


def test_what_looks_like_a_token_is_text():
    pieces = render(sample(("user", "</s><image>"), ("assistant", "</s>")), MLLAVA_V1, "", "answer", NUMBERED)
    assert [p.content for p in pieces if isinstance(p.content, Token)] == ["<s>", "</s>", "</s>"]
    assert [p.content for p in pieces if type(p.content) is str] == ["USER: </s><image>", "ASSISTANT: </s>"]


def test_an_empty_answer_is_its_end_token():
    assert in_mllava_v1(("user", "Hi"), ("assistant",), system="") == "<s>USER: Hi</s>ASSISTANT: «</s>»"


CLOSED = Wrap(close=Token("<fake>"))
CHUNKED = Wrap(before=lambda j: f"image {j - 1}: ", chunk=Token("<s>"))
TURNS = (("user", "Hi ", A, B, " there"), ANSWER, ("user", C), ("assistant", "Hm ", A))
OTHERS = {
    "idefics_2": (
        CLOSED,
        "<s>User:Hi [A][B]<fake> there{end}\nAssistant:«Ho{end}»\n"
        "User:[C]<fake>{end}\nAssistant:«Hm »[A]<fake>«{end}»\n",
        "<end_of_utterance>",
    ),
    "idefics_3": (
        Wrap(),
        "<|begin_of_text|>User:Hi [A][B] there{end}\nAssistant:«Ho{end}»\nUser:[C]{end}\nAssistant:«Hm »[A]«{end}»\n",
        "<end_of_utterance>",
    ),
    "smolvlm": (
        Wrap(),
        "<|im_start|>User: Hi [A][B] there{end}\nAssistant: «Ho{end}»\nUser:[C]{end}\nAssistant: «Hm »[A]«{end}»\n",
        "<end_of_utterance>",
    ),
    "mfuyu_v1": (
        CHUNKED,
        "<s>USER: Hi image 0: [A]<s>image 1: [B]<s> there<0x04>ASSISTANT: «Ho{end}»USER: image 2: [C]"
        "<s><0x04>ASSISTANT: «Hm image 3: »[A]<s>«{end}»",
        "|ENDOFTEXT|",
    ),
    "qwen2_vl": (
        Wrap(),
        "<|im_start|>user\nHi [A][B] there{end}\n<|im_start|>assistant\n«Ho{end}»\n"
        "<|im_start|>user\n[C]{end}\n<|im_start|>assistant\n«Hm »[A]«{end}»\n",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_families_templates(name):
    wrap, expected, end = OTHERS[name]
    template = next(template for template in TEMPLATES if template.name == name)
    assert written(render(sample(*TURNS), template, "", "answer", wrap)) == expected.format(end=end)


def test_upstreams_labels_begin_behind_the_users_end():
    """The blank line and header between the turns; in Fuyu's, behind the mark of an answer's beginning."""
    turns = sample(("user", "Hi"), ANSWER, ("user", "And?"), ANSWER)
    written_out = {
        template.name: written(render(turns, template, "", "upstream", Wrap()))
        for template in TEMPLATES
        if template.name in ("idefics_2", "mfuyu_v1", "qwen3_vl")
    }
    asked, answered = "User:{}<end_of_utterance>", "«\nAssistant:Ho<end_of_utterance>»\n"
    assert written_out["idefics_2"] == f"<s>{asked.format('Hi')}{answered}{asked.format('And?')}{answered}"
    asked, answered = "USER: {}<0x04>", "«ASSISTANT: Ho|ENDOFTEXT|»"
    assert written_out["mfuyu_v1"] == f"{asked.format('Hi')}{answered}{asked.format('And?')}{answered}"
    asked, answered = "<|im_start|>user\n{}<|im_end|>", "«\n<|im_start|>assistant\nHo<|im_end|>»\n"
    assert written_out["qwen3_vl"] == asked.format("Hi") + answered + asked.format("And?") + answered


def test_a_text_only_sample_has_no_chunks():
    text = written(render(sample(("user", "Hi"), ANSWER), MFUYU_V1, None, "answer", CHUNKED))
    assert text.startswith("You are a helpful language and vision assistant.") and "natural language.\nUSER: Hi" in text


@pytest.mark.parametrize(
    ("template", "header"), [(LLAMA_3, ASSISTANT), (MLLAVA_V1, "ASSISTANT:")], ids=["llama_3", "mllava_v1"]
)
def test_a_prompt_ends_where_the_answer_begins(template, header):
    asked = sample(("user", "Hi"), ("assistant", "Ho"), ("user", "And?"))
    text = written(prompt(asked, template, "", NUMBERED))
    whole = written(render(asked, template, "", "answer", NUMBERED)).replace("«", "").replace("»", "")
    assert text == whole + header  # and no «: nothing in it carries loss


@pytest.mark.parametrize("template", [LLAMA_3, MLLAVA_V1], ids=lambda template: template.name)
@pytest.mark.parametrize("name", ["auto", "by name"])
def test_a_checkpoints_template_is_known_by_its_tokens(template, name):
    vocabulary = {"a", *template.tokens}
    chosen = choose_template("auto" if name == "auto" else template.name, (LLAMA_3, MLLAVA_V1), vocabulary)
    assert chosen is template


@pytest.mark.parametrize(
    ("name", "vocabulary", "message"),
    [
        (
            "llama_3",
            {"<s>", "</s>", "<|eot_id|>"},
            "llama_3 needs the tokens <|begin_of_text|>, <|end_header_id|>, <|sta",
        ),
        ("auto", {"a"}, "auto needs one template whose tokens the checkpoint has, found none"),
        (
            "auto",
            LLAMA_3.tokens | MLLAVA_V1.tokens,
            "found llama_3 and mllava_v1\n  Set prompt.template to one of",
        ),
    ],
    ids=["missing", "none", "both"],
)
def test_no_template_is_guessed(name, vocabulary, message):
    with pytest.raises(RecipeError) as caught:
        choose_template(name, (LLAMA_3, MLLAVA_V1), vocabulary)
    assert f"prompt.template: {message}" in str(caught.value) or message in str(caught.value)
