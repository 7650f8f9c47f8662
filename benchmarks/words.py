"""Recipes of pictures and words beside each other: retrieval on the test side after equal time, seed by seed.

    python benchmarks/words.py PACK --out DIR [--recipes clip,siglip,siglip2] [--lit BACKBONE] [--minutes 2] [--seeds 3]
        [--threads 1] [--dense MASKED] [--own "siglip2 --tail naflex"]... [-- --image-size 64 … for all]

PACK is a folder with train.jsonl and test.jsonl, as Flickr8k's is, or with one index.jsonl (Twemoji), which is divided
by the hash of its pictures, four to one. `--lit` adds the recipe lit on a locked backbone. Each run is an ordinary one
of so many minutes of the recipe's `small_machine`, or of the `--steps` among its own flags (lit's first steps look at
every picture once, so that they foretell nothing of the later ones); stopped, the same command goes on. What R@1, 5 and
10 are by chance stands beside. `--dense` asks a linear layer on the patches of each what every pixel of another pack
shows (`evaluate --tasks segmentation`). A difference below two paired standard errors over seeds is called none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from recipes import against

from saccade.draws import hash64

WAYS = ("image_to_text", "text_to_image")
RANKS = ("r1", "r5", "r10")


def divided(pack: Path, out: Path) -> Path:
    """The pack itself, or a folder with its index in two parts; paths in them are whole."""
    if (pack / "train.jsonl").exists():
        return pack
    rows = [json.loads(line) for line in (pack / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for row in rows:
        part = "test" if hash64(f"words {row['file']}") % 5 == 0 else "train"
        parts[part].append(json.dumps({"path": str(pack / row["file"]), "caption": row["name"]}))
    folder = out / "pack"
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def saccade(*words: str) -> dict[str, Any]:
    """What a verb prints as JSON. Ends the study where it fails."""
    done = subprocess.run([sys.executable, "-m", "saccade", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:] + done.stdout[-500:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def one_run(pack: Path, recipe: str, seed: int, asked: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Retrieval on test, and how many steps there were; from a run that is finished now if it was not before."""
    answer = asked.out / f"{recipe}-{seed}.json"
    if not answer.exists():
        run = asked.out / "runs" / answer.stem
        length = [] if "--steps" in flags else ["--minutes", str(asked.minutes)]
        length += ["--seed", str(seed), "--threads", str(asked.threads)]
        made = saccade("pretrain", str(pack / "train.jsonl"), "--recipe", f"{recipe}:small_machine", "--out", str(run),
                       "--workers", "0", *length, *flags)  # fmt: skip
        scores = saccade("evaluate", str(run), str(pack), "--tasks", "retrieval")["retrieval"]
        told = {"steps": made["steps"], "seconds": made["seconds"], "health": made["health"]["verdict"]}
        answer.write_text(json.dumps(told | scores))
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def dense(recipe: str, seed: int, asked: argparse.Namespace) -> float:
    """What a linear layer on the patches of a finished run says of pixels: mean intersection over union, percent."""
    answer = asked.out / f"{recipe}-{seed}-dense.json"
    if not answer.exists():
        run, tasks = str(asked.out / "runs" / f"{recipe}-{seed}"), ["--tasks", "segmentation", "--no-baselines"]
        answer.write_text(json.dumps(saccade("evaluate", run, str(asked.dense), *tasks)["segmentation"]))
    return float(json.loads(answer.read_text())["miou"])


def tell(found: dict[str, list[dict[str, Any]]]) -> None:
    """A row a recipe, chance below, and the first one by the mean of R@10 both ways against the others."""
    print(f"| recipe | steps | seconds | {' | '.join(f'{way} {rank}' for way in WAYS for rank in RANKS)} |")
    print(f"|---|---|---|{'---|' * 6}")
    cells = [(way, rank) for way in WAYS for rank in RANKS]
    for recipe, runs in found.items():
        means = [statistics.mean(run[way][rank] for run in runs) for way, rank in cells]
        steps, seconds = (round(statistics.mean(run[name] for run in runs)) for name in ("steps", "seconds"))
        print(f"| {recipe} | {steps} | {seconds} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    chance = next(iter(found.values()))[0]["chance"]
    print(f"| chance | | | {' | '.join(f'{chance[way][rank]:.1f}' for way, rank in cells)} |")
    ten = {name: [statistics.mean(run[way]["r10"] for way in WAYS) for run in runs] for name, runs in found.items()}
    first = max(ten, key=lambda name: statistics.mean(ten[name]))
    for name in ten:
        if name != first:
            print(f"{first} against {name}, mean of R@10 both ways: {against(ten, first, name)}")


def main() -> None:
    """The study and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default="clip,siglip,siglip2")
    parser.add_argument("--lit", help="a backbone to lock")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dense", type=Path, help="a pack with masks")
    parser.add_argument("--own", action="append", default=[], help="a recipe and flags that are its own alone")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, common = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    asked.out.mkdir(parents=True, exist_ok=True)
    pack = divided(asked.pack, asked.out)
    own = {name: flags for name, *flags in (words.split() for words in asked.own)}
    flags = {name: [*common, *own.get(name, [])] for name in asked.recipes.split(",")}
    if asked.lit:
        flags["lit"] = ["--init", asked.lit, *own.get("lit", [])]
    print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}, {asked.threads} thread(s)")
    print(f"{asked.pack}: {asked.minutes} minutes a run")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in flags}
    for seed in range(asked.seeds):
        for name, more in flags.items():
            found[name].append(one_run(pack, name, seed, asked, more))
            last = found[name][-1]
            print(f"  {name} seed {seed}: {last['steps']} steps, R@10 {last[WAYS[0]]['r10']} / {last[WAYS[1]]['r10']}, "
                  f"{last['health']}")  # fmt: skip
    tell(found)
    if asked.dense:
        seen = {name: [dense(name, seed, asked) for seed in range(asked.seeds)] for name in found}
        first = max(seen, key=lambda name: statistics.mean(seen[name]))
        for name, scores in seen.items():
            rest = "" if name == first else f"; {first} against it: {against(seen, first, name)}"
            print(f"{name}: mIoU {statistics.mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)}){rest}")


if __name__ == "__main__":
    main()
