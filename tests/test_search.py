"""Search: exact, in the right order, over any number of chunks, with errors that name the way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_published_clip import _saved
from test_published_text import _model
from test_tokenizer import _clip_files

from saccade import cli, vit, weights
from saccade import search as page
from saccade.embed import embed
from saccade.errors import SaccadeError, say
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


def clip(place: Path, **changes: int) -> Path:
    """A small CLIP of transformers', with its tokenizer."""
    return _saved(_model("clip", vocab_size=521, eos_token_id=520, **changes), _clip_files(place))


def noise(root: Path, count: int) -> Path:
    root.mkdir()
    generator = np.random.default_rng(0)
    for n in range(count):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(root / f"{n}.png")
    return root


def test_the_same_index_serves_pictures_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, data = clip(tmp_path / "clip"), noise(tmp_path / "data", 9)
    made_now = embed(backbone, data, out=tmp_path / "index")
    assert (made_now.summary()["tokens"], made_now.summary()["dim"]) == (["pair"], 16)
    encoder = weights.load(backbone)
    with torch.inference_mode():
        images = encoder.pair(torch.stack([encoder.preprocess(data / f"{n}.png") for n in range(9)]))
        cosines = (encoder.text(["a photo of a cat"]) @ images.T)[0]
    hits = Index.open(tmp_path / "index").search(text="a photo of a cat", k=4)
    assert [hit.key for hit in hits] == [f"{n}.png" for n in cosines.argsort(descending=True)[:4].tolist()]
    np.testing.assert_allclose([hit.score for hit in hits], cosines.sort(descending=True).values[:4], atol=1e-5)
    hit = Index.open(tmp_path / "index").search(image=data / "3.png", k=1)[0]
    assert hit.key == "3.png" and hit.score == pytest.approx(1, abs=1e-5)
    for query in (["--text", "it is a hat"], ["--image", str(data / "5.png")], ["--key", "5.png"]):
        assert cli.main(["search", str(tmp_path / "index"), *query, "-k", "3", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["results"]) == 3 and found["query"] == {query[0].removeprefix("--"): query[1]}
        assert query[0] == "--text" or found["results"][0]["key"] == "5.png"


def test_words_beside_other_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, data = clip(tmp_path / "clip"), noise(tmp_path / "data", 5)
    alone = embed(backbone, data, out=tmp_path / "alone").search(text="a cat")
    both = embed(backbone, data, out=tmp_path / "both", tokens=("cls", "mean", "pair"))
    assert both.vectors("cls").shape == both.vectors("mean").shape == (5, 32) and both.vectors("pair").shape == (5, 16)
    assert [(hit.key, round(hit.score, 5)) for hit in both.search(text="a cat")] == [
        (hit.key, round(hit.score, 5)) for hit in alone
    ]
    assert both.search(image=data / "2.png")[0].key == "2.png"
    capsys.readouterr()
    say.cache_clear()
    both.search(text="cat " * 40)
    assert "more than the text tower reads" in capsys.readouterr().err


def test_words_that_cannot_be_looked_for(tmp_path: Path) -> None:
    data = noise(tmp_path / "data", 3)
    torch.manual_seed(0)
    model = vit.build("vit-ti/4", image_size=16, width=16, depth=1, heads=2, hidden=32)
    weights.save_backbone(tmp_path / "mute", model, {})
    with pytest.raises(SaccadeError, match=r"no text tower .*embed with a backbone that has one"):
        embed(tmp_path / "mute", data, out=tmp_path / "index").search(text="a cat")
    with pytest.raises(SaccadeError, match="no text tower"):
        embed(tmp_path / "mute", data, out=tmp_path / "other", tokens=("pair",))
    backbone = clip(tmp_path / "clip")
    with pytest.raises(SaccadeError, match=r"no pair tokens .*embed again with --tokens cls,pair"):
        embed(backbone, data, out=tmp_path / "cls", tokens=("cls",)).search(text="a cat")
    for name in ("vocab.json", "merges.txt"):
        (backbone / name).unlink()
    with pytest.raises(SaccadeError, match=r"no tokenizer .*beside the weights"):
        embed(backbone, data, out=tmp_path / "wordless").search(text="a cat")


def test_another_text_tower_is_another_backbone(tmp_path: Path) -> None:
    data = noise(tmp_path / "data", 3)
    encoder = weights.load(clip(tmp_path / "clip"))
    place = tmp_path / "run" / "backbone"
    weights.save_backbone(place, encoder.backbone, {}, encoder.text)
    embed(tmp_path / "run", data, out=tmp_path / "index").search(text="a cat")
    with torch.no_grad():
        encoder.text.projection.weight += 0.1
    weights.save_backbone(place, encoder.backbone, {}, encoder.text)
    with pytest.raises(SaccadeError, match="not the one"):
        Index.open(tmp_path / "index").search(text="a cat")
    with pytest.raises(SaccadeError, match="another backbone"):
        embed(tmp_path / "run", data, out=tmp_path / "index")


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
    with pytest.raises(SaccadeError, match="which words"):
        index.search(text=" ")
    with pytest.raises(SaccadeError, match="patches only"):
        Index.open(made(tmp_path / "patches", np.eye(12), tokens=["patches"])).search(np.ones(12))
