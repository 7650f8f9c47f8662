"""Evaluation: exact neighbours, a true optimum, groups that are never parted, baselines that see the same draws."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import vit, weights
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate, few_label, knn, linear
from saccade.evaluate.baselines import difference, group_majority
from saccade.evaluate.features import Extracted
from saccade.evaluate.labelled import read_labelled
from saccade.evaluate.splits import few, group_names, set_apart

page = importlib.import_module("saccade.evaluate")  # the name `saccade.evaluate` is the verb


def blobs(n: int, d: int, classes: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * apart
    return centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64), labels


def test_knn_is_the_weighted_vote_by_hand() -> None:
    train, labels = blobs(60, 5, 3, 0.7)
    test, _ = blobs(40, 5, 3, 0.7, seed=1)
    found = knn.predict(train, labels, test, 3, k=7, temperature=0.1, chunk=16)
    for row, guess in zip(test, found, strict=True):
        cosines = [float(row @ other / row.norm() / other.norm()) for other in train]
        nearest = sorted(range(60), key=lambda place: -cosines[place])[:7]
        votes = [sum(np.exp(cosines[p] / 0.1) for p in nearest if labels[p] == c) for c in range(3)]
        assert int(np.argmax(votes)) == guess
    assert (found != knn.predict(train, labels, test, 3, k=1)).any()  # so k matters here


@pytest.mark.parametrize(("n", "d"), [(90, 6), (12, 40)])
@pytest.mark.parametrize("penalty", [1.0, 1e-3])
def test_the_probe_stands_where_the_gradient_is_zero(n: int, d: int, penalty: float) -> None:
    features, labels = blobs(n, d, 3, 0.5)
    features = linear.Standard.of(features)(features)
    found = linear.fit(features, labels, 3, penalty)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features @ weight + bias, labels) + penalty / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None and bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 3e-6
    assert weight.abs().max() > 1e-3  # it has learned something


def test_the_probe_solves_what_is_separable_and_chooses_on_train_alone() -> None:
    train, labels = blobs(300, 8, 3, 3.0)
    test, answers = blobs(100, 8, 3, 3.0, seed=1)
    apart = set_apart([str(n) for n in range(300)], 0.2, "hold-out")
    probed = linear.probe(train.float(), labels, test.float(), 3, apart)
    assert (probed.predicted == answers).all() and probed.held_out == 100
    spoiled = linear.probe(train.float(), labels, -test.float(), 3, apart)
    assert (spoiled.penalty, spoiled.held_out) == (probed.penalty, probed.held_out)


def test_constant_features_do_no_harm() -> None:
    train, labels = blobs(60, 4, 2, 2.0)
    train = torch.cat([train, torch.full((60, 2), 7.0, dtype=torch.float64)], 1)
    predicted = linear.fit(linear.Standard.of(train)(train), labels, 2, 1e-2).predict(linear.Standard.of(train)(train))
    assert (predicted == labels).double().mean() > 0.9


@pytest.mark.parametrize("groups", [5, 40, 3000])
def test_no_group_is_on_both_sides(groups: int) -> None:
    names = [f"patient{n * n % groups}" for n in range(3000)]
    apart = set_apart(names, 0.2, "test")
    assert not {n for n, a in zip(names, apart, strict=True) if a} & {
        n for n, a in zip(names, apart, strict=True) if not a
    }
    assert 0.05 < apart.mean() < 0.4
    mixed = np.random.default_rng(0).permutation(3000)
    assert (set_apart([names[place] for place in mixed], 0.2, "test") == apart[mixed]).all()  # the names alone decide
    assert groups == 5 or (set_apart(names, 0.2, "hold-out") != apart).any()


def test_a_giant_group_does_not_become_the_test_set() -> None:
    names = ["giant"] * 900 + [f"g{n}" for n in range(100)]
    for address in map(str, range(20)):
        apart = set_apart(names, 0.2, address)
        assert not apart[0] and apart.any()
    assert set_apart(["a"] * 5 + ["b"] * 4, 0.2, "test").tolist() == [False] * 5 + [True] * 4
    with pytest.raises(SaccadeError, match="cannot be split"):
        set_apart(["one"] * 5, 0.2, "test")


def test_group_patterns() -> None:
    assert group_names(["a/C12P3.png", "b/x.png"], r"(C\d+)") == (["C12", None], 1)
    assert group_names(["a/C12P3.png"], r"C\d+P")[0] == ["C12P"]
    for pattern, complaint in (("(C", "no regular expression"), ("Z", "fits no key")):
        with pytest.raises(SaccadeError, match=complaint):
            group_names(["a/C12P3.png"], pattern)


def test_few_draws_by_address() -> None:
    labels = np.arange(100) % 4
    keys = [f"k{n}" for n in range(100)]
    chosen = few(labels, keys, 5, seed=0, draw=2)
    assert (np.bincount(labels[chosen]) == 5).all() and len(set(chosen.tolist())) == 20
    assert set(few(labels, keys, 2, 0, 2).tolist()) < set(chosen.tolist())
    assert set(few(labels, keys, 5, 0, 3).tolist()) != set(chosen.tolist()) != set(few(labels, keys, 5, 1, 2).tolist())
    mixed = np.random.default_rng(1).permutation(100)  # the order of the data does not matter
    assert {keys[mixed[n]] for n in few(labels[mixed], [keys[n] for n in mixed], 5, 0, 2)} == {keys[n] for n in chosen}
    plan = few_label.plan(labels[:98], keys[:98], list("abcd"), 50, 0)
    assert [len(plan.draws[n]) for n in (1, 5, 10)] == [20, 20, 20] and "no class has 100" in plan.skipped[100]
    assert len(few_label.plan(labels, keys, list("abcd"), 5000, 0).draws[5]) == 5


def test_group_majority_sees_through_a_leaking_split() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1])
    groups = ["p", "p", "q", "q", "p", "q"]
    assert group_majority(labels, groups, labels, groups) == {"from_train": 100.0, "known": 100.0}
    found = group_majority(labels, groups, np.array([1, 1, 0]), ["r", "s", "s"])
    assert found["from_train"] == pytest.approx(100 / 3)  # new groups: the commonest class, 0
    assert found["known"] == pytest.approx(200 / 3)


def test_a_difference_counts_only_beyond_two_standard_errors() -> None:
    generator = np.random.default_rng(0)
    coin, better = generator.random((5, 200)) < 0.7, generator.random((5, 200)) < 0.95
    names = list(range(200))
    assert difference(coin, coin, names)["mean"] == 0 and difference(coin, coin, names)["verdict"] == "no difference"
    assert difference(better, coin, names)["verdict"] == "better"
    assert difference(coin, better, names)["verdict"] == "worse"
    ours, theirs = better[:1], coin[:1]
    repeated = difference(np.repeat(ours, 9, 1), np.repeat(theirs, 9, 1), [n // 9 for n in range(1800)])
    single = difference(ours, theirs, names)
    assert repeated["two_standard_errors"] == pytest.approx(single["two_standard_errors"])  # copies are no evidence


Plant = Callable[..., Path]


def shape(kind: int, generator: np.random.Generator) -> Image.Image:
    """A bright square on noise, left or right by class: seeing it takes no training."""
    picture = generator.integers(0, 90, (20, 20, 3), np.uint8)
    top, left = generator.integers(4, 10), 3 + 8 * kind
    picture[top : top + 6, left : left + 6] = generator.integers(160, 256, 3)
    return Image.fromarray(picture)


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    def planted(*parts: str, count: int = 12, name: str = "data") -> Path:
        generator = np.random.default_rng(0)
        for part in parts:
            for kind in range(2):
                folder = tmp_path / name / part / f"class{kind}"
                folder.mkdir(parents=True, exist_ok=True)
                for n in range(count):
                    shape(kind, generator).save(folder / f"{part}P{n % 6}_{n}.png")
        return tmp_path / name

    return planted


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = vit.build("vit-ti/4", image_size=16, width=16, depth=2, heads=2, hidden=32)
    weights.save_backbone(tmp_path / "run" / "backbone", model, {"licence": "CC0-1.0"})
    return tmp_path / "run"


def test_evaluate_says_all_that_the_interface_promises(plant: Plant, backbone: Path, tmp_path: Path) -> None:
    data = plant("train", "test", count=14)
    (data / "train" / "class0" / "broken.png").write_bytes(b"no picture")
    result = evaluate(backbone, data, out=tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert {"backbone", "data", "knn", "linear", "few_label", "baselines"} <= result.keys()
    assert list(result["few_label"]) == ["1", "5", "10", "100"]
    assert {"mean", "std"} <= result["few_label"]["10"].keys() and result["few_label"]["100"]["skipped"]
    for name in ("pixels", "untrained"):
        assert {"knn", "linear", "few_label"} <= result["baselines"][name].keys()
        assert 50 < result["baselines"][name]["linear"] <= 100  # percent
    assert result["baselines"]["untrained"]["knn"] == max(
        result["baselines"]["untrained"][n]["knn"] for n in ("cls", "mean")
    )
    assert (
        result["pooled"]["chosen"] in ("cls", "mean")
        and result["pooled"][result["pooled"]["chosen"]]["knn"] == result["knn"]
    )
    assert result["differences"]["few_label"]["5"]["verdict"] in ("better", "worse", "no difference")
    assert result["quarantined"] == 1 and result["split"]["train"] == 28 and result["split"]["test"] == 28
    assert "group_majority" not in result["baselines"] and result["baselines"]["majority"] == 50
    again = evaluate(backbone, data, tasks=("knn", "linear"))
    for key in ("knn", "linear", "split"):
        assert again[key] == result[key]
    with pytest.raises(SaccadeError, match="exists"):
        evaluate(backbone, data, out=tmp_path / "result.json")


def test_an_untrained_backbone_is_no_better_than_untrained(plant: Plant, backbone: Path) -> None:
    result = evaluate(backbone, plant("train", "test"), tasks=("knn",))
    assert "linear" not in result and "few_label" not in result
    assert result["differences"]["knn"]["verdict"] != "better"
    assert result["pooled"]["by"].startswith("knn")


def test_groups_are_kept_together_everywhere(plant: Plant, backbone: Path) -> None:
    data = plant("train", "test", count=18)
    pooled = read_labelled(data, r"(P\d)", None, 3)
    sides = [{pooled.groups[row] for row in rows} for rows in (pooled.train, pooled.test)]  # type: ignore[index]
    assert len(pooled.train) + len(pooled.test) == 72 and not sides[0] & sides[1]
    result = evaluate(backbone, data, group_by=r"(P\d)", tasks=("linear",))
    assert result["split"]["made"].startswith("by hash of the group") and "pooled" in result["split"]["made"]
    assert result["split"]["train_groups"] + result["split"]["test_groups"] == 6
    assert result["baselines"]["group_majority"].keys() == {"from_train", "known"}
    exam = page._exam(pooled, Extracted({}, pooled.train, pooled.test, []), few_label.COUNTS, seed=0)
    held = {name for name, apart in zip(exam.train_names, exam.apart, strict=True) if apart}
    kept = {name for name, apart in zip(exam.train_names, exam.apart, strict=True) if not apart}
    assert held and kept and not held & kept and held | kept == sides[0]


def test_one_level_is_split_by_key_with_a_warning(plant: Plant) -> None:
    data = plant("", count=40)
    found = read_labelled(data, None, None, 3)
    assert found.classes == ["class0", "class1"] and len(found.test) == 16 and "--group-by" in found.warnings[0]
    assert not set(found.train) & set(found.test)


def test_lists_with_label_group_and_split(plant: Plant, tmp_path: Path) -> None:
    data = plant("all", count=10)
    files = sorted(path.relative_to(tmp_path) for path in data.rglob("*.png"))
    rows = [f"{path},{path.parent.name},g{n % 5},{'val' if n % 4 == 0 else 'train'}" for n, path in enumerate(files)]
    whole = tmp_path / "list.csv"
    whole.write_text("\n".join(["path,label,group,split", *rows]))
    official = read_labelled(whole, None, None, 3)
    assert len(official.test) == 5 and "both sides" in official.warnings[0]
    grouped = read_labelled(whole, "group", None, 3)  # a column of the list, by its name
    assert grouped.groups is not None and len({grouped.groups[r] for r in grouped.test}) == 1


@pytest.mark.parametrize(
    ("parts", "match"),
    [(("train",), "only train"), (("train", "unlabelled"), "belong together|only the class|no sample")],
)
def test_data_that_cannot_be_examined(plant: Plant, parts: tuple[str, ...], match: str) -> None:
    with pytest.raises(SaccadeError, match=match):
        read_labelled(plant(*parts), None, None, 3)


def test_wrong_tasks(plant: Plant, backbone: Path) -> None:
    with pytest.raises(SaccadeError, match="did you mean 'linear'"):
        evaluate(backbone, plant("train", "test"), tasks=("liner",))
    with pytest.raises(SaccadeError, match="no task is asked for"):
        evaluate(backbone, "x", tasks=())
