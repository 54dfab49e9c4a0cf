"""What is given to llama.cpp's converter, what is refused, and what llama.cpp itself then says, where there is one."""

import json
import os
import shutil
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path

import families
import pytest
from helpers import chat, picture, train, write_rows
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mantis_lite.chat import MantisChat
from mantis_lite.errors import CheckError, DiskError, RecipeError
from mantis_lite.export import SCALED, TILED, UNREAD, export
from mantis_lite.models.checkpoint import FAMILIES
from mantis_lite.recipe_file import make_recipe

STAND_IN = """\
import json, os, struct, sys
from pathlib import Path

model, file = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
seen = {
    "words": sys.argv[1:],
    "files": sorted(path.name for path in model.iterdir()),
    "weights": str((model / "model.safetensors").resolve()),
    "config": json.loads((model / "config.json").read_text()),
    "tokenizer": json.loads((model / "tokenizer_config.json").read_text()),
    "offline": os.environ["HF_HUB_OFFLINE"],
}
with (Path(__file__).parent / "seen.jsonl").open("a") as log:
    log.write(json.dumps(seen) + "\\n")
text = (model / "chat_template.jinja").read_bytes() if (model / "chat_template.jinja").exists() else b""
file.write_bytes(b"GGUF" + b"tokenizer.chat_template" + struct.pack("<IQ", 8, len(text)) + text)
"""


def stand_in(folder: Path, code: str = STAND_IN) -> Path:
    """A checkout that holds a converter which notes what it is given, or one that does as `code` says."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(code)
    return folder


def seen_by(checkout: Path) -> list[dict]:
    return [json.loads(line) for line in (checkout / "seen.jsonl").read_text().splitlines()]


def trained(folder: Path, model: Path, **settings) -> Path:
    """A run of two steps whose rate moves what is said."""
    rows = [chat(f"what is <image> next to number {i}?", f"number {i} is red", images=(i, i + 1)) for i in range(4)]
    own = {"max_steps": 2, "learning_rate": 0.05, "samples_per_step": 4, "save_strategy": "no"}
    base = {"model": str(model), "data": write_rows(folder / "rows.jsonl", rows), "run_dir": str(folder / "run")}
    base |= {"packing": {"max_length": 1024}, "memory": {"kernels": "off"}, "train": own, "method": "lora"}
    train(make_recipe(base | settings))
    return folder / "run"


@pytest.fixture(scope="module")
def run_of(folder_of, tmp_path_factory):
    @cache
    def get(family, media=(), **settings):
        settings |= {"media": dict(media)} if media else {}
        return trained(tmp_path_factory.mktemp(family), folder_of(family), **settings)

    return get


# What the converter is given.


def test_an_adapter_is_merged_and_given_twice(run_of, tmp_path):
    checkout = stand_in(tmp_path / "llama.cpp")
    found = export(run_of("qwen2_vl"), tmp_path / "gguf", checkout, "q8_0")
    assert found.agreement.share == 1
    assert (found.model, found.projector) == (
        tmp_path / "gguf/model-q8_0.gguf",
        tmp_path / "gguf/mmproj-q8_0.gguf",
    )
    first, second = seen_by(checkout)
    assert first["words"][1:4] == ["--outtype", "q8_0", "--outfile"] and "--mmproj" not in first["words"]
    assert second["words"][1:4] == ["--outtype", "q8_0", "--mmproj"] and first["words"][0] == second["words"][0]
    assert Path(first["weights"]).parent.name == "merged" and first["offline"] == "1"
    assert {"model.safetensors", "chat_template.jinja", "tokenizer.json"} <= set(first["files"])
    template = (run_of("qwen2_vl") / "adapter/chat_template.jinja").read_bytes()
    assert template in found.model.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gguf", "llama.cpp"]
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "manifest.json",
        "mmproj-q8_0.gguf",
        "model-q8_0.gguf",
    ]


def test_a_model_is_given_as_it_is_and_lands_beside_it(folder_of, tmp_path):
    model = Path(shutil.copytree(folder_of("idefics3"), tmp_path / "mine"))
    found = export(model, None, stand_in(tmp_path / "llama.cpp"))
    assert found.folder == tmp_path / "mine-gguf" and found.agreement is None
    first, _ = seen_by(tmp_path / "llama.cpp")
    assert first["weights"] == str(model / "model.safetensors")
    assert first["config"]["text_config"]["architectures"] == ["VLlama3ForCausalLM"]  # as in published configs
    assert "architectures" not in json.loads((model / "config.json").read_text())["text_config"]


def test_the_template_of_training_is_the_only_one_that_it_sees(run_of, tmp_path):
    """It prefers one in tokenizer_config.json, which the bases of Qwen2-VL have; transformers prefers the file."""
    run = Path(shutil.copytree(run_of("qwen2_vl", method="full"), tmp_path / "run"))
    file = run / "model/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "the hub's"}))
    export(run, tmp_path / "gguf", stand_in(tmp_path / "llama.cpp"))
    assert all("chat_template" not in seen["tokenizer"] for seen in seen_by(tmp_path / "llama.cpp"))
    assert json.loads(file.read_text())["chat_template"] == "the hub's"


@pytest.mark.slow
def test_what_llama_cpp_does_otherwise_is_said(run_of, tmp_path):
    checkout = stand_in(tmp_path / "llama.cpp")
    (tokens,) = export(run_of("qwen3_vl"), tmp_path / "a", checkout).notices
    assert tokens.endswith("as in training: --image-min-tokens 1 --image-max-tokens 6")
    capped = export(run_of("qwen2_vl", media=(("max_image_size", 56),)), tmp_path / "b", checkout).notices
    assert capped[1] == "llama.cpp does not scale pictures to 56 px, as training did: give it such"
    (blank,) = export(run_of("smolvlm"), tmp_path / "c", checkout).notices
    assert blank.startswith("llama.cpp writes a blank before a picture that begins a turn")
    assert export(run_of("idefics3"), tmp_path / "d", checkout).notices == ()


# What is refused, with nothing left behind.


def test_every_family_is_read_or_said_not_to_be():
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert sorted(kinds) == sorted([*TILED, *SCALED, *UNREAD])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("llava", "a LLaVA with a Pixtral tower and no other"), ("idefics2", "no Idefics2"), ("fuyu", "no Fuyu")],
)
def test_families_that_llama_cpp_does_not_read(folder_of, tmp_path, kind, reason):
    with pytest.raises(RecipeError, match=rf"is of {kind}, which is not supported there: .*{reason}.*\n  mantis-lite"):
        export(folder_of(kind), tmp_path / "gguf", stand_in(tmp_path / "llama.cpp"))
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_scores(folder_of, tmp_path):
    rows = [{"images": [{"bytes": picture(at)}], "prompt": "<image> how good?", "labels": {"a": at}} for at in range(4)]
    head = {"task": "classify", "head": {"problem": "regression", "labels": ["a"]}}
    settings = {"model": str(folder_of("qwen2_vl")), "data": write_rows(tmp_path / "rows.jsonl", rows)}
    settings |= {"run_dir": str(tmp_path / "run"), "method": "lora", "memory": {"kernels": "off"}}
    train(make_recipe(settings | head | {"train": {"max_steps": 1, "save_strategy": "no"}}))
    with pytest.raises(RecipeError, match=r"has a score head, and llama.cpp has none for these models\n  mantis-lite"):
        export(tmp_path / "run", tmp_path / "gguf", stand_in(tmp_path / "llama.cpp"))
    assert not (tmp_path / "gguf").exists()


def test_pictures_that_training_did_not_cut(run_of, tmp_path):
    run = run_of("idefics3", media=(("image_splitting", False),))
    with pytest.raises(RecipeError, match=r"trained on pictures that are not cut, .* into tiles\n  mantis-lite serve"):
        export(run, tmp_path / "gguf", stand_in(tmp_path / "llama.cpp"))
    assert not (tmp_path / "gguf").exists()


def test_what_is_named_wrongly(folder_of, tmp_path):
    checkout, model = stand_in(tmp_path / "llama.cpp"), folder_of("qwen2_vl")
    with pytest.raises(
        RecipeError, match=r"--llama-cpp: .* has no convert_hf_to_gguf.py\n  Name a checkout: git clone"
    ):
        export(model, tmp_path / "gguf", tmp_path)
    with pytest.raises(RecipeError, match=r"--outtype: expected one of f32, f16, bf16, q8_0, found q4_0\n  Name one"):
        export(model, tmp_path / "gguf", checkout, "q4_0")
    with pytest.raises(RecipeError, match=r"--python: .*/none is no program\n  Name the python"):
        export(model, tmp_path / "gguf", checkout, python=tmp_path / "none")
    with pytest.raises(RecipeError, match=r"--to: .* exists already\n  Name another folder"):
        export(model, tmp_path, checkout)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


SAYS = "import sys\nfor at in range(9): print('line', at)\n"
FAILS = {
    "it ends with an error": (
        SAYS + "sys.exit('Model is not supported')",
        RecipeError,
        r"ended with 1, and wrote no model-f16.gguf:\n(    line [4-8]\n){5}    Model is not supported\n  See that",
    ),
    "it writes nothing": (SAYS, RecipeError, r"ended with 0, and wrote no model-f16.gguf:\n    line 3\n"),
    "it writes something else": (
        "import sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('no')",
        RecipeError,
        r"ended with 0, and wrote no model-f16.gguf",
    ),
    "the tower fails": (
        STAND_IN + "\nif '--mmproj' in sys.argv: sys.exit('no tower')",
        RecipeError,
        r"ended with 1, and wrote no mmproj-f16.gguf:\n    no tower",
    ),
    "another template": (
        STAND_IN.replace(".read_bytes()", ".read_bytes()[1:]"),
        CheckError,
        r"model-f16.gguf has another chat template than chat_template.jinja beside the model\n  Take another version",
    ),
    "a full disk": (
        "import errno, os\nraise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))",
        DiskError,
        r"gguf could not be written: No space left on device; it takes about",
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_converter_that_fails(run_of, tmp_path, case):
    code, error, message = FAILS[case]
    with pytest.raises(error, match=message):
        export(run_of("qwen2_vl"), tmp_path / "gguf", stand_in(tmp_path / "llama.cpp", code))
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_it_runs_by_the_python_that_is_named(folder_of, tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\nexec {sys.executable} "$@"\n')
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    export(folder_of("qwen2_vl"), tmp_path / "gguf", stand_in(tmp_path / "llama.cpp"), python=other)
    assert (tmp_path / "ran").exists()


# llama.cpp itself. It knows a pre-tokenizer by what it makes of a text, and so takes none of a vocabulary made here; a
# checkout brings the published vocabularies of Qwen2 and Llama 3.

CHECKOUT = os.environ.get("MANTIS_LITE_LLAMA_CPP")
"""A checkout of llama.cpp, where build/bin/llama-mtmd-cli may be built."""
PYTHON = os.environ.get("MANTIS_LITE_LLAMA_CPP_PYTHON", sys.executable)
"""That of an environment with its requirements."""
REAL = {
    "qwen2_vl": ("qwen2", families.QWEN),
    "qwen2_5_vl": ("qwen2", families.QWEN),
    "qwen3_vl": ("qwen2", families.QWEN),
    "idefics3": ("llama-bpe", [*families.TILES, "<end_of_utterance>"]),
    "smolvlm": ("llama-bpe", [*families.TILES, "<end_of_utterance>"]),
}
ARCHITECTURES = {"qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2vl", "qwen3_vl": "qwen3vl"}

needs_llama_cpp = pytest.mark.skipif(not CHECKOUT, reason="MANTIS_LITE_LLAMA_CPP names no checkout of llama.cpp")


def read(file: Path):
    """A GGUF file, by the package of a checkout."""
    sys.path.insert(1, str(Path(CHECKOUT) / "gguf-py"))
    from gguf import GGUFReader

    return GGUFReader(file)


def published_tokens(vocabulary: str, more: list[str]) -> Tokenizer:
    """The tokenizer of Qwen2 or Llama 3, with more special tokens."""
    fields = read(Path(CHECKOUT) / f"models/ggml-vocab-{vocabulary}.gguf").fields
    words, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    ids = {word: at for at, word in enumerate(words) if kinds[at] == 1}
    made = Tokenizer(models.BPE(ids, [tuple(pair.split(" ")) for pair in merges], ignore_merges=vocabulary != "qwen2"))
    digits = r"\p{N}" if vocabulary == "qwen2" else r"\p{N}{1,3}"
    short = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    pattern = rf"{short}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([split, bytes_]), decoders.ByteLevel()
    special = [*(word for at, word in enumerate(words) if kinds[at] == 3), *more, "<|pad|>"]
    made.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    if vocabulary == "qwen2":
        made.normalizer = normalizers.NFC()
    else:
        start = "<|begin_of_text|>"
        made.post_processor = processors.TemplateProcessing(
            f"{start} $A", special_tokens=[(start, made.token_to_id(start))]
        )
    return made


@pytest.fixture
def real_folder_of(tmp_path, monkeypatch):
    """A family's tiny checkpoint, of a published vocabulary."""

    def get(name: str) -> Path:
        tokens = published_tokens(*REAL[name])
        config = families.MADE[name][0](tokens)
        if name == "qwen2_5_vl":
            config.vision_config.window_size = 112  # the published one, which llama.cpp takes for granted
        monkeypatch.setattr(families, "tokens_of", lambda _: tokens)
        monkeypatch.setitem(families.MADE, name, (lambda _: config, *families.MADE[name][1:]))
        return families.save(name, tmp_path / name)

    return get


def answered(found, text: str, pictures: list[Path], options: list[str]) -> str:
    """What llama.cpp's own program says, at its likeliest."""
    program = [str(Path(CHECKOUT) / "build/bin/llama-mtmd-cli"), "--jinja", "--temp", "0", "-n", "16", "-t", "1"]
    files = ["-m", str(found.model), "--mmproj", str(found.projector)]
    exact = ["-c", "2048", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-warmup"]
    files += [word for file in pictures for word in ("--image", str(file))]
    done = subprocess.run([*program, *files, *exact, *options, "-p", text], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode(errors="replace").strip()


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("kind", REAL)
def test_llama_cpp_says_what_we_say(real_folder_of, tmp_path, kind):
    template = {"template": "idefics_3"} if kind == "smolvlm" else {}  # its own begins with a token that is not Llama's
    run = trained(tmp_path, real_folder_of(kind), prompt=template)
    found = export(run, tmp_path / "gguf", CHECKOUT, "f32", python=PYTHON)
    model, projector = read(found.model), read(found.projector)
    assert model.fields["general.architecture"].contents() == ARCHITECTURES.get(kind, "llama")
    assert projector.fields["general.architecture"].contents() == "clip"
    assert model.tensors and projector.tensors
    expected = (run / "adapter/chat_template.jinja").read_text()
    assert model.fields["tokenizer.chat_template"].contents() == expected
    if not (Path(CHECKOUT) / "build/bin/llama-mtmd-cli").exists():
        pytest.skip("the files are right; build/bin/llama-mtmd-cli, which would run them, is not built")
    options = found.notices[0].partition("as in training: ")[2].split() if found.notices else []
    ours = MantisChat(run)
    pictures = [tmp_path / f"{at}.png" for at in range(2)]
    for at, (file, size) in enumerate(zip(pictures, [(84, 56), (90, 60)], strict=True)):
        file.write_bytes(picture(at, *size))
    for text in ("<image>what is this next to <image>number 1?", "say what <image> and <image> are"):
        ours.reset()
        said = ours(text, images=pictures, max_new_tokens=16)
        assert answered(found, text.replace("<image>", "<__media__>"), pictures, options) == said.strip()
