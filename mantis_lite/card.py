"""The README.md of what was trained, as the hub shows it: what it is, of what it was made and how it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from ruamel.yaml.error import YAMLError

from .contract import Contract
from .data.hub import is_name
from .data.source import SUFFIXES
from .data.template import TEMPLATES
from .models.fuyu import FUYU
from .models.idefics2 import IDEFICS2
from .models.idefics3 import IDEFICS3
from .models.llava import LLAVA
from .yaml_text import dump_yaml, load_yaml

CARD = "README.md"
FRONT_MATTER = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
KINDS = {"adapter": "An adapter of", "model": "A fine-tune of", "merged": "An adapter merged into its base,"}
NO_CLASS = "plain transformers has no class with a score head for this family; the package's own is used:"
NO_PROCESSOR = (
    "Fuyu's published processor puts every picture in front of all text, so plain transformers cannot be used."
)


@dataclass(frozen=True)
class License:
    """A license as the hub's cards state it: its word, and where that is "other" what it is called and where it is."""

    word: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        shown = self.name or self.word
        return f"[{shown}]({self.link})" if self.link and self.link.startswith("https://") else shown


def is_on_hub(name: str) -> bool:
    """Whether it is user/name, as the hub calls a model or data set, and nothing here is called so."""
    return is_name(name) and not Path(name).exists()


def stated_license(readme: str) -> License | None:
    """The license that a card's front matter states, if it states one."""
    found = FRONT_MATTER.search(readme)
    try:
        stated = load_yaml(found[1]) if found else None
    except YAMLError:
        return None
    if not isinstance(stated, dict) or not isinstance(stated.get("license"), str):
        return None
    name, link = (stated.get(key) for key in ("license_name", "license_link"))
    return License(stated["license"], *(value if isinstance(value, str) else None for value in (name, link)))


MEASURES = {
    "positions": "positions compared",
    "share": "of them, the same choice",
    "kl": "KL divergence, nats",
    "largest": "largest difference of two logits",
    "rows": "in",
}
"""What the figures of `agreement.py` are."""


def write_card(folder: Path, contract: Contract, name: str) -> None:
    """Lay a card beside what was trained, as it would be found under a name on the hub; a push makes it anew."""
    (folder / CARD).write_text(card(contract, f"user/{name}"))


def card(
    contract: Contract,
    repo: str,
    license: License | None = None,
    base_license: License | None = None,
    curve: bool = False,
) -> str:
    """The README.md of what a contract is about, to be found at `repo`.

    `license` is what it is given under, `base_license` what the base is; without either the card says so. With `curve`
    it shows the loss.png beside it.
    """
    recipe = (
        f"`recipe.yaml`, where paths are the last names of what they were:\n\n{_block('yaml', recipe_yaml(contract))}"
    )
    sections = {
        "How to use it": _use(contract, repo),
        "What it was trained on": _data(contract),
        "Metrics": _table("metric", contract.metrics) or "None were measured.",
        "Agreement with the adapter": _agreement(contract),
        "The recipe": recipe,
        "Versions": _block("", "".join(f"{name} {version}\n" for name, version in contract.versions.items())),
        "License": _terms(contract, license, base_license),
    }
    if curve:
        sections["Metrics"] += "\n\n![The loss by step](loss.png)"
    text = "\n\n".join(f"## {title}\n\n{section.strip()}" for title, section in sections.items() if section)
    return (
        f"---\n{_front_matter(contract, license)}\n---\n\n# {repo.partition('/')[2]}\n\n{_what(contract)}\n\n{text}\n"
    )


def recipe_yaml(contract: Contract) -> str:
    """The recipe as YAML that `mantis-lite train` reads, once its data is put where it says."""
    return dump_yaml(contract.recipe)


def _front_matter(contract: Contract, license: License | None) -> str:
    names = contract.base.names
    on_hub = all(map(is_on_hub, names))
    base = names if len(names) > 1 else contract.base.name
    relation = "adapter" if contract.kind == "adapter" else "finetune"  # "merge" is the hub's word for several models
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation=relation if on_hub else None,
        datasets=_data_sets(contract) or None,
        license=license.word if license else None,
        license_name=license.name if license else None,
        license_link=license.link if license else None,
        library_name="peft" if contract.kind == "adapter" else "transformers",
        pipeline_tag=_pipeline(contract),
        tags=_tags(contract),
    )
    return data.to_yaml()


def _pipeline(contract: Contract) -> str | None:
    """The hub's word for what it does; it has none for numbers that are told of pictures and text."""
    if contract.task != "classify":
        return "video-text-to-text" if contract.task == "video" else "image-text-to-text"
    if contract.labels is None or contract.labels.problem == "regression":
        return None
    media = contract.recipe.get("media") or {}
    return "video-classification" if media.get("num_frames") or media.get("fps") else "image-classification"


def _tags(contract: Contract) -> list[str]:
    method = ["lora", "qlora"] if contract.method == "qlora" else [contract.method]
    dora = ["dora"] if (contract.recipe.get("lora") or {}).get("dora") and contract.method != "full" else []
    if contract.method == "full":
        method = [] if contract.task == "pretrain" else ["full-fine-tune"]
    return ["mantis", "multi-image", "mantis-lite", *method, *dora, contract.facts.family, contract.task]


def _data_sets(contract: Contract) -> list[str]:
    """Those of the data's sources that are on the hub; a file or folder is named by its last name, without a slash."""
    paths = [str(source.get("path")) for source in (contract.recipe.get("data") or {}).get("sources", ())]
    names = [path.partition(":")[0] for path in paths if not path.endswith(SUFFIXES)]
    return list(dict.fromkeys(name for name in names if is_on_hub(name)))


def _base(contract: Contract) -> str:
    name, revision = contract.base.name, contract.base.revision
    if name == "tiny":
        return "Mantis-Lite's own `tiny`"
    shown = " and ".join(map(_linked, contract.base.names))
    return f"{shown}, at revision `{revision}`" if revision else shown


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_on_hub(name) else f"`{name}`, which is not on the hub"


def _what(contract: Contract) -> str:
    does = {
        "chat": "answers questions about several pictures at once",
        "video": "answers questions about clips and pictures",
        "classify": "scores pictures, clips and text",
        "pretrain": "describes a picture, as far as its captions went, and is the start of a full fine-tune",
    }[contract.task]
    labels = contract.labels
    scores = f" It has a score for each of: {', '.join(labels.names)} ({labels.problem})." if labels else ""
    held = f", with its {' and '.join(contract.quantized)} in 4 bits" if contract.quantized else ""
    words = {"lora": "LoRA", "qlora": "QLoRA", "full": "a full fine-tune"}[contract.method]
    made = KINDS[contract.kind]
    if contract.task == "pretrain":
        words = "training its projector alone, on captions"
        made = "Put together from" if len(contract.base.names) > 1 else "Trained on captions from"
    return (
        f"{made} {_base(contract)}. It {does}.{scores}\n\n"
        f"Trained with Mantis-Lite by {words}{held}, in {contract.dtype}. `mantis_lite.json` says how prompts and "
        "pictures are to be written for it, and is held to when it is loaded."
    )


def _use(contract: Contract, repo: str) -> str:
    found = contract.kind != "adapter" or contract.base.name == "tiny" or is_on_hub(contract.base.name)
    base = "" if found else " model=path/to/the/base"
    if contract.task == "classify":
        words = f"mantis-lite predict {repo} data=new.json{base}"
        settings = '"data=new.json"' + (f', "{base.strip()}"' if base else "")
        call = f'found = mantis_lite.predict("{repo}", [{settings}])'
        code = f"import mantis_lite\n\n{call}\nprint(found.file.read_text())"
        return f"{_block('', words)}\n\nOr in Python: {NO_CLASS}\n\n{_block('python', code)}"
    plain = f"{_block('', f'mantis-lite chat {repo}{base}')}\n\n"
    if contract.facts.family in FUYU.model_types:
        return plain + NO_PROCESSOR
    clips = "\n\nA clip is given as pictures, frames spread over all of it." if contract.task == "video" else ""
    return f"{plain}With transformers alone:\n\n{_block('python', _plain_code(contract, repo))}{clips}"


def _plain_code(contract: Contract, repo: str) -> str:
    """Python with transformers and PEFT that asks about two pictures, and has prompts written as in training."""
    adapter, llava = contract.kind == "adapter", contract.facts.family in LLAVA.model_types
    name, revision = (contract.base.name, contract.base.revision) if adapter else (repo, None)
    where = json.dumps({"pretrained_model_name_or_path": name} | ({"revision": revision} if revision else {}))
    processors = "AutoTokenizer, LlavaProcessor" if llava else "AutoProcessor"
    media = contract.recipe.get("media") or {}
    lines = [
        "from huggingface_hub import hf_hub_download",
        *(["from peft import PeftModel"] if adapter else []),
        "from PIL import Image",
        f"from transformers import {'AutoImageProcessor, ' if llava else ''}AutoModelForImageTextToText, {processors}",
        "",
        f"base = {where}{'' if not adapter or is_on_hub(name) else '  # its folder'}",
        'model = AutoModelForImageTextToText.from_pretrained(**base, dtype="auto", device_map="auto")',
        *(LLAVA_PROCESSOR if llava else ['processor = AutoProcessor.from_pretrained(**base, backend="pil")']),
        f'processor.chat_template = open(hf_hub_download("{repo}", "chat_template.jinja")).read()',
        *_processing(contract, media),
        *([f'model = PeftModel.from_pretrained(model, "{repo}")'] if adapter else []),
        "",
        'pictures = [Image.open(file).convert("RGB") for file in ("first.png", "second.png")]',
        *_capped(contract, media),
        'content = [*({"type": "image", "image": picture} for picture in pictures)]',
        'content += [{"type": "text", "text": " What is different in the second picture?"}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",',
        ").to(model.device, dtype=model.dtype)",
        f'end = processor.tokenizer.convert_tokens_to_ids("{_end(contract)}")',
        "ids = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=end, pad_token_id=end)",
        'print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines) + "\n"


LLAVA_PROCESSOR = (
    "processor = LlavaProcessor(",
    '    AutoImageProcessor.from_pretrained(**base, backend="pil"),',
    "    AutoTokenizer.from_pretrained(**base),",
    "    patch_size=model.config.vision_config.patch_size,",
    "    vision_feature_select_strategy=model.config.vision_feature_select_strategy,",
    '    num_additional_image_tokens=int(model.config.vision_config.model_type == "clip_vision_model"),',
    ")",
)
"""Mantis' LLaVAs were published with a processor class of their own, without what transformers' counts tokens by."""


def _processing(contract: Contract, media: Mapping[str, Any]) -> list[str]:
    """How the processor is told to split and scale; Idefics2 is trained whole where nothing is said, unlike its own."""
    splits, longest, lines = media.get("image_splitting"), media.get("max_image_size"), []
    if splits is None and contract.facts.family in IDEFICS2.model_types:
        splits = False
    if splits is not None:
        lines.append(f"processor.image_processor.do_image_splitting = {splits}")
    if longest and contract.facts.family in IDEFICS3.model_types:
        lines.append(f'processor.image_processor.size = {{"longest_edge": {longest}}}')
    return lines


def _capped(contract: Contract, media: Mapping[str, Any]) -> list[str]:
    longest = media.get("max_image_size")
    if not longest or contract.facts.family in IDEFICS3.model_types:
        return []
    return [
        "for picture in pictures:",
        f"    picture.thumbnail(({longest}, {longest}), reducing_gap=None)  # as in training",
    ]


def _end(contract: Contract) -> str:
    """The token that ends an answer in the template that was trained with."""
    return next(template.end for template in TEMPLATES if template.name == contract.facts.template)


def _data(contract: Contract) -> str:
    data, names = contract.data, _data_sets(contract)
    if data is None:
        return "It came from elsewhere, without a word of its data."
    linked = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in names)
    said = f"{data.rows:,} rows" + (f", and {data.held_out:,} held out" if data.held_out else "")
    return f"{said}{f', of {linked}' if names else ''}. Fingerprint of all that is in them: `{data.fingerprint}`."


def _agreement(contract: Contract) -> str:
    """How a merged model agrees with the adapter on its base."""
    if contract.kind != "merged":
        return ""
    dequantized = "what the base's weights are once they have been in 4 bits"
    into = dequantized if contract.merged == "dequantized" else "the base's own weights"
    found = {MEASURES.get(name, name): value for name, value in (contract.agreement or {}).items()}
    figures = _table("adapter and merged model", found) or "It was not compared with the adapter on its base."
    return f"The adapter was added to {into}.\n\n{figures}"


def _terms(contract: Contract, license: License | None, base_license: License | None) -> str:
    base = f"The base, {_base(contract)}, is under {base_license}: its terms go on to hold."
    if base_license is None:
        base = f"The base is {_base(contract)}: see there under which terms, which go on to hold."
    return f"Given under {license}. {base}" if license else f"None is stated here. {base}"


def _table(title: str, figures: Mapping[str, float | str | None]) -> str:
    """Figures as Markdown; nothing where there are none."""
    if not figures:
        return ""
    shown = {
        name: "not defined" if value is None else value if isinstance(value, str) else f"{value:.4g}"
        for name, value in figures.items()
    }
    return "\n".join([f"| {title} | value |", "|---|---:|", *(f"| {name} | {text} |" for name, text in shown.items())])


def _block(language: str, text: str) -> str:
    """Text between fences, which none of its own lines can close."""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall(r"`+", text))]))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
