"""`saccade VERB [WHAT] [--flag value] [--json]`: read the words, call the verb, print what came out.

tyro knows the grammar and writes the help; pydantic says what a value may be, the same for flags, files and Python.
torch is imported only when a verb starts.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import math
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import Field, create_model
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

import saccade.recipes
from saccade import __version__
from saccade.errors import SaccadeError, nearest
from saccade.settings import (
    LENGTHS,
    AdaptArguments,
    DiagnoseArguments,
    EmbedArguments,
    EvaluateArguments,
    ExportArguments,
    FinetuneArguments,
    LabelNextArguments,
    ModelsArguments,
    PredictArguments,
    PretrainArguments,
    RunArguments,
    SearchArguments,
    Settings,
    TourArguments,
    Training,
    TuningSettings,
    checked,
    flag,
    from_file,
    words,
)

DONE, FAILED, WRONG_USE, STOPPED = 0, 1, 2, 75

Values = dict[str, Any]


@dataclass(frozen=True)
class Verb:
    """A verb's own arguments, which of them stand without a flag, and the call that does it and says what came out."""

    arguments: type[Settings]
    positional: tuple[str, ...]
    call: Callable[[Values], Mapping[str, Any]]
    show: Callable[[Mapping[str, Any]], str] | None = None


def _pretrain(values: Values) -> Mapping[str, Any]:
    from saccade.train import pretrain

    return pretrain(list(values.pop("data")), **values).summary


def _adapt(values: Values) -> Mapping[str, Any]:
    from saccade.adapt import adapt

    return adapt(list(values.pop("data")), **values).summary


def _evaluate(values: Values) -> Mapping[str, Any]:
    from saccade.evaluate import evaluate

    first, *others = values.pop("backbone")
    return evaluate([first, *others] if others else first, values.pop("labelled"), **values)


def _embed(values: Values) -> Mapping[str, Any]:
    from saccade.embed import embed

    return embed(values.pop("backbone"), list(values.pop("data")), **values).summary()


def _search(values: Values) -> Mapping[str, Any]:
    from saccade.search import Index

    query = {name: values[name] for name in ("image", "text", "key") if values.get(name) is not None}
    hits = Index.open(values["index"]).search(k=values["k"], **query)
    return {"query": query, "results": [{"key": hit.key, "score": hit.score} for hit in hits]}


def _label_next(values: Values) -> Mapping[str, Any]:
    from saccade.label_next import label_next

    return label_next(values.pop("backbone"), values.pop("data"), **values)


def _models(values: Values) -> Mapping[str, Any]:
    from saccade.published import listing

    return {"models": listing(**values)}


def _export(values: Values) -> Mapping[str, Any]:
    from saccade.export import export

    return export(values.pop("backbone"), **values)


def _finetune(values: Values) -> Mapping[str, Any]:
    from saccade.finetune import finetune

    return finetune(values.pop("backbone"), values.pop("data"), **values).summary


def _predict(values: Values) -> Mapping[str, Any]:
    from saccade.finetune import predict

    return predict(values.pop("run"), values.pop("data"), **values)


def _diagnose(values: Values) -> Mapping[str, Any]:
    from saccade.diagnose import diagnose

    return diagnose(values.pop("run"), **values)


def _tour(values: Values) -> Mapping[str, Any]:
    from saccade.tour import tour

    return tour(**values)


VERBS = {
    "tour": Verb(TourArguments, (), _tour),
    "pretrain": Verb(PretrainArguments, ("data",), _pretrain),
    "adapt": Verb(AdaptArguments, ("data",), _adapt),
    "evaluate": Verb(EvaluateArguments, ("backbone", "labelled"), _evaluate, lambda result: _scores(result)),
    "finetune": Verb(FinetuneArguments, ("backbone", "data"), _finetune, lambda result: _tuned(result)),
    "predict": Verb(PredictArguments, ("run", "data"), _predict, lambda result: _predicted(result)),
    "diagnose": Verb(DiagnoseArguments, ("run",), _diagnose, lambda result: _diagnosed(result)),
    "embed": Verb(EmbedArguments, ("backbone", "data"), _embed),
    "search": Verb(SearchArguments, ("index",), _search),
    "label-next": Verb(LabelNextArguments, ("backbone", "data"), _label_next),
    "models": Verb(ModelsArguments, ("pattern",), _models, lambda result: _catalogue(result["models"])),
    "export": Verb(ExportArguments, ("backbone",), _export),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in typed
    typed = [word for word in typed if word != "--json"]
    if typed[:1] in (["--help"], ["-h"], ["help"]):
        print(_overview())
        return DONE
    if typed[:1] == ["--version"]:
        print(__version__)
        return DONE
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill stops as Ctrl-C does
        verb, values = _understand(typed)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
            result = {"ok": True, **verb.call(values)}
    except _HelpShown:
        return DONE
    except SaccadeError as mistake:
        return _fail(mistake, as_json)
    except KeyboardInterrupt:
        return _fail(SaccadeError("stopped on request", hint="the same command goes on", code=STOPPED), as_json)
    except BrokenPipeError:  # whoever read our words has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as bug:
        traceback.print_exc()
        reason = f"{type(bug).__name__}: {' '.join(str(bug).split())}"
        return _fail(SaccadeError(reason, hint="the lines above say where", code=FAILED), as_json)
    show = verb.show or (lambda result: "\n".join(_lines(result)))
    _print(json.dumps(_plain(result)) if as_json else show(result))
    return DONE


class _HelpShown(Exception):
    """tyro has printed the help of a verb."""


def _understand(typed: list[str]) -> tuple[Verb, Values]:
    """The verb and its values. Raises `SaccadeError`: every rank reads the same words, and the first says so."""
    try:
        verb = _find(typed)
        return verb, _read(typed[0], verb, typed[1:])
    except SaccadeError as mistake:
        mistake.said_elsewhere = not _speaks()
        raise


def _find(typed: list[str]) -> Verb:
    """The verb that the first word names. Raises `SaccadeError` with the nearest one."""
    if not typed:
        raise SaccadeError("which verb?", hint=f"{', '.join(VERBS)}; saccade --help says more")
    name = typed[0]
    if name in VERBS:
        return VERBS[name]
    raise SaccadeError(f"there is no verb {name!r}", path=name, hint=nearest(name, VERBS))


def _read(name: str, verb: Verb, typed: list[str]) -> Values:
    """The typed after a verb as validated values. Raises `SaccadeError`."""
    if issubclass(verb.arguments, RunArguments):
        return _read_run(name, verb.arguments, typed)
    if verb.arguments is FinetuneArguments:
        return _read_task(name, typed)
    said = _parse(name, verb.arguments, typed, verb.arguments.model_fields, _defaults(verb.arguments))
    return dict(checked(verb.arguments, said, owner=name))


def _read_run(name: str, model: type[RunArguments], typed: list[str]) -> Values:
    """A run's arguments and its recipe's settings: flags over the file over defaults. Raises `SaccadeError`."""
    own, path = model.model_fields, _after(typed, "--config")
    given = from_file(path) if path else {}
    recipe = _after(typed, "--recipe") or str(given.get("recipe") or "")
    start = _after(typed, flag("start")) or given.get("start")
    defaults = {**_defaults(model), **dict(Training()), **given}
    fields = {**own, "config": _CONFIG, **Training.model_fields}
    if not recipe and ({"-h", "--help"} & set(typed) or ("start" in own and not start)):
        checked(model, _parse(name, model, typed, fields, defaults), owner=name)
    if not recipe and "start" in own:
        from saccade.adapt import natural

        recipe = natural(str(start))
    if not recipe:
        raise SaccadeError(f"{name} needs --recipe", path="--recipe", hint=f"choose one of: {', '.join(_recipes())}")

    from saccade.recipe import configure

    page, config = configure(recipe, _without(given, own), also=own)
    variants = f"; {page.name} has {', '.join(page.variants) or 'no variants'}"
    fields["recipe"] = FieldInfo(annotation=str, description=f"{own['recipe'].description}{variants}")
    said = _parse(name, model, typed, {**fields, **page.config.model_fields}, {**defaults, **dict(config), **given})
    said.pop("config", None)
    if any(length in said for length in LENGTHS):  # a length that is said replaces the file's
        given = _without(given, LENGTHS)
    settings = _without({**given, **said}, own)
    config = configure(recipe, settings, also=own)[1]
    arguments = checked(model, _without({**given, **said}, settings), owner=name)
    return {**dict(arguments), **{setting: getattr(config, setting) for setting in settings}}


def _read_task(name: str, typed: list[str]) -> Values:
    """The verb's arguments, its task's settings and tuning's: flags over the file. Raises `SaccadeError`."""
    own = FinetuneArguments.model_fields
    path = _after(typed, "--config")
    given = from_file(path) if path else {}
    task = _after(typed, "--task") or given.get("task")
    fields = {**own, "config": _CONFIG, **_free(TuningSettings.model_fields)}
    mode = _after(typed, "--mode") or given.get("mode") or own["mode"].default
    fresh = "--from-scratch" in typed or bool(given.get("from_scratch"))
    defaults = _defaults(TuningSettings) | TuningSettings.usual(str(mode), fresh) | _defaults(FinetuneArguments) | given
    if task is None and {"-h", "--help"} & set(typed):
        _parse(name, FinetuneArguments, typed, fields, defaults)

    from saccade.finetune.task import find

    settings = find(str(task or own["task"].default)).settings
    fields |= settings.model_fields
    said = _parse(name, FinetuneArguments, typed, fields, {**defaults, **_defaults(settings), **given})
    said.pop("config", None)
    given = {**given, **said}
    checked(FinetuneArguments, {key: value for key, value in given.items() if key in own}, owner=name)
    return given


def _free(fields: Mapping[str, FieldInfo]) -> dict[str, FieldInfo]:
    """Of tuning's settings those that the backbone and the verb do not say."""
    return _without(fields, ("arch", "image_size", "channels", "seed"))


_CONFIG = FieldInfo(annotation=str, default=None, description="YAML file with any of these settings; flags win over it")


def _after(typed: list[str], name: str) -> str | None:
    """The value of a flag that decides which flags there are."""
    for place, word in enumerate(typed):
        if word.startswith(name + "="):
            return word.partition("=")[2]
        if word == name and place + 1 < len(typed):
            return typed[place + 1]
    return None


def _without(values: Mapping[str, Any], names: Iterable[str]) -> Values:
    return {name: value for name, value in values.items() if name not in names}


def _defaults(model: type[Settings]) -> Values:
    return {name: field.get_default() for name, field in model.model_fields.items() if not field.is_required()}


def _recipes() -> list[str]:
    """As `recipe.names()`, without the torch that page imports."""
    return sorted(module.name for module in pkgutil.iter_modules(saccade.recipes.__path__))


def _parse(
    name: str, model: type[Settings], typed: list[str], fields: Mapping[str, FieldInfo], defaults: Values
) -> Values:
    """What was typed, by setting and as text. Raises `SaccadeError`, and `_HelpShown` after a help."""
    standing = words(model)
    shapes = {field: _grammar(field, info, defaults.get(field), field in standing) for field, info in fields.items()}
    grammar: Any = create_model("Grammar", **shapes)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                grammar, prog=f"saccade {name}", description=_about(model), args=typed, return_unknown_args=True
            )
    except SystemExit as end:
        if not end.code:
            raise _HelpShown from None
        lines = [line.strip("╭╮╰╯│─ ") for line in complaint.getvalue().splitlines()]
        reason = " ".join(line for line in lines[1:] if line and "--help" not in line)  # without its title and footer
        raise SaccadeError(reason or lines[0], hint=f"see saccade {name} --help") from None
    words_of = dict(parsed)
    torn = next((value for value in words_of.values() if isinstance(value, list)), None)
    if unknown and torn is not None:  # tyro gave the first word behind flags to what stands behind the list
        torn += [words_of.pop(field) for field in standing if isinstance(words_of[field], str)]
        words_of |= {field: None for field in standing if field not in words_of}
    _place(name, unknown, [flag(field) for field in fields if field not in standing], torn)
    parted = _parted(words_of, standing)
    said = {field: value for field, value in parted.items() if value not in (None, [], defaults.get(field))}
    return {field: _value(fields[field], value) for field, value in said.items()}


def _parted(parsed: Values, standing: Sequence[str]) -> Values:
    """A word that stands behind a list of words is the last of them, once there are two."""
    for one, behind in itertools.pairwise(standing):
        if isinstance(parsed[one], list) and len(parsed[one]) > 1 and parsed[behind] is None:
            parsed |= {one: parsed[one][:-1], behind: parsed[one][-1]}
    return parsed


def _place(name: str, unknown: list[str], flags: list[str], torn: list[str] | None) -> None:
    """Words that tyro left over: a misspelt flag is an error, a word behind flags joins the list it was `torn` from."""
    for word in unknown:
        if word.startswith("-"):
            wrong = word.partition("=")[0].replace("_", "-")
            hint = nearest(wrong, flags) if flags else f"see saccade {name} --help"
            raise SaccadeError(f"{name} has no setting {wrong}", path=wrong, hint=hint)
        if torn is None:
            raise SaccadeError(f"{name} has no place for {word!r}", path=word, hint=f"see saccade {name} --help")
        torn.append(word)


def _grammar(name: str, field: FieldInfo, default: Any, stands: bool) -> Any:
    """A setting as tyro reads it: a switch, or text, because pydantic judges values and a default is not a choice."""
    if field.annotation is bool:
        return Annotated[bool, tyro.conf.arg(help=field.description)], bool(default)
    hint = "(required)" if field.is_required() and default is None else f"(default: {_text(default)})"
    kind = name.upper() if stands else _kind(field.annotation)
    look = tyro.conf.arg(
        name=None if stands else flag(name).removeprefix("--"),
        metavar=kind,
        help=field.description,
        help_behavior_hint=hint,
        aliases=[f"-{name}"] if len(name) == 1 else None,
    )
    if not stands:
        return Annotated[str | None, look], None
    if get_origin(field.annotation) is tuple:
        return Annotated[list[str], look, *_POSITIONAL], Field(default_factory=list)
    return Annotated[str | None, look, *_POSITIONAL], None


_POSITIONAL: tuple[Any, ...] = get_args(tyro.conf.Positional[str])[1:]
"""tyro's mark of an argument without a flag, taken off a subscript: to type checkers it is an alias of one type."""


def _kind(annotation: Any) -> str:
    """What stands for a value in the help: INT, FLOAT, A,B for a tuple, {auto,fp32} for a choice."""
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) is tuple:
        return "A,B,..."
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return _kind(parts[0]) if parts else {str: "TEXT"}.get(annotation, annotation.__name__.upper())


def _text(default: Any) -> str:
    if default is None:
        return "not set"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _value(field: FieldInfo, said: Any) -> Any:
    """The text of a flag as pydantic takes it: `none` where a setting may be unset, commas in tuples."""
    kinds = [field.annotation, *get_args(field.annotation)]
    if not isinstance(said, str):
        return said
    if said.lower() == "none" and type(None) in kinds:
        return None
    return said.split(",") if any(kind is tuple or get_origin(kind) is tuple for kind in kinds) else said


def _about(model: type[Settings]) -> str:
    about = inspect.getdoc(model) or ""
    if issubclass(model, RunArguments):
        about += f" Recipes: {', '.join(_recipes())}; with --recipe NAME, --help lists its own settings too."
    return about + " --json prints the result as one JSON object."


def _overview() -> str:
    """The help of `saccade` itself."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {inspect.getdoc(verb.arguments)}" for name, verb in VERBS.items()]
    head = ["usage: saccade VERB [WHAT] [--flag value] [--json]", "", "Representations from unlabelled pictures.", ""]
    return "\n".join(
        [*head, *lines, "", "saccade VERB --help says what a verb takes; saccade --version which one this is."]
    )


def _plain(value: Any) -> Any:
    """A result as JSON knows it: NaN is null, a path is text, tensors and arrays are numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _plain(value.tolist())  # numpy and torch numbers


def _lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A result for eyes: one line a value, or a group of values."""
    for key, part in value.items():
        if isinstance(part, Mapping) and any(isinstance(inner, Mapping) for inner in part.values()):
            yield f"{indent}{key}"
            yield from _lines(part, indent + "  ")
        elif isinstance(part, (list, tuple)) and part and isinstance(part[0], Mapping):
            yield f"{indent}{key}"
            yield from (f"{indent}  {_short(row)}" for row in part)
        elif key != "ok" and part not in (None, [], {}):
            yield f"{indent}{key}  {_short(part)}"


def _tuned(result: Mapping[str, Any]) -> str:
    """What a task's model scores beside what must be beaten; long tables stand in the report."""
    test = {name: value for name, value in result["test"].items() if name not in ("classes", "confusion", "worst")}
    shown = {**result, "test": test}
    chosen = {name: value for name, value in result["chosen"].items() if name not in ("evaluations", "poolings")}
    return "\n".join(_lines({**shown, "chosen": chosen}))


def _predicted(result: Mapping[str, Any]) -> str:
    """What was said, without the long tables of its scores."""
    left = ("classes", "confusion", "worst")
    scores = {name: value for name, value in result.get("scores", {}).items() if name not in left}
    return "\n".join(_lines({**result, "scores": scores}))


def _diagnosed(result: Mapping[str, Any]) -> str:
    """The verdict, and a line a culprit; the pictures stand in the report."""
    lines = [result["verdict"], ""]
    for name, found in result["findings"].items():
        lines.append(f"{'->' if found['found'] else '  '} {name}: {found['reason']}")
        lines += [f"      {found['advice']}"] if found["found"] else []
    kept = ("run", "data", "right", "train", "test", "warnings", "quarantined", "seconds", "report")
    return "\n".join([*lines, "", *_lines({name: result[name] for name in kept})])


def _scores(result: Mapping[str, Any]) -> str:
    """Scores as a table, the backbone above what it must beat; below it whether it does, and how this was measured."""
    rivals = result.get("baselines", {})
    if "table" in result:
        return _compared(result)
    if "segmentation" in result:
        return _segments(result, rivals)
    if "retrieval" in result:
        return _found_by_words(result)
    if "zero_shot" in result:
        named = _named_in_words(result["zero_shot"])
        rest = {name: value for name, value in result.items() if name != "zero_shot"}
        return f"{named}\n\n{_scores(rest) if 'pooled' in rest else chr(10).join(_lines(rest))}"
    rows = {"this backbone": result}
    rows |= {name: rivals[key] for name, key in _RIVALS.items() if key in rivals}
    counts = list(result.get("few_label", {}))
    columns = [*(task for task in ("knn", "linear", "masked") if task in result), *counts]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("percent right", no_wrap=True)
    for task in columns:
        title = {"knn": "k-NN", "linear": "linear", "masked": "hidden words"}.get(
            task, f"{task} label{'s' * (task != '1')} a class"
        )
        table.add_column(title, justify="right", no_wrap=True)
    for name, scores in rows.items():
        few = scores.get("few_label", {})
        table.add_row(name, *(_score(few.get(task, scores.get(task))) for task in columns))
    differences = result.get("differences", {})
    verdicts = {**differences, **differences.get("few_label", {})}
    if verdicts:
        told = [verdicts.get(task, {}).get("verdict", "") for task in columns]
        table.add_row("than the best of these", *told)
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(table, highlight=False)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    rest = {name: value for name, value in result.items() if name not in _SHOWN_ABOVE}
    if "label_curve" in result:
        rest["more labels"] = result["label_curve"]["says"]
    if "pooled" in result:
        rest["features"] = f"{result['pooled']['chosen']}, chosen by {result['pooled']['by']}"
    blind = [
        f"{name.replace('_', ' ')} {_short(rivals[name])}" for name in ("majority", "group_majority") if name in rivals
    ]
    rest |= {"without looking": ", ".join(blind)} if blind else {}
    return "\n".join([*lines, "", *_lines(rest)])


def _compared(result: Mapping[str, Any]) -> str:
    """Several backbones and what they must beat, a row each, and the answer below."""
    tasks = [task for task in ("knn", "linear") if any(task in row for row in result["table"])]
    counts = list(dict.fromkeys(count for row in result["table"] for count in row.get("few_label", {})))
    titles = {"knn": "k-NN", "linear": "linear"} | {n: f"{n} label{'s' * (n != '1')} a class" for n in counts}
    rows = []
    for row in result["table"]:
        few = row.get("few_label", {})
        cells = [_within(row[task], row["intervals"][task]) if task in row else "" for task in tasks]
        rows.append([row["name"], row["kind"], *cells, *(_score(few.get(count)) for count in counts)])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(["percent right (95 %)", "", *(titles[name] for name in (*tasks, *counts))]):
        table.add_column(title, justify="right" if number > 1 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(table, highlight=False, markup=False)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    rest = {name: value for name, value in result.items() if name not in ("table", "answer", "answered", "backbones")}
    return "\n".join([*lines, "", result["answer"], "", *_lines(rest)])


def _within(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"


def _named_in_words(found: Mapping[str, Any]) -> str:
    """What prompts made of the classes, as a table, a line a class below it."""
    reach = [name for name in ("top1", "top5") if name in found]
    rows = [
        ["named in words", *(found[name] for name in reach)],
        ["chance", *(found["chance"][name] for name in reach)],
    ]
    rows += [["the most frequent class", found["majority"]]]
    rows += [[f"  {one['name']}", one["top1"]] for one in found["classes"].values()]
    table = _aligned(["percent right", *(name.replace("top", "top-") for name in reach)], rows)
    return f"{table}\n{found['pictures']} pictures ({found['part']}), {len(found['templates'])} prompts a class"


def _found_by_words(result: Mapping[str, Any]) -> str:
    """How often pictures and texts find each other, as a table."""
    found, ways = result["retrieval"], ("image_to_text", "text_to_image")
    rows = [[way.replace("_", " "), *found[way].values()] for way in ways]
    rows += [[f"  {way.replace('_', ' ')}, chance", *found["chance"][way].values()] for way in ways]
    rest = {name: value for name, value in result.items() if name != "retrieval"}
    rest |= {name: value for name, value in found.items() if name not in (*ways, "chance")}
    table = _aligned(["recall in percent", *(f"@{name.removeprefix('r')}" for name in found[ways[0]])], rows)
    return "\n".join([table, "", *_lines(rest)])


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first column is words, and the others scores."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for name, *scores in rows:
        table.add_row(name, *map(_score, scores))
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(table, highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _segments(result: Mapping[str, Any], rivals: Mapping[str, Any]) -> str:
    """Scores of segmentation as a table, a line a class, the backbone beside what it must beat."""
    told = {"this backbone": result} | {name: rivals[key] for name, key in _RIVALS.items() if key in rivals}
    scores = {name: found["segmentation"] for name, found in told.items()}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("percent", no_wrap=True)
    for name in scores:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("mean IoU", *(_score(found["miou"]) for found in scores.values()))
    table.add_row("pixels right", *(_score(found["pixel_accuracy"]) for found in scores.values()))
    for name in result["segmentation"]["classes"]:
        table.add_row(f"  {name}", *(_score(found["classes"][name]) for found in scores.values()))
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(table, highlight=False)
    rest = {name: value for name, value in result.items() if name not in ("segmentation", "baselines")}
    return "\n".join([*(line.rstrip() for line in captured.get().splitlines()), "", *_lines(rest)])


_RIVALS = {
    "the same untrained": "untrained",
    "raw pixels": "pixels",
    "the border's pixels": "border",
    "position": "position",
    "how often words occur": "words",
    "the commonest word": "unigram",
}
_SHOWN_ABOVE = ("knn", "linear", "masked", "few_label", "baselines", "differences", "pooled", "label_curve")


def _score(found: Any) -> str:
    if isinstance(found, Mapping):
        return "-" if found["mean"] is None else f"{found['mean']:.1f} ± {found['std']:.1f}"
    return "" if found is None else f"{found:.1f}"


def _catalogue(models: Sequence[Mapping[str, Any]]) -> str:
    """Published models as a table, and below it the terms of each licence that is not a free one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "size", "parameters", "trained on", "licence", "k-NN", "linear", "cached"):
        table.add_column(title, justify="right" if title in ("parameters", "k-NN", "linear") else "left", no_wrap=True)
    for row in models:
        scores = [
            next((f"{row['figures'][key]:.1f}{mark}" for key, mark in keys if key in row["figures"]), "")
            for keys in ([("knn", "")], [("linear", ""), ("linear_real", "*")])
        ]
        here = "yes" if row["name"] in row["cached_names"] else ", ".join(row["cached_names"])
        here = here or ("" if row["hub"] else "not on the hub")
        size, name = f"{row['parameters'] / 1e6:,.0f} M", f"{row['family']} {row['size']}"
        table.add_row(row["name"], name, size, row["data"], row["licence"], *scores, here)
    console = Console(width=1000)  # a terminal may wrap it, and a pipe keeps it whole
    with console.capture() as captured:
        console.print(table, highlight=False)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    terms = {f"{row['licence']}: {row['terms']}": None for row in models if row["terms"]}
    if not all(row["hub"] for row in models):
        terms = {"not on the hub: download the file from its authors, and give its path": None} | terms
    figures = any(row["figures"] for row in models)
    said = (
        ["", "k-NN and linear: top-1 on ImageNet-1k as published (* ImageNet-ReaL); --json names the source"]
        if figures
        else []
    )
    return "\n".join([*lines, *said, *([""] if terms and not said else []), *terms])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_short(part)}" for name, part in value.items() if part not in (None, [], {}))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value)) or "-"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _speaks() -> bool:
    """Whether this is the only process, or the first of several ranks."""
    return os.environ.get("RANK", "0") == "0"


def _print(text: str) -> None:
    """To stdout, once: of several ranks only the first speaks."""
    if _speaks():
        print(text, flush=True)


def _fail(mistake: SaccadeError, as_json: bool) -> int:
    if mistake.said_elsewhere:
        return mistake.code
    print(f"saccade: {mistake}", file=sys.stderr)
    if as_json:
        _print(json.dumps({"ok": False, "error": mistake.error, "path": mistake.path, "hint": mistake.hint}))
    return mistake.code
