"""The Jinja that goes beside a model has transformers' own processors write what our Encoder writes, to the token."""

import inspect
import io
import json
import shutil
from collections import Counter

import jinja2
import numpy as np
import PIL.Image
import pytest
import transformers.models.smolvlm.processing_smolvlm
from families import tokens_of
from helpers import SHARED, TEMPLATES, golden_pictures, picture, recipe
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    FuyuProcessor,
    Idefics2Processor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.video_processing_utils import BaseVideoProcessor

from mantis_lite.data.jinja import chat_template
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.template import prompt, render
from mantis_lite.generate import generate
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model

GOLDEN = SHARED / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside this checkout")

# Turns of (role, parts); a number is a picture of that seed.
CONVERSATIONS = {
    "text": [("user", "What is in the picture?"), ("assistant", "A dog.")],
    "picture first": [("user", 1, " What is in the picture?"), ("assistant", "A dog.")],
    "picture last": [("user", "What is in the picture? ", 2), ("assistant", "A dog.")],
    "only a picture": [("user", 3), ("assistant", "A dog.")],
    "adjacent": [("user", 1, 2, 3, "\nWhat are they?"), ("assistant", "Dogs.")],
    "interleaved": [("user", "Is ", 1, " beside ", 2, "\n or ", 3, " ?"), ("assistant", "Yes")],
    "more in later turns": [
        ("user", 1, " What?"),
        ("assistant", "A dog."),
        ("user", "And ", 2, 3, " ?"),
        ("assistant", "Two dogs"),
        ("user", 4),
        ("assistant", " Hm \n"),
    ],
    "picture in an answer": [("user", "Show it"), ("assistant", 5, " is it"), ("user", "x"), ("assistant", "y")],
    "system": [("system", "Be brief: 'a', \"b\" {{ c }} \\n"), ("user", 1, " What?"), ("assistant", "Dog")],
    "system with a picture": [("system", 1, " is a dog"), ("user", "And ", 2, " ?"), ("assistant", "No")],
    "other letters": [("user", "  é 日本 🐕 {% x %} <b>&amp;</b>\r\n\t"), ("assistant", "\n")],
    "empty answer": [("user", "", 1), ("assistant", "")],
}
# In all of these a blank or a token follows each picture; what else Idefics2's own processor does has its own test.
TOUCHING = [("user", "a", 1, "b", 2, 3, "c"), ("assistant", "d")]


def sample_of(turns) -> Sample:
    made = (Turn(role, tuple(Image(picture(p)) if isinstance(p, int) else p for p in parts)) for role, *parts in turns)
    return Sample("made:1", None, tuple(made))


def messages_of(turns) -> list[dict]:
    def part(content) -> dict:
        if isinstance(content, int):
            return {"type": "image", "image": PIL.Image.open(io.BytesIO(picture(content)))}
        return {"type": "text", "text": content}

    return [{"role": role, "content": [part(content) for content in parts]} for role, *parts in turns]


def as_strings(messages) -> list[dict]:
    """Messages whose content is one text, as a string."""
    alone = [len(m["content"]) == 1 and m["content"][0]["type"] == "text" for m in messages]
    return [m | {"content": m["content"][0]["text"]} if one else m for m, one in zip(messages, alone, strict=True)]


def jinja_of(encoder) -> str:
    return chat_template(encoder.template, encoder.vision, encoder.system)


def tokenizer_of(family: str, start: str | None) -> PreTrainedTokenizerFast:
    """A family's tokenizer as published ones are: it puts the start token in front of what it is given."""
    tokens = tokens_of(family)
    if start:
        known = [(start, tokens.token_to_id(start))]
        tokens.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=known)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token=start, pad_token="<unk>" if family == "fuyu" else "<|pad|>"
    )


def processor_of(family: str, folder, encoder, monkeypatch):
    """transformers' own processor, with what a processor_config.json must hold for it."""
    tokenizer, text = tokenizer_of(family, encoder.template.start), jinja_of(encoder)
    images = AutoImageProcessor.from_pretrained(folder)
    if family == "llava":
        more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 0}
        return LlavaProcessor(images, tokenizer, chat_template=text, **more)
    if family == "idefics2":
        images.do_image_splitting = False  # as Mantis' and as our default; the class's own is True
        return Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=text)
    if family == "idefics3":
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=text)
    # What remains has a processor of clips too, which asks for torchvision; and SmolVLM's for num2words.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *given: None)
    if family == "smolvlm":
        monkeypatch.setattr(transformers.models.smolvlm.processing_smolvlm, "num2words", str)
        videos = BaseVideoProcessor(num_frames=None, fps=None)
        return SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=text)
    qwen = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[family]
    return qwen(images, tokenizer, BaseVideoProcessor(), chat_template=text)


@pytest.fixture
def opened(family, folder_of, encoder_of, monkeypatch):
    """A family's Encoder and its published processor with our Jinja."""
    if family == "fuyu":
        pytest.skip("see test_fuyus_own_processor_takes_no_conversation")
    encoder = encoder_of(family)
    return encoder, processor_of(family, folder_of(family), encoder, monkeypatch)


def ids_of(processor, messages, **settings) -> list[int]:
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
    return np.asarray(found["input_ids"]).ravel().tolist()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_processor_gives_the_encoders_tokens(opened, name):
    encoder, processor = opened
    turns = CONVERSATIONS[name]
    assert ids_of(processor, messages_of(turns)) == encoder.encode(sample_of(turns)).input_ids.tolist()
    assert ids_of(processor, as_strings(messages_of(turns))) == encoder.encode(sample_of(turns)).input_ids.tolist()
    asked = encoder.encode_prompt(sample_of(turns[:-1])).input_ids.tolist()
    assert ids_of(processor, messages_of(turns[:-1]), add_generation_prompt=True) == asked


def test_text_that_touches_a_picture(opened, family):
    """Idefics2's processor puts a blank before it, which the original Mantis did not; no template can prevent it."""
    encoder, processor = opened
    ids = ids_of(processor, messages_of(TOUCHING))
    blanks = [("user", "a", 1, " b", 2, 3, " c"), *TOUCHING[1:]]
    assert (ids == encoder.encode(sample_of(TOUCHING)).input_ids.tolist()) == (family != "idefics2")
    assert (ids == encoder.encode(sample_of(blanks)).input_ids.tolist()) == (family == "idefics2")


@pytest.mark.parametrize("name", ["text", "more in later turns"])
def test_a_plain_client_generates_what_we_do(opened, checkpoint_of, folder_of, family, name):
    """Pictures too are the same then: the model's greedy answer is."""
    encoder, processor = opened
    turns = CONVERSATIONS[name][:-1]
    model = load_model(checkpoint_of(family), recipe()).eval()
    (ours,) = generate(model, encoder, [encoder.encode_prompt(sample_of(turns))], max_new_tokens=8)
    inputs = processor.apply_chat_template(
        messages_of(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    theirs = AutoModelForImageTextToText.from_pretrained(folder_of(family)).generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=encoder.token_id(encoder.template.end)
    )
    assert theirs[0, inputs["input_ids"].shape[1] :].tolist()[: len(ours)] == ours


def test_the_tokenizer_alone_gives_the_encoders_tokens(encoder_of, family):
    """As a client that takes no pictures uses it."""
    encoder = encoder_of(family)
    tokenizer = tokenizer_of(family, encoder.template.start)
    turns = CONVERSATIONS["text"]
    for asked, encode in ((turns, encoder.encode), (turns[:1], encoder.encode_prompt)):
        settings = {"chat_template": jinja_of(encoder), "add_generation_prompt": asked != turns}
        ids = tokenizer.apply_chat_template(messages_of(asked), **settings)["input_ids"]
        assert ids == encode(sample_of(asked)).input_ids.tolist()


def test_fuyus_own_processor_takes_no_conversation(encoder_of, folder_of):
    """It puts a picture before all text, and so counts one more than a template that puts it in its place."""
    encoder, images = encoder_of("fuyu"), AutoImageProcessor.from_pretrained(folder_of("fuyu"))
    processor = FuyuProcessor(images, tokenizer_of("fuyu", None))
    text, turns = jinja_of(encoder), CONVERSATIONS["text"]
    assert (
        ids_of(processor, messages_of(turns), chat_template=text) == encoder.encode(sample_of(turns)).input_ids.tolist()
    )
    with pytest.raises((ValueError, StopIteration)):  # the latter before transformers counted them
        ids_of(processor, messages_of(CONVERSATIONS["picture first"]), chat_template=text)


CONFIGS = {
    "llava": {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 0,
    },
    "idefics2": {"processor_class": "Idefics2Processor", "image_seq_len": 4},
    "idefics3": {"processor_class": "Idefics3Processor", "image_seq_len": 4},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_two_files_beside_a_model_are_enough(encoder_of, folder_of, tmp_path, name):
    """For those families whose processor asks for no more packages than we have."""
    encoder, turns = encoder_of(name), CONVERSATIONS["more in later turns"]
    folder = shutil.copytree(folder_of(name), tmp_path / "model")
    tokenizer_of(name, encoder.template.start).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(jinja_of(encoder))
    (folder / "processor_config.json").write_text(json.dumps(CONFIGS[name]))
    processor = AutoProcessor.from_pretrained(folder)
    assert ids_of(processor, messages_of(turns)) == encoder.encode(sample_of(turns)).input_ids.tolist()


@needs_golden
@pytest.mark.parametrize("name", ["mllava_siglip_llama3", "mllava_clip_llama3", "mllava_clip_vicuna", "idefics2"])
def test_tokenizers_of_the_original(name):
    """Byte-level and SentencePiece's, with the start token that they add, as transformers opens them."""
    folder = GOLDEN / "checkpoints" / name
    found = open_checkpoint(recipe(folder).model)
    encoder, images = found.encoder(recipe()), AutoImageProcessor.from_pretrained(folder)
    tokenizer, text = AutoTokenizer.from_pretrained(folder), jinja_of(encoder)
    assert tokenizer("x")["input_ids"][0] == encoder.token_id(encoder.template.start)
    conversations = [*CONVERSATIONS.values(), TOUCHING]
    if name == "idefics2":
        processor = Idefics2Processor(images, tokenizer, image_seq_len=16, chat_template=text)
        # transformers 5 builds this tokenizer by rules of its own, under which the blank that its processor puts before
        # text changes nothing, and one that the text has is lost.
        conversations = [TOUCHING, *(CONVERSATIONS[kept] for kept in ("text", "picture last", "adjacent"))]
    else:
        tower = found.config.vision_config
        more = {
            "patch_size": tower.patch_size,
            "vision_feature_select_strategy": found.config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(tower.model_type == "clip_vision_model"),
        }
        processor = LlavaProcessor(images, tokenizer, chat_template=text, **more)
    for turns in conversations:
        assert ids_of(processor, messages_of(turns)) == encoder.encode(sample_of(turns)).input_ids.tolist()
        asked = encoder.encode_prompt(sample_of(turns[:-1])).input_ids.tolist()
        assert ids_of(processor, messages_of(turns[:-1]), add_generation_prompt=True) == asked


def spelled(pieces, shown: str, left_out: str | None) -> str:
    """Pieces as the text that a processor is given, each picture as `shown`."""
    texts = [shown if isinstance(piece.content, Image) else piece.content for piece in pieces]
    return "".join(text for text in texts if text != left_out)


SHOWN = {"mfuyu_v1": "|IMAGE||SPEAKER||ENDOFIMAGE|"}


def plainly(text: str, messages, **settings) -> str:
    """What Jinja alone makes of a template, as servers that do without transformers have it."""

    def refuse(message):
        raise ValueError(message)

    return (
        ImmutableSandboxedEnvironment().from_string(text).render(messages=messages, raise_exception=refuse, **settings)
    )


@pytest.mark.parametrize(
    "system", [None, "", "Arr, 'ye' \"\\ {{ bos }} é🐕\n{% x %} 1000 $turn $$"], ids=["own", "none", "other"]
)
def test_jinja_alone_writes_the_pieces(encoder_of, family, system):
    encoder = encoder_of(family)
    template, vision = encoder.template, encoder.vision
    text = chat_template(template, vision, system)
    shown = SHOWN.get(template.name, "<|vision_start|><|image_pad|><|vision_end|>" if "qwen" in family else "<image>")
    for turns in [*CONVERSATIONS.values(), TOUCHING]:
        whole = spelled(render(sample_of(turns), template, system, "answer", vision.wrap), shown, vision.wrap.close)
        assert plainly(text, messages_of(turns)) == whole
        asked = spelled(prompt(sample_of(turns[:-1]), template, system, vision.wrap), shown, vision.wrap.close)
        assert plainly(text, messages_of(turns[:-1]), add_generation_prompt=True) == asked


@pytest.mark.parametrize("trim", [False, True])
def test_whitespace_is_the_templates_own(encoder_of, family, trim):
    """Environments differ in what of a template's lines they trim; and none needs an extension."""
    text = jinja_of(encoder_of(family))
    made = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim, keep_trailing_newline=not trim).from_string(text)
    messages = messages_of(CONVERSATIONS["more in later turns"])
    assert made.render(messages=messages) == plainly(text, messages)


@pytest.mark.parametrize("kind", ["video", "video_url", "audio"])
def test_what_no_family_takes_is_refused(encoder_of, family, kind):
    message = "give its frames as images" if "video" in kind else "not audio"
    with pytest.raises(ValueError, match=message):
        plainly(jinja_of(encoder_of(family)), [{"role": "user", "content": [{"type": kind}]}])


def test_a_role_that_no_template_has_is_refused(encoder_of, family):
    with pytest.raises(ValueError, match="not by tool"):
        plainly(jinja_of(encoder_of(family)), [{"role": "tool", "content": "x"}])


def test_other_spellings_of_messages(encoder_of, family):
    """A link of OpenAI's kind is a picture; content that is missing or None is empty."""
    text = jinja_of(encoder_of(family))
    link = {"type": "image_url", "image_url": {"url": "data:"}}
    linked = plainly(text, [{"role": "user", "content": [link]}, {"role": "assistant", "content": None}])
    assert linked == plainly(text, [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant"}])
    assert linked == plainly(text, messages_of([("user", 1), ("assistant", "")]))


def test_servers_see_that_content_may_be_parts(encoder_of, family):
    """vLLM looks for this loop; without it, it would write pictures' marks into the text by itself."""
    loops = jinja2.Environment().parse(jinja_of(encoder_of(family))).find_all(jinja2.nodes.For)
    over = Counter(type(loop.iter).__name__ for loop in loops if loop.target.name == "part")
    assert over["Getitem"] >= 1


def test_what_looks_like_a_token_is_text_where_the_client_says_so(opened, family):
    encoder, processor = opened
    if family == "idefics3":
        pytest.skip("its processor looks for letters' tokens in a way that marked text does not have")
    if "sanitize_control_tokens" not in inspect.signature(LlavaProcessor.apply_chat_template).parameters:
        pytest.skip("transformers before it could keep text as text")
    # Idefics2's counts <image> in what is marked as text, too, and refuses the prompt.
    also = "" if family == "idefics2" else encoder.vision.placeholder
    turns = [("user", 1, f" {encoder.template.end} is {also}?"), ("assistant", "Yes")]
    ours = encoder.encode(sample_of(turns)).input_ids.tolist()
    assert ids_of(processor, messages_of(turns), sanitize_control_tokens=True) == ours


@needs_golden
@pytest.mark.parametrize("at", range(8))
def test_the_hubs_own_template(at):
    """What Idefics2's own processor and template gave for the model's own answers; and our Jinja spells the same."""
    record = json.loads((GOLDEN / "generation/generation.json").read_text())["idefics2"][at]
    if record["cls"] != "hf4452":
        pytest.skip("of Mantis' class")
    template = TEMPLATES["idefics_2_hub"]
    found = open_checkpoint(recipe(GOLDEN / "checkpoints/idefics2").model)
    encoder = found.encoder(recipe(prompt={"template": template.name}))
    files, pictures = golden_pictures(), iter(record["images"])

    def part(content):
        return content["text"] if content["type"] == "text" else Image(files[next(pictures).split("/")[-1]])

    turns = tuple(Turn(m["role"], tuple(map(part, m["content"]))) for m in record["messages"])
    assert encoder.encode_prompt(Sample("golden:1", None, turns)).input_ids.tolist() == record["input_ids"]
    written = plainly(jinja_of(encoder), record["messages"], add_generation_prompt=True)
    assert written == f"{template.start}{record['prompt']}"
    theirs = json.loads((GOLDEN / "checkpoints/idefics2/chat_template.json").read_text())["chat_template"]
    assert written == template.start + plainly(theirs, record["messages"], add_generation_prompt=True)
