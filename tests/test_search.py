"""Search: exact, in the right order, over any number of chunks, with errors that name the way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import search as page
from saccade import vit, weights
from saccade.embed import embed
from saccade.errors import SaccadeError
from saccade.search import FORMAT, Index


def made(place: Path, vectors: np.ndarray, **changes: object) -> Path:
    """An index by hand."""
    place.mkdir()
    np.save(place / "cls.npy", vectors.astype(np.float32))
    (place / "keys.jsonl").write_text("".join(json.dumps(f"cats/né{n}.png") + "\n" for n in range(len(vectors))))
    state = {
        "format": FORMAT,
        "tokens": ["cls"],
        "dim": vectors.shape[1],
        "count": len(vectors),
        "samples": len(vectors),
    }
    state |= {"rows": len(vectors), "done": True, "quarantined": 0, "command": "saccade embed B D --out I"}
    state |= {"backbone": {"path": None, "hash": None}, "image_size": 16}
    (place / "index.json").write_text(json.dumps(state | changes))
    return place


def test_exact_cosine_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_ROWS", 64)
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((500, 12)) * generator.uniform(0.1, 9, (500, 1))
    vectors[13] = 0  # set aside: never found
    queries = generator.standard_normal((5, 12))
    found = Index.open(made(tmp_path / "index", vectors)).search_many(queries, k=20)
    with np.errstate(invalid="ignore"):
        cosine = queries @ vectors.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    cosine[:, 13] = -2
    for hits, row in zip(found, cosine, strict=True):
        nearest = np.argsort(-row)[:20]
        assert [hit.key for hit in hits] == [f"cats/né{n}.png" for n in nearest]
        np.testing.assert_allclose([hit.score for hit in hits], row[nearest], rtol=1e-5, atol=1e-6)


def test_ties_go_by_the_order_of_the_data_and_k_may_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_ROWS", 3)
    vectors = np.tile([[1.0, 0.0]], (10, 1))
    vectors[5] = 0
    index = Index.open(made(tmp_path / "index", vectors))
    assert [hit.key for hit in index.search(np.array([2.0, 0.0]), k=4)] == [f"cats/né{n}.png" for n in range(4)]
    assert len(index.search(torch.tensor([1.0, 1.0]), k=50)) == 9


def test_keys(tmp_path: Path) -> None:
    index = Index.open(made(tmp_path / "index", np.eye(12) + 0.1))
    assert index.search(key="cats/né7.png")[0].key == "cats/né7.png" == index.search("cats/né7.png", k=1)[0].key
    with pytest.raises(SaccadeError, match=r"did you mean 'cats/né7\.png'"):
        index.search("cats/ne7.png")


def test_pictures_need_the_backbone(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for n in range(6):
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / "data" / f"{n}.png")
    torch.manual_seed(0)
    model = vit.build("vit-ti/4", image_size=16, width=16, depth=2, heads=2, hidden=32)
    weights.save_backbone(tmp_path / "backbone", model, {})
    embed(tmp_path / "backbone", tmp_path / "data", out=tmp_path / "index")
    index = Index.open(tmp_path / "index")
    path = tmp_path / "data" / "3.png"
    for hits in (
        index.search(path),
        index.search(str(path)),
        index.search(image=str(path)),
        index.search(Image.open(path)),
    ):
        assert hits[0].key == "3.png" and hits[0].score == pytest.approx(1, abs=1e-5)
    with pytest.raises(SaccadeError, match="cannot be read"):
        index.search(image=tmp_path / "none.png")
    weights.save_backbone(tmp_path / "backbone", vit.ViT(model.config), {})
    with pytest.raises(SaccadeError, match="not the one"):
        Index.open(tmp_path / "index").search(path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match="no index"):
        Index.open(tmp_path / "nothing")
    with pytest.raises(SaccadeError, match="not an index"):
        Index.open(tmp_path)
    with pytest.raises(SaccadeError, match=r"not finished: 3 of 12 .*go on with: saccade embed B D"):
        Index.open(made(tmp_path / "young", np.eye(12), done=False, rows=3))
    index = Index.open(made(tmp_path / "index", np.eye(12)))
    for query, complaint in (
        (np.ones(5), r"\[Q 12\]"),
        (np.zeros(12), "length zero"),
        (np.ones((2, 12)), "search_many"),
        (None, "for what"),
    ):
        with pytest.raises(SaccadeError, match=complaint):
            index.search(query)
    with pytest.raises(SaccadeError, match="later"):
        index.search(text="a cat")
    with pytest.raises(SaccadeError, match="patches only"):
        Index.open(made(tmp_path / "patches", np.eye(12), tokens=["patches"])).search(np.ones(12))
