"""Masked words on real texts: what `mlm` learns of installed packages' documentation in a stated time, seed by seed.

    python benchmarks/mlm.py --out DIR [--minutes 5 | --steps N] [--seeds 3 | --only SEED] [--threads 1]
        [--texts DIR] [--roots SITE_PACKAGES /usr/share/doc ...] [-- --text-width 192 … flags of pretrain]

Texts are .rst, .md and .txt files, the descriptions of distributions, and the docstrings of each module, once each,
without licences and vendored copies, by package; they are collected into `--texts` where it does not hold them yet. A
third of the packages, by hash of the name, is held out: no word of theirs is learned from. On these, hidden words are
guessed (beside the commonest word and the same method untrained), and a layer on frozen features tells which package a
text is from (beside the untrained tower and how often each word occurs). Each run is an ordinary one of
`mlm:small_machine`, and each finished seed a file of JSON: the same command goes on. Differences below two standard
errors are none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recipes import against
from words import saccade

from saccade.draws import hash64

SUFFIXES = {".rst", ".md", ".txt"}
SKIPPED = re.compile(
    r"licen[cs]e|copying|notice|authors|contributors|copyright|record$|top_level|entry_points|sources\.txt|requires|"
    r"cmakelists|vocab|_vendor|vendored|/tests?/|/data/|corpus|/corpora/"
)
DOCSTRING = re.compile(r'(?:\A|:[ \t]*\n)\s*[rR]?"""(.*?)"""', re.DOTALL)
SHORTEST, LONGEST = 300, 1 << 16
"""Bytes of a text: shorter ones say little, and of longer ones so much is kept."""
WHOLE = 6 << 20
"""Bytes of a package that are learned from at most, so that no single one is most of the texts."""
PROBED, SIDE = 40, 60
"""A held-out package is a class with so many texts, and gives so many to either side at most."""
MODELS = ("trained", "untrained", "words")


def package_of(path: Path, root: Path) -> str:
    """The first folder (or module) below a root, as one name for a package and what describes its distribution."""
    name = path.relative_to(root).parts[0].lower()
    name = re.split(r"-\d[^-]*\.(dist|egg)-info$", name)[0].removesuffix(".py")
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"^python3?-|-(doc|common|dev|base|bin)$", "", name)).strip("_")


def docstrings(source: str) -> str:
    """Those of a module and all that is in it, one after the other, found by where they stand: parsing is slow."""
    return "\n\n".join(re.sub(r"\n[ \t]+", "\n", found.strip()) for found in DOCSTRING.findall(source))


def texts_of(root: Path) -> Iterator[tuple[str, str, str]]:
    """Package, a name and the text of everything that documents it below a folder."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if SKIPPED.search(name.lower()) or not path.is_file() or path.is_symlink():
            continue
        described = path.name == "METADATA"
        if path.suffix.lower() not in SUFFIXES | {".py"} and not described:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".py":
                text = docstrings(text)
            elif described:
                text = text.partition("\n\n")[2]
        except (OSError, ValueError):
            continue
        yield package_of(path, root), name, text.strip()[:LONGEST]


def collect(roots: list[Path], out: Path) -> dict[str, Any]:
    """Writes learn/PACKAGE/ and probe/{train,test}/PACKAGE/, and says what there is."""
    if (out / "collected.json").exists():
        found: dict[str, Any] = json.loads((out / "collected.json").read_text())
        return found
    packages: dict[str, dict[str, str]] = defaultdict(dict)
    seen = set()
    for root in roots:
        for package, name, text in texts_of(root):
            same = hash64(re.sub(r"\W+", " ", text).lower())
            if len(text.encode()) >= SHORTEST and same not in seen:
                seen.add(same)
                packages[package][f"{hash64(f'{root} {name}') % 2**32:08x}.txt"] = text
    counts = {"packages": 0, "texts": 0, "bytes": 0, "probe": {}, "roots": [str(root) for root in roots]}
    for package, texts in sorted(packages.items()):
        if hash64(f"held out {package}") % 3 == 0:
            if len(texts) >= PROBED:
                counts["probe"][package] = _probe(out / "probe", package, texts)
            continue
        taken = 0
        for name, text in sorted(texts.items()):
            if (taken := taken + len(text.encode())) > WHOLE:
                break
            _write(out / "learn" / package / name, text)
            counts["texts"] += 1
            counts["bytes"] += len(text.encode())
        counts["packages"] += 1
    (out / "collected.json").write_text(json.dumps(counts, indent=1))
    return counts


def _probe(out: Path, package: str, texts: dict[str, str]) -> dict[str, int]:
    sides: dict[str, list[str]] = {"train": [], "test": []}
    for name in sorted(texts):
        side = sides["test" if hash64(f"side {name}") % 2 else "train"]
        if len(side) < SIDE:
            side.append(name)
    for side, names in sides.items():
        for name in names:
            _write(out / side / package / name, texts[name])
    return {side: len(names) for side, names in sides.items()}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def one_run(texts: Path, seed: int, asked: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Scores on held-out packages, and how many steps there were; from a run that is finished now if not before."""
    answer = asked.out / f"seed-{seed}.json"
    if not answer.exists():
        run = asked.out / "runs" / str(seed)
        length = ["--steps", str(asked.steps)] if asked.steps else ["--minutes", str(asked.minutes)]
        length += ["--seed", str(seed), "--threads", str(asked.threads), "--workers", "0"]
        made = saccade("pretrain", str(texts / "learn"), "--recipe", "mlm:small_machine", "--out", str(run), *length,
                       *flags)  # fmt: skip
        scores = saccade(
            "evaluate", str(run), str(texts / "probe"), "--tasks", "knn,linear,masked", "--seed", str(seed)
        )
        told = {name: made[name] for name in ("steps", "seconds", "loss")} | {"health": made["health"]["verdict"]}
        answer.write_text(json.dumps(scores | told))
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def tell(runs: list[dict[str, Any]]) -> None:
    """What is guessed of hidden words, and what the probes score, in percent: means over seeds and their spread."""
    masked = {name: [run["baselines"][name]["masked"] for run in runs] for name in ("untrained", "unigram")}
    masked["trained"] = [run["masked"] for run in runs]
    for task in ("masked", "knn", "linear"):
        scores = masked
        if task != "masked":
            scores = {name: [(run if name == "trained" else run["baselines"][name])[task] for run in runs]
                      for name in MODELS}  # fmt: skip
        row = (
            f"{name} {statistics.mean(each):.1f} ({min(each):.1f} to {max(each):.1f})" for name, each in scores.items()
        )
        print(f"{task:7} " + "  ".join(row))
        if len(runs) > 1:
            for rival in scores.keys() - {"trained"}:
                print(f"        trained against {rival}: {against(scores, 'trained', rival)}")
    print(f"        the most frequent class {runs[0]['baselines']['majority']:.1f}")


def main() -> None:
    """The study and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="where texts are, or are collected; DIR/texts if not given")
    parser.add_argument("--roots", type=Path, nargs="*",
                        default=[Path(sysconfig.get_paths()["purelib"]), Path("/usr/share/doc")])  # fmt: skip
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="one seed")
    parser.add_argument("--threads", type=int, default=1)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    asked.out.mkdir(parents=True, exist_ok=True)
    texts = asked.texts or asked.out / "texts"
    counts = collect([root for root in asked.roots if root.is_dir()], texts)
    print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}, {asked.threads} thread(s)")
    print(f"{counts['texts']:,} texts ({counts['bytes'] / 1e6:.1f} MB) of {counts['packages']} packages to learn from; "
          f"held out: {len(counts['probe'])} packages, {counts['probe']}")  # fmt: skip
    runs = []
    for seed in range(asked.seeds) if asked.only is None else [asked.only]:
        runs.append(one_run(texts, seed, asked, flags))
        last = runs[-1]
        print(f"  seed {seed}: {last['steps']} steps, {last['seconds']:.0f} s, hidden words {last['masked']}, "
              f"knn {last['knn']}, linear {last['linear']}, {last['health']}", flush=True)  # fmt: skip
    tell(runs)


if __name__ == "__main__":
    main()
