"""Nothing in the package runs what it reads: the calls that could are looked for, and each found has a reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mantis_lite
from mantis_lite.recipe_file import recipes_dir

PACKAGE = Path(mantis_lite.__file__).parent
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "jinja2", "requests"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "YAML.load"),
    *("tarfile.extract", "extractall", "urlopen", "urlretrieve", "apply_chat_template", "import_module"),
    *("render_jinja_template",),
    *("PeftConfig.from_pretrained", "PeftModel.from_pretrained", "AutoPeftModel.from_pretrained", "np.fromfile"),
}
KEYWORDS = {"trust_remote_code": None, "shell": True, "allow_pickle": True, "weights_only": False}
"""Keywords, and the value that is banned; None for any."""

ALLOWED = {
    ("models/upstream.py", "import pickle"): "the name of the error that a broken file of the original code raises",
    (
        "models/upstream.py",
        "torch.load",
    ): "with --import-upstream alone, weights_only: the original code writes pickles",
    ("evaluate/judge.py", "urllib.request.urlopen"): "of the endpoint that --judge names, https or this machine's",
    ("pages.py", "import jinja2"): "a page is of the package's own template, and all else in it is escaped",
}


def banned(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES and not node.level:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or any(name.endswith(f".{call}") for call in CALLS if call not in ("eval", "compile")):
                yield name
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS:
                    value = ast.unparse(keyword.value)
                    if KEYWORDS[keyword.arg] is None or value != str(not KEYWORDS[keyword.arg]):
                        yield f"{keyword.arg}={value}"
            if name == "YAML" and [ast.unparse(k.value) for k in node.keywords if k.arg == "typ"] != ["'safe'"]:
                yield "YAML of another kind than safe"


def test_no_banned_call_but_those_with_a_reason():
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        found |= {(str(file.relative_to(PACKAGE)), what) for what in banned(ast.parse(file.read_text()))}
    assert found == set(ALLOWED)


def test_the_pickle_that_is_read_is_read_as_weights_only():
    calls = [n for n in ast.walk(ast.parse((PACKAGE / "models/upstream.py").read_text())) if isinstance(n, ast.Call)]
    (load,) = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}["weights_only"] == "True"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.x",
        "from yaml import load",
        "eval('1')",
        "exec('1')",
        "__import__('os')",
        "import os; os.system('x')",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "torch.save(f, weights_only=False)",
        "subprocess.run('x', shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "subprocess.run('x', shell=flag)",
        "YAML(typ='unsafe')",
        "YAML()",
        "zip.extractall(x)",
        "urllib.request.urlopen(x)",
        "PeftModel.from_pretrained(m, x)",
        "tokenizer.apply_chat_template(x)",
        "render_jinja_template(x)",
        "import jinja2",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment",
        "importlib.import_module(x)",
    ],
)
def test_the_search_finds(code):
    assert list(banned(ast.parse(code)))


@pytest.mark.parametrize("code", ["re.compile('x')", "model.eval()", "f(shell=False)", "YAML(typ='safe')"])
def test_the_search_lets_pass(code):
    assert not list(banned(ast.parse(code)))


RENDERERS = {"apply_chat_template", "render_jinja_template", "jinja2"}


def names(tree: ast.AST) -> Iterator[str]:
    """What code calls by name, imports, or gives as a name in a string; not what longer texts tell others to call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield getattr(node, "module", None) or ""
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def renders(tree: ast.AST) -> bool:
    return any(name in RENDERERS or name.split(".")[0] == "jinja2" for name in names(tree))


def test_no_chat_template_is_rendered():
    """Prompts are the package's own templates': it writes Jinja for others to run, and runs that of its pages alone."""
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        assert not renders(ast.parse(file.read_text())) or (name, "import jinja2") in ALLOWED, file


@pytest.mark.parametrize("file", [name for name, what in ALLOWED if what == "import jinja2"])
def test_a_page_is_of_a_template_of_the_package(file):
    tree = ast.parse((PACKAGE / file).read_text())
    (taken,) = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "jinja2"]
    assert {alias.name for alias in taken.names} == {"Environment", "PackageLoader", "select_autoescape"}
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not any(name.endswith("from_string") for name in calls)
    assert ast.unparse(calls["select_autoescape"]) == "select_autoescape(default=True)"


@pytest.mark.parametrize(
    "code",
    [
        "render = tokenizer.apply_chat_template",
        "getattr(tokenizer, 'apply_chat_template')(x)",
        "from transformers.utils.chat_template_utils import render_jinja_template as f",
        "import jinja2.sandbox as s",
        "from jinja2.sandbox import Environment",
    ],
)
def test_the_search_finds_what_renders(code):
    assert renders(ast.parse(code)) and not renders(ast.parse("'write processor.apply_chat_template(x)'"))


@pytest.mark.parametrize("path", sorted(recipes_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_ask_for_nothing_of_the_kind(path):
    text = path.read_text()
    assert not [word for word in ("trust_remote_code", "!!", "&", "any_base", "outside:", "urls:") if word in text]
