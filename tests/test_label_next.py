"""What to label next: coverage by hand, doubt once there are labels, and lists that say what they should not."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import cli, coverage, label_next, vit, weights
from saccade.errors import SaccadeError
from saccade.label_next import Known, propose


def blobs(counts: list[int], width: int = 12, spread: float = 0.15, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Clusters of so many rows around orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = torch.eye(width)[: len(counts)] * 2
    return centres[labels] + spread * torch.randn(len(labels), width, generator=generator), labels


def value(unit: torch.Tensor, chosen: list[int], weight: torch.Tensor) -> float:
    return float((((unit @ unit[chosen].T - 1) / coverage.RADIUS).exp().max(dim=1).values * weight).sum())


def test_the_greedy_choice_is_that_of_trying_every_row() -> None:
    vectors, _ = blobs([30, 20, 9, 4], spread=0.6)
    unit, weight = coverage.centred(vectors), torch.rand(63, generator=torch.Generator().manual_seed(1))
    found = coverage.choose(unit, [3, 40], 8, weight=weight).rows
    chosen = [3, 40]
    for row in found:
        left = [other for other in range(63) if other not in chosen]
        assert row == max(left, key=lambda other: value(unit, [*chosen, other], weight))
        chosen.append(row)
    assert sorted({*range(63)} - {*coverage.choose(unit, [3, 40], 100).rows}) == [3, 40]  # and then there are no more


def test_every_cluster_is_stood_for_and_counted() -> None:
    vectors, labels = blobs([50, 30, 12, 8], spread=0.05)
    found = propose(vectors, Known([], []), 4)
    assert sorted(labels[found.rows]) == [0, 1, 2, 3]
    assert [found.stands_for[rank] for rank in np.argsort(labels[found.rows])] == [50, 30, 12, 8]
    assert labels[found.rows[0]] == 0 and found.between == [None] * 4
    known = Known([0, 55], ["a", "a"])  # of one class: nothing can be learned, but they are covered
    assert sorted(labels[propose(vectors, known, 2).rows]) == [2, 3]


def test_near_duplicates_are_not_proposed_twice() -> None:
    vectors, _ = blobs([6, 6])
    twice = torch.cat([vectors, vectors + 1e-4])
    found = propose(twice, Known([0], [None]), 24)
    assert len({row % 12 for row in found.rows}) == len(found.rows) == 11 and found.duplicates == 12
    assert not {0, 12} & {*found.rows}


def test_groups_give_as_many_as_each_other() -> None:
    vectors, _ = blobs([40, 40], spread=0.5)
    groups = ["one"] * 60 + ["two"] * 18 + ["three"] * 2
    given = [groups[row] for row in propose(vectors, Known([], []), 12, groups=groups).rows]
    assert sorted(given[:3]) == ["one", "three", "two"]
    assert [given.count(name) for name in ("one", "two", "three")] == [5, 5, 2]


def test_doubt_and_rare_classes_weigh_more() -> None:
    vectors, labels = blobs([200, 200, 20], spread=0.5)
    between = torch.stack([(vectors[0] + vectors[200]) / 2 + 0.02 * n * torch.eye(12)[5] for n in range(6)])
    everyone = torch.cat([vectors, between])
    rows = [*range(20), *range(200, 220), *range(400, 403)]
    known = Known(rows, [f"class {labels[row]}" for row in rows])
    with_labels = propose(everyone, known, 12)
    assert any(row >= 420 for row in with_labels.rows)
    doubtful = next(pair for row, pair in zip(with_labels.rows, with_labels.between, strict=True) if row >= 420)
    assert doubtful is not None and {doubtful[0][0], doubtful[1][0]} == {"class 0", "class 1"}
    blind = propose(everyone, Known(rows, [None] * len(rows)), 12)
    assert blind.between == [None] * 12
    rare = sum(400 <= row < 420 for row in with_labels.rows)
    assert rare > sum(400 <= row < 420 for row in blind.rows) or rare >= 3


@pytest.mark.slow
def test_a_hundred_thousand_rows_need_no_square() -> None:
    """Slow: 40 GB if anything were quadratic, and half a minute on a core."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    vectors = torch.randn(100_000, 64, generator=torch.Generator().manual_seed(0))
    assert len(set(propose(vectors, Known([0, 1], ["a", "b"]), 50).rows)) == 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights.save_backbone(tmp_path / "backbone", vit.build("vit-ti/4", image_size=16, width=16, depth=2, heads=2), {})
    return tmp_path / "backbone"


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty pictures of two colours, one exact copy, and one that is none."""
    monkeypatch.setattr(coverage, "SAME", 1e-6)  # to a network that never learned everything is alike
    random = np.random.default_rng(0)
    (tmp_path / "pool").mkdir()
    for number in range(20):
        patches = random.integers(0, 256, (4, 4, 3)) * np.eye(3, dtype=int)[number % 2]
        pixels = patches.repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pool" / f"p{number % 4}_{number:02}.png")
    (tmp_path / "pool" / "p0_copy.png").write_bytes((tmp_path / "pool" / "p0_00.png").read_bytes())
    (tmp_path / "pool" / "p1_bad.png").write_bytes(b"no picture")
    return tmp_path / "pool"


def asked(words: list[Any], capsys: pytest.CaptureFixture[str], code: int = cli.DONE) -> dict[str, Any]:
    assert cli.main(["label-next", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_round_after_round(tmp_path: Path, backbone: Path, pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list comes out, is filled in, and goes in again; a folder of labelled pictures does as well."""
    first = asked([backbone, pool, "-n", 4, "--out", tmp_path / "a.csv", "--index", tmp_path / "index"], capsys)
    assert first["by"] == "coverage" and (first["asked"], first["left"], first["quarantined"]) == (4, 21, 1)
    assert first["unreadable"][0]["key"] == "p1_bad.png"
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [line["key"] for line in first["proposed"]]
    assert list(rows[0]) == ["rank", "key", "label", "reason"] and rows[0]["label"] == ""
    assert "stands for" in rows[0]["reason"]
    page = (tmp_path / "a.html").read_text()
    assert all(row["key"] in page for row in rows) and page.count("data:image") == 4

    for row in rows[:3]:  # the fourth waits
        row["label"] = "red" if int(row["key"][3:5]) % 2 == 0 else "green"
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    more = ["--labels", tmp_path / "a.csv", "--index", tmp_path / "index", "--out", tmp_path / "b.jsonl"]
    second = asked([backbone, pool, "-n", 5, "--group-by", "(p\\d)", *more], capsys)
    assert second["labelled"]["pictures"] == 3 and second["labelled"]["waiting"] == 1
    assert not {row["key"] for row in rows[:3]} & {line["key"] for line in second["proposed"]}
    assert second["groups"] == {"all": 4, "proposed": 4}
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [line["key"] for line in second["proposed"]]

    for name, place in (("red", "p0_00"), ("green", "p1_01")):
        (tmp_path / "done" / name).mkdir(parents=True)
        content = (pool / f"{place}.png").read_bytes()
        (tmp_path / "done" / name / f"{place}.png").write_bytes(content)
    Image.new("RGB", (16, 16), (0, 200, 0)).save(tmp_path / "done" / "green" / "p0_00.png")  # a name, another picture
    third = label_next(backbone, pool, n=30, labels=tmp_path / "done")
    assert third["by"] == "coverage and doubt" and third["labelled"]["classes"] == {"green": 2, "red": 1}
    keys = [line["key"] for line in third["proposed"]]
    assert not {"p0_00.png", "p0_copy.png", "p1_01.png"} & {*keys}
    assert third["left"] == 19 and "30 were asked for" in third["warnings"][-1]
    assert any("between" in line for line in third["proposed"])


def test_bad_labels(
    tmp_path: Path,
    backbone: Path,
    pool: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = tmp_path / "labels.csv"
    listed.write_text("key,label\np0_00.png,red\nnowhere.png,red\np1_bad.png,green\np0_00.png,green\n")
    found = asked([backbone, pool, "-n", 3, "--labels", listed], capsys)
    said = " ".join(found["warnings"])
    assert found["unknown"] == {"count": 1, "first": ["nowhere.png"]} and "'nowhere.png'" in said
    assert "1 labels are of pictures that cannot be read, first 'p1_bad.png'" in said and "two labels" in said
    listed.write_text("path,class\npool/p0_00.png,red\n")  # relative to the list, and one class alone
    found = asked([backbone, pool, "-n", 3, "--labels", listed], capsys)
    assert found["by"] == "coverage" and "only the class 'red'" in found["warnings"][0]
    listed.write_text("".join(f"{path.name}\n" for path in pool.iterdir()))
    (tmp_path / "all.txt").write_text(listed.read_text())
    for words, reason in (
        (["--labels", tmp_path / "all.txt"], "every picture that can be read is labelled"),
        (["--labels", tmp_path / "none"], "there is no"),
        (["--labels", tmp_path / "labels.csv", "--out", tmp_path / "x.txt"], "no list"),
        (["--out", listed], "exists"),
        (["-n", "0"], "greater than or equal to 1"),
        (["--group-by", "(z)"], "fits no key"),
    ):
        assert reason in asked([backbone, pool, *words], capsys, cli.WRONG_USE)["error"]
    listed.write_text("key,label\np0_0.png,red\n")
    with pytest.raises(SaccadeError, match="names no picture of the data") as mistake:
        label_next(backbone, pool, labels=listed)
    assert "did you mean 'p0_0" in str(mistake.value.hint)
    monkeypatch.setattr(coverage, "SAME", 2.0)  # everything is alike
    listed.write_text("key,label\np0_00.png,red\n")
    with pytest.raises(SaccadeError, match="the 20 pictures left are near duplicates"):
        label_next(backbone, pool, labels=listed)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "p0_00.png").write_bytes((pool / "p0_00.png").read_bytes())
    with pytest.raises(SaccadeError, match="no folder for each class"):
        label_next(backbone, pool, labels=tmp_path / "flat")
