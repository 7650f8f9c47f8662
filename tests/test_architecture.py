"""The house plan as a test: who may import whom, what may be called what, and how long a page may be."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import saccade
from saccade import cli, recipe, settings

HOUSE = Path(saccade.__file__).parent
ROOT = Path(__file__).parents[1]

LAYERS = {
    **dict.fromkeys(
        ["errors", "settings", "data", "sources", "draws", "decode", "augment", "masking", "distributed"], 0
    ),
    **dict.fromkeys(
        [
            "depth",
            "frozen",
            "vit",
            "linear",
            "convnet",
            "backbone",
            "text",
            "heads",
            "losses",
            "pair_losses",
            "words",
            "caption",
            "naflex",
            "tokenizer",
            "norm",
            "optim",
            "own",
            "distributed",
        ],
        0,
    ),
    "recipe": 1,
    "recipes": 2,
    **dict.fromkeys(
        [
            "run",
            "weights",
            "checkpoint",
            "initial",
            "teachers",
            "provenance",
            "encoder",
            "tensors",
            "hints",
            "anchor",
            "lora",
            "advice",
            "torchscript",
            "hub",
            "published",
            "resize",
            "health",
            "model",
            "reading",
            "progress",
            "naming",
            "onnx",
            "pairing",
        ],
        3,
    ),
    **dict.fromkeys(
        [
            "train",
            "adapt",
            "evaluate",
            "finetune",
            "diagnose",
            "compare",
            "embed",
            "search",
            "explore",
            "report",
            "export",
        ],
        4,
    ),
    "tour": 4,
    "label_next": 4,
    "labels": 3,
    "coverage": 3,
    "watch": 4,
    "card": 4,
    "cli": 5,
    "__main__": 6,
}
FREE = {"__init__", "pictures"}
"""The front door names everything, lazily; the pictures are data."""

FORBIDDEN = {"util", "utils", "helper", "helpers", "common", "manager", "misc", "legacy", "v2"}
LONGEST = {"train.py": 300}
"""Line budgets of single pages; a recipe's is in test_conformance.py."""

FILES = sorted(path for path in HOUSE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def page(path: Path) -> str:
    """The page that a file belongs to: `sources` for sources/folder.py."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules that a file imports anywhere, also inside functions, and the lines."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module, node.lineno
            if node.module == "saccade":
                yield from ((f"saccade.{alias.name}", node.lineno) for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_point_left(path: Path) -> None:
    mine = page(path)
    assert mine in LAYERS or mine in FREE, f"{mine} has no place in the layers: give it one in docs/decisions/"
    if mine in FREE:
        return
    for module, line in imports(path):
        top, _, rest = module.partition(".")
        theirs = rest.split(".")[0]
        if top != "saccade" or theirs == mine or theirs not in LAYERS:
            continue
        if module == "saccade.recipes" and mine == "recipe":  # the folder is the registry
            continue
        allowed = LAYERS[theirs] < LAYERS[mine] or LAYERS[theirs] == LAYERS[mine] != LAYERS["recipes"]
        assert allowed, f"{path}:{line}: {mine} must not import {theirs}, which stands right of it"
        assert not (LAYERS[mine] == LAYERS["recipes"] and theirs == "recipes"), f"{path}:{line}: recipes import pages"


def test_recipes_do_not_import_each_other() -> None:
    for path in (HOUSE / "recipes").glob("*.py"):
        assert not [module for module, _ in imports(path) if module.startswith("saccade.recipes")], path


def test_imports_make_no_cycle() -> None:
    """Among the files, imports inside functions aside: they are there because something may not exist yet."""
    names = {
        ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    needs = {
        name: {found for node in TREES[path].body for found in _needed(node) if found in names and found != name}
        for name, path in names.items()
        if name != "saccade"
    }
    while free := [name for name, wanted in needs.items() if not wanted & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"a cycle among {sorted(needs)}"


def _needed(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_budgets_and_manners(path: Path) -> None:
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(HOUSE))
    assert ast.get_docstring(TREES[path]), f"{name} does not say what it is"
    assert "from __future__ import annotations" in text or not list(functions(path)), name
    lines = len(text.splitlines())
    assert lines <= LONGEST.get(name, 700), f"{name} has {lines} lines"
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length < 60, f"{name}:{function.lineno}: {function.name} has {length} lines"
    called = {node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)}
    assert "hasattr" not in called, f"{name} asks hasattr: say in a type what there is"
    wrong = [
        module for module, _ in imports(path) if module.split(".")[0] in {"torchvision", "timm", "lightning", "kornia"}
    ]
    assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_names_are_words_of_the_trade(path: Path) -> None:
    assert path.stem not in FORBIDDEN, path
    defined = [node.name for node in ast.walk(TREES[path]) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    words = {name: set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")) for name in defined}
    wrong = [name for name in defined if words[name] & (FORBIDDEN - {"common"})]  # a common kind is the trade's
    assert not wrong, f"{path.name}: {wrong}"


def test_public_functions_say_what_they_do() -> None:
    silent = []
    for path in FILES:
        for node in TREES[path].body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                is_hook = page(path) == "recipes" and node.name in {"Config", "Method", "views", "stages"}
                if not ast.get_docstring(node) and not is_hook:
                    silent.append(f"{path.relative_to(HOUSE)}:{node.name}")
    assert not silent


def test_no_verb_knows_a_recipe() -> None:
    """No recipe's name, and none of its own settings, stands in a verb or in what verbs stand on."""
    shared = settings.Training.model_fields.keys() | settings.PretrainArguments.model_fields.keys()
    for name in recipe.names():
        own = recipe.find(name).config.model_fields.keys() - shared
        for path in FILES:
            if page(path) in {
                "recipes",
                "published",
                "naming",
                "hub",
                "pairing",
                "tokenizer",
                "tour",
                *FREE,
            }:  # families and tokenizers are called as recipes; the tour is a run
                continue
            words = {node.value for node in ast.walk(TREES[path]) if isinstance(node, ast.Constant)}
            assert name not in words, f"{path.name} knows the recipe {name}"
            if LAYERS.get(page(path)) == LAYERS["train"]:
                read = {node.attr for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}
                knows = {knob for knob in own & read if f"config.{knob}" in path.read_text(encoding="utf-8")}
                assert not knows, f"{path.name} knows settings of {name}: {knows}"


def test_no_dead_knobs() -> None:
    """Every setting is read outside its declaration: as an attribute, or as the argument of a verb."""
    read: set[str] = set()
    for path in FILES:
        declares = path.name in {"settings.py", "cli.py"}
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if not declares or (isinstance(node.value, ast.Name) and node.value.id == "self"):
                    read.add(node.attr)
            elif isinstance(node, ast.arg) and not declares:
                read.add(node.arg)
    declared = {
        f"{model.__name__}.{name}": name
        for model in (settings.Training, settings.SpreadDistillation, *(verb.arguments for verb in cli.VERBS.values()))
        for name in model.model_fields
    }
    assert not [knob for knob, name in declared.items() if name not in read]


def test_every_setting_is_explained() -> None:
    models = [settings.Training, *(verb.arguments for verb in cli.VERBS.values())]
    models += [recipe.find(name).config for name in recipe.names()]
    silent = [f"{m.__name__}.{name}" for m in models for name, field in m.model_fields.items() if not field.description]
    assert not silent


def test_public_names() -> None:
    """The names of the interface. One more is welcome here; one less is a line in docs/decisions/ and the CHANGELOG."""
    assert set(saccade.__all__) == {
        "Encoder",
        "Features",
        "Hit",
        "Index",
        "Own",
        "Run",
        "SaccadeError",
        "__version__",
        "adapt",
        "diagnose",
        "embed",
        "evaluate",
        "export",
        "finetune",
        "label_next",
        "load",
        "predict",
        "pretrain",
    }
    assert set(saccade.__all__) <= set(dir(saccade))
    for name in saccade.__all__:
        assert not isinstance(getattr(saccade, name), ModuleType), f"saccade.{name} must not be its page"
    for verb in (
        "adapt",
        "embed",
        "evaluate",
        "diagnose",
        "finetune",
        "label_next",
    ):  # whoever imports the page of a verb, the name stays the verb
        setattr(saccade, verb, importlib.import_module(f"saccade.{verb}"))  # as the import system does
        assert not isinstance(vars(saccade).get(verb), ModuleType), verb
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        saccade.pretrian  # noqa: B018


def test_verbs_of_the_interface() -> None:
    assert set(cli.VERBS) == {
        "tour",
        "pretrain",
        "adapt",
        "evaluate",
        "diagnose",
        "finetune",
        "predict",
        "embed",
        "search",
        "label-next",
        "models",
        "export",
    }


def test_the_tour_names_files_that_exist() -> None:
    """docs/tour.md follows a picture from disk to loss in at most six files, the loop aside."""
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    named = re.findall(r"`(src/saccade/[\w/]+\.py)`", text)
    assert named
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing
    to_the_loss = text.split("## From disk to loss")[1].split("\n## ")[0]
    steps = set(re.findall(r"`(src/saccade/[\w/]+\.py)`", to_the_loss)) - {"src/saccade/train.py"}
    assert 1 < len(steps) <= 6, sorted(steps)
    assert "src/saccade/recipes/mae.py" in steps
    dino = text.split("## DINO, the same way")[1].split("SimCLR needs")[0]
    shared = {name for name in steps if not name.endswith(("mae.py", "vit.py"))}  # its steps 1 to 3 and 5
    assert len(shared | set(re.findall(r"`(src/saccade/[\w/]+\.py)`", dino))) <= 7
    for name, symbol in re.findall(r"`(src/saccade/[\w/]+\.py)`,? `(\w+(?:\.\w+)?)`", text):
        tree, last = ast.parse((ROOT / name).read_text(encoding="utf-8")), symbol.split(".")[-1]
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        assert last in defined, f"{name} has no {symbol}"


def test_the_changelog_tells_of_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first
    assert first[1] == saccade.__version__
