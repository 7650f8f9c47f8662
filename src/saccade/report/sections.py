"""What a run has to show, a section each. What it cannot show has no section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from saccade import recipe
from saccade.data import Source
from saccade.encoder import Encoder
from saccade.report.charts import Chart, Line, chart, forecast, number
from saccade.report.page import Cards, Charts, Facts, Prose, Section, Table, Verdict
from saccade.report.pictures import (
    EXAMPLES,
    SMALL,
    Card,
    Gallery,
    Tile,
    attention,
    embeddings,
    features_of,
    glimpse,
    heat,
    principal,
    uri,
    views_of,
    visible,
)
from saccade.run import Run

_POOL = 512
"""Pictures among which neighbours are looked for; half of them where pictures are large."""
_NEIGHBOURS = 5
_HEADS = 6


class Measure(NamedTuple):
    """A number of metrics.jsonl and how its curve is drawn."""

    name: str
    title: str
    unit: str
    percent: bool = False
    floor: float | None = 0.0

    def drawn(
        self, entries: Sequence[Mapping[str, Any]], chance: Mapping[str, float], begins: Sequence[int]
    ) -> Chart | None:
        """Its curve, if the entries have it, with the level at which nothing is told apart and where stages begin."""
        return chart(
            self.title,
            _curve(entries, self.name),
            unit=self.unit,
            floor=self.floor,
            percent=self.percent,
            level=("tells nothing apart", float(chance[self.name])) if self.name in chance else None,
            begins=begins,
        )


_LOSS = Measure("loss", "Loss", "", floor=None)
_WAYS = (
    Measure("gradient_norm", "Gradient norm", "before clipping", floor=None),
    Measure("images_per_second", "Speed", "samples a second"),
    Measure("data_wait", "Waiting for data", "part of the time", percent=True),
)
_HEALTH = (
    Measure("rank", "Effective rank", "directions in use"),
    Measure("spread", "Spread of features", "0 all the same, 1 all ways"),
    Measure("teacher_entropy", "Entropy of the teacher", "nats"),
    Measure("prototype_use", "Prototypes in use", "part of all", percent=True),
    Measure("patch_entropy", "Entropy of the teacher, patches", "nats"),
    Measure("patch_use", "Prototypes in use, patches", "part of all", percent=True),
)
_PROBES = {"knn": "k-NN", "linear": "Linear probe"}
_TOLD = {"step", "loss", "seconds", "memory_gb", "unreadable", "health", "eval"}
_TOLD |= {measure.name for measure in (*_WAYS, *_HEALTH)}


def plural(count: int, one: str, many: str = "") -> str:
    """A count and its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} seconds" if round(seconds) != 1 else "1 second"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def _curve(entries: Sequence[Mapping[str, Any]], name: str) -> Line:
    """One number of metrics.jsonl over steps; entries without it have no say."""
    found = [entry for entry in entries if isinstance(entry.get(name), int | float)]
    return Line([entry["step"] for entry in found], [float(entry[name]) for entry in found])


def _drawn(charts: Sequence[Chart | None]) -> list[Chart]:
    return [found for found in charts if found is not None]


def _begins(run: Run) -> list[int]:
    """The steps at which a stage ended and the next one began."""
    steps = run.record.get("steps")
    if not steps:
        return []
    page = recipe.find(run.config["recipe"].partition(":")[0])
    ends = [until for until, _ in page.stages(page.config(**run.config["settings"]))]
    return [round(until * steps) for until in ends[:-1]]


def _found(run: Run) -> dict[str, Any]:
    """What was last said of its health."""
    return run.summary.get("health") or run.record.get("health") or {}


def health(run: Run) -> Section | None:
    """The verdict, what to do about it, and the figures that it stands on."""
    found = _found(run)
    entries = [{**entry, **(entry.get("health") or {})} for entry in run.metrics()]
    chance, begins = found.get("chance") or {}, _begins(run)
    curves = _drawn([measure.drawn(entries, chance, begins) for measure in _HEALTH])
    if not found and not curves:
        return None
    blocks: list[Any] = []
    if found:
        good = found["verdict"] == "healthy"
        text = found.get("advice") or ("the features use many directions, and nothing stands out." if good else "")
        word = str(found["verdict"]).replace("_", " ").capitalize()
        blocks.append(Verdict("good" if good else "bad", word, text[:1].upper() + text[1:]))
    if curves:
        blocks.append(Charts(curves))
    elif found:
        figures = [(m.title, number(float(found[m.name]))) for m in _HEALTH if found.get(m.name) is not None]
        if figures:
            blocks.append(Facts("At the end", figures))
    history = found.get("history") or []
    if len(history) > 1:
        names = list(dict.fromkeys(chain.from_iterable(history)))
        rows = [[text_of(entry.get(name)) for name in names] for entry in history]
        blocks.append(Table("How the verdict changed", [name.capitalize() for name in names], rows, folded=True))
    lede = "Is the representation alive? Effective rank counts the directions that features fill; spread says how far "
    return Section("Health", lede + "the features of different pictures are from being the same.", blocks)


def training(run: Run) -> Section | None:
    """Loss, gradient norm, speed, waiting, and whatever else the method logs."""
    entries = run.metrics()
    chance, begins = _found(run).get("chance") or {}, _begins(run)
    others = [name for name in dict.fromkeys(chain.from_iterable(entries)) if name not in _TOLD]
    more = [Measure(name, name.replace("_", " ").capitalize(), "", floor=None) for name in others[:6]]
    drawn = _drawn([measure.drawn(entries, chance, begins) for measure in (_LOSS, *_WAYS, *more)])
    if not drawn:
        return None
    steps = run.record.get("steps") or entries[-1]["step"]
    lede = (
        f"{plural(steps, 'step')}. A faint line is what was logged, a strong one its mean over the steps around; "
        "a value shows when the pointer rests on a curve."
    )
    if begins:
        lede += f" Dotted upright lines: a stage begins (after step {', '.join(map(str, begins))})."
    return Section("Training", lede, [Charts(drawn)])


def live(run: Run) -> Section | None:
    """Evaluations during training, and the best checkpoint by them."""
    entries = [
        {"step": entry["step"], **entry["eval"]} for entry in run.metrics() if isinstance(entry.get("eval"), dict)
    ]
    final = run.summary.get("eval") or []
    tested = [entry for entry in final if entry.get("part") == "test"] or (final[-1:] if not entries else [])
    drawn = _drawn([chart(words, _curve(entries, name), unit="percent, held out of train")
                    for name, words in _PROBES.items()])  # fmt: skip
    blocks: list[Any] = [Charts(drawn)] if drawn and len(entries) > 1 else []
    rows = [[f"step {entry['step']:,}", *(_percent(entry.get(name)) for name in _PROBES)] for entry in tested]
    if rows:
        blocks.append(Table("At the end, on test, in percent", ["", *_PROBES.values()], rows, numbers=True))
    if not blocks:
        return None
    best = run.record.get("best")
    said = f" The best was step {best['step']:,}: {best['value']:.1f} ({best['measure']})." if best else ""
    return Section(
        "What the features know", "Frozen features on labelled pictures; training saw no label." + said, blocks
    )


_FAULTS = {
    "missing": "no text belongs to the picture: it is set aside",
    "empty": "nothing but space: not used",
    "over-long": "more than 10,000 characters: cut there",
    "cut": "more tokens than are read: its end is not",
    "duplicate": "the same as another sample's: neither is a wrong answer for the other",
    "latin-1": "not UTF-8: read as Latin-1",
    "utf-16-le": "UTF-16, by its mark",
    "utf-16-be": "UTF-16, by its mark",
    "unreadable": "the file could not be read: set aside",
    "without a picture": "belongs to nothing: not used",
}


def texts(run: Run) -> Section | None:
    """How many texts there were, and what was wrong with them."""
    found = run.record.get("texts")
    if not found:
        return None
    lede = f"{plural(found['texts'], 'text')} of {plural(found['with_texts'], 'sample')}"
    if found["covered"] < found["samples"]:
        lede += f", among {found['covered']:,} of {found['samples']:,} that were looked at before the first step"
    rows = [
        [fault, f"{count:,}", _FAULTS.get(fault, ""), ", ".join(found["first"].get(fault, [])[:3])]
        for fault, count in found["faults"].items()
    ]
    if not rows:
        return Section("Texts", f"{lede}; nothing was wrong with them.", [])
    columns = ["", "How many", "What it is, and what is done", "The first"]
    return Section("Texts", f"{lede}. What was wrong:", [Table("What was wrong with texts", columns, rows)])


def made(shown: Mapping[str, Float[Tensor, "b c h w"]]) -> Section | None:
    """What the method makes of a batch: a card for each sample, its pictures side by side."""
    shown = {caption: images for caption, images in shown.items() if len(images)}
    if not shown:
        return None
    short = {caption: caption.partition(" (")[0] for caption in shown}
    notes = [f"{name}: {caption.partition(' (')[2].rstrip(')')}" for caption, name in short.items() if name != caption]
    count = min(EXAMPLES, *(len(images) for images in shown.values()))
    cards = [Card([Tile(uri(visible(images[place])), f"{name}, example {place + 1}", name)
                   for (caption, images), name in zip(shown.items(), short.values(), strict=True)])
             for place in range(count)]  # fmt: skip
    said = f" {'. '.join(note[:1].upper() + note[1:] for note in notes)}." if notes else ""
    return Section("What the method makes of a picture", f"From left to right: {', '.join(short.values())}.{said}",
                   [Cards(cards, least=100 * len(shown))])  # fmt: skip


def views(run: Run, source: Source) -> Section | None:
    """Pictures of the source and what the recipe's views make of them."""
    page = recipe.find(run.config["recipe"].partition(":")[0])
    config = page.stages(page.config(**run.config["settings"]))[-1][1]
    samples, batch = glimpse(page, config, source)
    first = views_of(batch, len(samples), config.channels) if samples else []
    if not first or not first[0]:
        return None
    found, each = first, len(first[0])
    for visit in range(1, max(1, 4 // each)):  # one or two views say little about what varies
        more = views_of(glimpse(page, config, source, visit)[1], len(samples), config.channels)
        found = [[*before, *now] for before, now in zip(found, more, strict=True)]
    cards = []
    for sample, some in zip(samples, found, strict=True):
        assert sample.pixels is not None  # where there are views of it
        whole = Tile(uri(visible(sample.pixels), SMALL), f"the picture {sample.key}", "picture")
        tiles = [Tile(uri(visible(view), SMALL), f"view {n + 1} of it", f"view {n + 1}") for n, view in enumerate(some)]
        rows = math.ceil((1 + len(tiles)) / 7)  # of one length
        cards.append(Card([whole, *tiles], sample.key, columns=math.ceil((1 + len(tiles)) / rows)))
    visits = max(1, 4 // each)
    often = f"{plural(each, 'view')} of each picture at a time" + (f"; here from {visits} visits" if visits > 1 else "")
    return Section("Views", f"Pictures as the model saw them. Training renders {often}.",
                   [Cards(cards, least=460)])  # fmt: skip


def maps(encoder: Encoder, gallery: Gallery | None) -> Section | None:
    """Principal components of patch features and attention of the class token, beside the pictures."""
    if gallery is None:
        return None
    images = gallery.inputs[:EXAMPLES]
    colours = principal(features_of(encoder, images))
    attended = attention(encoder, images)
    if colours is None and attended is None:
        return None
    cards = []
    for place, (key, image) in enumerate(zip(gallery.keys, images, strict=False)):
        tiles, small = [Tile(uri(visible(image)), f"the picture {key}", "picture")], []
        if colours is not None:
            tiles.append(Tile(uri(colours[place]), "principal components of its patch features as colours",
                              "patch features", coarse=True))  # fmt: skip
        if attended is not None:
            heads = attended[place]
            tiles.append(Tile(uri(heat(heads.mean(0))), "attention of the class token, mean of all heads",
                              "attention", coarse=True))  # fmt: skip
            small = [Tile(uri(heat(head)), f"attention of head {n + 1}", f"head {n + 1}", coarse=True)
                     for n, head in enumerate(heads[:_HEADS])] if len(heads) > 1 else []  # fmt: skip
        cards.append(Card(tiles, key, small))
    said = []
    if colours is not None:
        said.append(
            "Patch features: the three directions in which the patches of these pictures differ most, as red, green "
            "and blue; patches of one colour look alike to the encoder."
        )
    if attended is not None:
        said.append(
            "Attention: what the class token reads in the last block, brighter is more; each map has its own scale."
        )
    return Section("What the features see", " ".join(said), [Cards(cards, least=300)])


def neighbours(encoder: Encoder, gallery: Gallery | None) -> Section | None:
    """Some pictures of the run, and those whose embeddings are nearest."""
    if gallery is None or len(gallery.keys) < 3:
        return None
    vectors = embeddings(encoder, gallery.inputs)
    likeness = vectors @ vectors.T
    likeness.fill_diagonal_(-math.inf)
    count = min(_NEIGHBOURS, len(vectors) - 1)
    scores, rows = likeness[:EXAMPLES].topk(count, dim=1)
    cards = []
    for place in range(len(scores)):
        tiles = [_thumbnail(gallery, place, "query", "query")]
        tiles += [_thumbnail(gallery, row, f"{score:.3f}")
                  for row, score in zip(rows[place].tolist(), scores[place].tolist(), strict=True)]  # fmt: skip
        cards.append(Card(tiles, gallery.keys[place]))
    lede = (
        f"A picture on the left and, among {plural(len(vectors), 'picture')} of the run, the {count} whose embeddings "
        "are nearest, with their cosines."
    )
    return Section("Nearest neighbours", lede, [Cards(cards, least=460)])


def _thumbnail(gallery: Gallery, row: int, caption: str, mark: str = "") -> Tile:
    what = f"query: {gallery.keys[row]}" if mark else f"neighbour {gallery.keys[row]}, cosine {caption}"
    return Tile(uri(visible(gallery.inputs[row]), SMALL), what, caption, mark)


def pool(encoder: Encoder) -> int:
    """How many pictures neighbours are looked for in."""
    return _POOL if encoder.preprocess.crop <= 64 else _POOL // 2


CONTESTANTS = {"pixels": "raw pixels", "untrained": "the same network, untrained", "pretrained": "pretrained"}


def evaluation(scores: Mapping[str, Any]) -> Section:
    """The table of `saccade evaluate`: all contestants and tasks, and the paired difference from the best baseline."""
    baselines = scores.get("baselines", {})
    everyone = {"pretrained": scores, **{name: found for name, found in baselines.items() if isinstance(found, dict)}}
    counts = list(scores.get("few_label", {}))
    tasks = [task for task in _PROBES if task in scores]
    columns = ["", *(_PROBES[task] for task in tasks), *(f"{plural(int(n), 'label')} a class" for n in counts)]
    names = {**CONTESTANTS, "border": "the border of the picture alone", "group_majority": "the class of its group"}
    rows = []
    for name, found in everyone.items():
        few = found.get("few_label", {})
        cells = [*(_percent(found.get(task)) for task in tasks), *(_spread(few.get(count)) for count in counts)]
        if any(cells):
            rows.append([names.get(name, name), *cells])
    if "majority" in baselines:
        rows.append(
            ["the most frequent class", *(_percent(baselines["majority"]) for _ in tasks), *("" for _ in counts)]
        )
    gains = scores.get("differences")
    if gains:
        few = gains.get("few_label", {})
        cells = [_gain(gains.get(task)) for task in tasks] + [_gain(few.get(count)) for count in counts]
        rows.append(["gained over the best baseline", *cells])
    blocks: list[Any] = [Table("Right, in percent of the test pictures", columns, rows, numbers=True)]
    if scores.get("label_curve"):
        blocks += _more_labels(scores["label_curve"])
    if scores.get("warnings"):
        blocks.append(Prose(list(scores["warnings"])))
    split = scores["split"]
    lede = (
        f"{plural(split['train'], 'labelled picture')} to learn from, {split['test']:,} to be examined on, "
        f"{plural(split['classes'], 'class', 'classes')}. ± is the spread over draws; in the last row, two standard "
        "errors of the paired difference."
    )
    return Section("Evaluation", lede, blocks)


def _more_labels(found: Mapping[str, Any]) -> list[Any]:
    """The curve over labels and its forecast, as a sentence and a chart."""
    sentence = str(found["says"])
    sure = f" The intervals should hold what comes in {100 * found['sure']:.0f} of 100 cases." if found["at"] else ""
    measured = [(int(count), one["mean"]) for count, one in found["fitted"].items()]
    ahead = [(int(count), one["low"], one["mean"], one["high"]) for count, one in found["at"].items()]
    drawn = forecast("How many labels?", measured, ahead, unit="percent right, by labels a class")
    return [Prose([f"{sentence[:1].upper()}{sentence[1:]}.{sure}"]), Charts([drawn])]


def _percent(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else ""


def _spread(found: Mapping[str, Any] | None) -> str:
    return "{mean:.1f} ± {std:.1f}".format(**found) if found and found.get("mean") is not None else ""


def _gain(found: Mapping[str, Any] | None) -> str:
    return f"{found['mean']:+.1f} ± {found['two_standard_errors']:.1f}".replace("-", "\N{MINUS SIGN}") if found else ""


def record(run: Run) -> Section:
    """What was asked, on which data, from which weights, with which code and machine."""
    config, known, summary = run.config, run.record, run.summary
    settings = {name: value for name, value in config.get("settings", {}).items() if value is not None}
    data, initial = known.get("data", {}), known.get("initial", {})
    sessions = known.get("sessions", [])
    last = sessions[-1] if sessions else {}
    facts = [
        ("Recipe", text_of(config.get("recipe"))),
        ("Data", text_of(config.get("data"))),
        ("Samples", f"{data['samples']:,}" if "samples" in data else ""),
        ("Data fingerprint", text_of(data.get("fingerprint"))),
        ("Initial weights", _origin(initial)),
        (
            "Licence of the weights",
            ", ".join(text_of(initial[name]) for name in ("licence", "terms") if initial.get(name))
            or ("" if initial.get("weights") == "random" else "not recorded"),
        ),
        ("Set aside as unreadable", text_of(summary.get("quarantined"))),
        ("Checkpoint", text_of(summary.get("checkpoint"))),
        ("Backbone", str(run.path / "backbone") if (run.path / "backbone").is_dir() else ""),
        ("Code", _code(last)),
        ("Machine", _machine(last)),
        ("Memory at most", f"{summary['memory_gb']:.2f} GB" if "memory_gb" in summary else ""),
    ]
    columns = ("begun", "command", "code", "machine")
    rows = [(text_of(one.get("time")), " ".join(one.get("command", [])), _code(one), _machine(one)) for one in sessions]
    rest = {name: value for name, value in known.items() if name not in ("sessions", "summary")}
    return Section("Record", "What was asked, and what it ran on. The same stands in config.json and record.json.", [
        Facts("In short", [(name, value) for name, value in facts if value]),
        Facts("All settings", [(name, text_of(value)) for name, value in settings.items()], folded=True),
        Table(plural(len(sessions), "session"), columns, rows, folded=True),
        Facts("Libraries", [(name, text_of(version)) for name, version in last.get("libraries", {}).items() if version],
              folded=True),
        Facts("Everything recorded", [(name, text_of(value)) for name, value in _flat(rest)], folded=True),
    ])  # fmt: skip


def _origin(initial: Mapping[str, Any]) -> str:
    if not initial:
        return ""
    if initial.get("weights") == "random":
        return f"random, seed {initial.get('seed')}"
    return ", ".join(text_of(initial[name]) for name in ("path", "family", "hash") if initial.get(name))


def _code(session: Mapping[str, Any]) -> str:
    code = session.get("code", {})
    return (
        f"saccade {code.get('version') or ''} ({str(code.get('blake3', ''))[:12]})".replace("  ", " ") if code else ""
    )


def _machine(session: Mapping[str, Any]) -> str:
    where = session.get("gpu") or session.get("cpu")
    parts = [where, session.get("platform"), f"Python {session['python']}" if "python" in session else None]
    if session.get("cores"):
        parts.insert(1, f"{plural(session['cores'], 'core')}, {plural(session.get('threads') or 0, 'thread')}")
    return ", ".join(str(part) for part in parts if part)


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in content.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows


def text_of(value: Any) -> str:
    """A value of a JSON file as text; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(text_of, value)) if isinstance(value, list) else str(value)
