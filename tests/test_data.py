"""From samples to deliveries: collating every kind, reading around what is damaged, and the same for any workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from saccade import data
from saccade.data import (
    Delivery,
    Failure,
    MicroBatches,
    Quarantine,
    Reader,
    Sample,
    Source,
    collate,
    common_kind,
    fingerprint,
    kind_of,
    loader,
)
from saccade.draws import Order, hash64
from saccade.errors import SaccadeError, Unreadable


class Toy(Source):
    """Small pictures whose value is their index; those of `bad` cannot be read, those of `deep` are 16 bits."""

    def __init__(self, count: int, bad: set[int] = frozenset(), deep: set[int] = frozenset()):
        self.count, self.bad, self.deep = count, bad, deep

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise Unreadable(f"k{index}", "on purpose")
        dtype = torch.uint16 if index in self.deep else torch.uint8
        return Sample(f"k{index}", torch.full((1, 3, 2 + index % 3, 4), index % 250).to(dtype))

    def origin(self, index: int) -> str:
        return "toy"


def clip(t=1, c=3, h=4, w=5, dtype=torch.uint8, key="k", texts=()) -> Sample:
    pixels = torch.from_numpy(np.random.default_rng(h * w).integers(0, 200, (t, c, h, w))).to(dtype)
    return Sample(key, pixels, texts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize(("t", "c"), [(1, 3), (1, 1), (5, 3), (1, 13), (4, 2)])
def test_collate_pads_right_and_below(dtype, t, c):
    samples = [clip(t, c, 4, 5, dtype), clip(t, c, 7, 3, dtype, key="other")]
    batch = collate(samples, seen=[2, -4], places=[9, 1])
    assert batch["pixels"].shape == (2, t, c, 7, 5) and batch["pixels"].dtype == dtype
    assert batch["pixels"].permute(0, 1, 3, 4, 2).is_contiguous(), "memory is [B T H W C]"
    assert batch["size"].tolist() == [[4, 5], [7, 3]]
    assert torch.equal(batch["pixels"][0, :, :, :4, :5], samples[0].pixels)
    assert torch.equal(batch["pixels"][1, :, :, :7, :3], samples[1].pixels)
    padding = batch["pixels"].float()
    assert padding[0, :, :, 4:].abs().sum() == 0 and padding[1, :, :, :, 3:].abs().sum() == 0
    assert batch["key"].tolist() == [hash64("k"), hash64("other")]
    assert batch["seen"].tolist() == [2, -4] and batch["place"].tolist() == [9, 1]
    assert batch.keys() == {"pixels", "size", "key", "seen", "place"}


def test_collate_texts():
    samples = [Sample("a", texts=("ünï", "two")), Sample("b", texts=("",)), Sample("c", texts=("a longer text",))]
    batch = collate(samples, seen=[0, 5, 1])
    assert (
        batch.keys() == {"text", "text_length", "text_key", "key", "seen", "place"}
        and batch["text"].dtype == torch.uint8
    )
    texts = [bytes(row[:n].tolist()).decode() for row, n in zip(batch["text"], batch["text_length"], strict=True)]
    assert texts == ["ünï", "", "a longer text"] and batch["text"][0, 5:].sum() == 0
    assert collate(samples, seen=[1, 0, 0])["text_length"].tolist()[0] == 3, "another visit, another text"
    both = collate([clip(texts=("x",)), clip(texts=("yy",))])
    assert both["text"].tolist() == [[120, 0], [121, 121]] and "pixels" in both


@pytest.mark.parametrize(
    "other",
    [clip(dtype=torch.uint16), clip(c=1), clip(t=2), clip(texts=("x",)), Sample("k", texts=("x",)), Sample("k")],
)
def test_collate_refuses_a_mixed_batch(other):
    with pytest.raises(SaccadeError, match="cannot hold both 'first'"):
        collate([clip(key="first"), other])


def test_collate_refuses_nothing_and_too_much(monkeypatch):
    with pytest.raises(SaccadeError, match="neither a picture nor a text"):
        collate([Sample("a")])
    monkeypatch.setattr(data, "CANVAS_LIMIT", 1000)
    with pytest.raises(SaccadeError, match="2 pictures on a canvas of 100x100"):
        collate([clip(h=100, w=1), clip(h=1, w=100)])


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 3)])
def test_micro_batches_cover_each_step(world, accumulate):
    ranks = [list(MicroBatches(2, 5, 24, accumulate, rank, world)) for rank in range(world)]
    assert all(len(MicroBatches(2, 5, 24, accumulate, rank, world)) == 3 * accumulate for rank in range(world))
    assert sorted(p for rank in ranks for micro in rank for p in micro) == list(range(48, 120))
    b = 24 // (world * accumulate)
    for rank, micros in enumerate(ranks):
        for number, positions in enumerate(micros):
            step, a = 2 + number // accumulate, number % accumulate
            first = step * 24 + a * world * b + rank * b
            assert positions == list(range(first, first + b))


def test_an_indivisible_batch_names_what_would_do():
    with pytest.raises(SaccadeError, match="a batch of 30 cannot be divided over 2 ranks x 4") as caught:
        MicroBatches(0, 1, 30, 4, 0, 2)
    assert (
        caught.value.hint == "use a batch of 24 or 32, or --accumulate 1, 3, 5, 15" and caught.value.path == "--batch"
    )
    with pytest.raises(SaccadeError) as caught:
        MicroBatches(0, 1, 3, 2, 0, 4)
    assert caught.value.hint == "use a batch of 8"


def stream(source, workers=0, world=1, accumulate=1, first=0, last=6, **options):
    order = Order(*source.parts(), seed=1)
    found = {}
    for rank in range(world):
        settings = {"batch": 12, "accumulate": accumulate, "rank": rank, "world": world, "workers": workers}
        for delivery in loader(source, order, first_step=first, last_step=last, **settings, **options):
            for row, place in enumerate(delivery.batch["place"].tolist()):
                height, width = delivery.batch["size"][row].tolist()
                pixels = delivery.batch["pixels"][row, :, :, :height, :width].clone()
                found[delivery.step * 12 + place] = (
                    delivery.batch["key"][row].item(), delivery.batch["seen"][row].item(), pixels.float().sum().item(),
                )  # fmt: skip
    return found


def test_the_stream_is_the_same_for_all_worlds_workers_and_starts():
    source = Toy(40, bad={3, 17, 30}, deep={5})
    whole = stream(source)
    assert sorted(whole) == list(range(72)) and len({seen for _, seen, _ in whole.values()}) > 2
    for options in ({"workers": 2}, {"world": 2, "accumulate": 3}, {"world": 3, "workers": 1}):
        assert stream(source, **options) == whole, options
    assert stream(source, first=4, workers=2) == {p: v for p, v in whole.items() if p >= 48}


def test_deliveries_say_where_they_belong():
    order = Order([40])
    source = Toy(40)
    got = list(loader(source, order, first_step=3, last_step=5, batch=12, accumulate=3, rank=1, world=2))
    assert [(delivery.step, delivery.micro) for delivery in got] == [(s, m) for s in (3, 4) for m in range(3)]
    assert [delivery.batch["place"].tolist() for delivery in got[:3]] == [[2, 3], [6, 7], [10, 11]]


def test_the_unreadable_are_replaced_and_reported():
    good, bad = stream(Toy(40)), stream(Toy(40, bad={3, 17}))
    order = Order([40], seed=1)
    damaged = {p for p in range(72) if order.at(p).index in (3, 17)}
    assert damaged and {p for p in good if good[p] != bad[p]} == damaged, "the others do not move"
    reported = [
        failure
        for delivery in loader(Toy(40, bad={3, 17}), order, first_step=0, last_step=6, batch=12, workers=2)
        for failure in delivery.unreadable
    ]
    assert {failure.position for failure in reported} == damaged
    assert set(reported) >= {Failure(f"k{order.at(p).index}", "on purpose", p, "toy") for p in damaged}


def test_a_sample_of_another_kind_is_set_aside():
    source = Toy(40, deep={4})
    assert common_kind(source) == kind_of(source[0])
    (failure,) = {
        failure[:2]
        for delivery in loader(source, Order([40]), first_step=0, last_step=4, batch=10)
        for failure in delivery.unreadable
    }
    assert failure == ("k4", "3 channels of uint16, where most samples are 3 channels of uint8")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_cannot_be_read_ends_with_a_reason(workers):
    with pytest.raises(
        SaccadeError, match=r"none of the samples that were tried can be read; the first: k.*on purpose"
    ):
        list(loader(Toy(40, bad=set(range(40))), Order([40]), first_step=0, last_step=1, batch=4, workers=workers))
    source = Toy(40)
    deliveries = loader(source, Order([40]), first_step=0, last_step=9, batch=4, workers=workers)
    source.bad = set(range(40))
    with pytest.raises(SaccadeError, match="33 samples in a row cannot be read") as caught:
        list(deliveries)
    assert "\n" not in str(caught.value), "no worker's traceback"


def test_the_reader_is_a_plain_dataset_and_can_be_spawned():
    source = Toy(40)
    reader = Reader(source, Order([40]), kind_of(source[0]), 8, 8)
    assert reader[3].key == f"k{Order([40]).at(3).index}"
    spawned = DataLoader(
        reader,
        batch_sampler=MicroBatches(0, 2, 8, 1, 0, 1),
        collate_fn=data._as_it_is,
        num_workers=1,
        multiprocessing_context="spawn",
        worker_init_fn=data._start_worker,
    )
    for got, here in zip(spawned, loader(source, Order([40]), first_step=0, last_step=2, batch=8), strict=True):
        assert torch.equal(got.batch["pixels"], here.batch["pixels"]) and got.step == here.step


def test_workers_leave_a_stop_to_the_main_process(monkeypatch):
    start = data._start_worker

    def late(number):  # as on a machine that is busy: the stop comes before the second worker has begun
        time.sleep(number)
        start(number)

    monkeypatch.setattr(data, "_start_worker", late)
    deliveries = iter(loader(Toy(4000), Order([4000]), first_step=0, last_step=60, batch=4, workers=2))
    next(deliveries)
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        workers = children.read().split()
    for name in ("INT", "TERM"):  # from another process, as a scheduler sends it
        subprocess.run(["kill", f"-{name}", *workers], check=True)
    assert len(list(deliveries)) == 59


def test_a_loop_that_an_error_left_open_does_not_keep_the_process():
    code = """
import torch
from saccade.data import Sample, Source, loader
from saccade.draws import Order
class Toy(Source):
    def __len__(self): return 100
    def __getitem__(self, index): return Sample(str(index), torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
deliveries = loader(Toy(), Order([100]), first_step=0, last_step=9, batch=4, workers=2)
next(deliveries)
raise RuntimeError("in the middle of training")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and done.stderr.endswith("in the middle of training\n")


def delivery(count: int, bad: list[str] = ()) -> Delivery:
    failures = [Failure(key, "why", 0, "here") for key in bad]
    return Delivery({"key": torch.zeros(count, dtype=torch.int64)}, failures, 0, 0)


def test_quarantine(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, max_share=0.5, samples=100)
    quarantine.note(delivery(10))
    assert not path.exists() and len(quarantine) == 0
    quarantine.note(delivery(10, ["a", "b", "a"]))
    quarantine.note(delivery(10, ["b", "\udce9"]))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["key"] for record in records] == ["a", "b", "\udce9"]
    assert records[0] | {"time": ""} == {"key": "a", "reason": "why", "source": "here", "time": ""}
    assert (len(quarantine), quarantine.reads, quarantine.failures) == (3, 35, 5)
    with path.open("a") as file:
        file.write('{"key": "cut')
    again = Quarantine(path, max_share=0.5, samples=100)
    again.note(delivery(1, ["a", "c"]))
    assert len(again) == 4 and json.loads(path.read_text().splitlines()[-1])["key"] == "c"


def test_quarantine_ends_a_run_only_above_the_share(tmp_path):
    path = tmp_path / "q.jsonl"
    early = Quarantine(path, max_share=0.1, samples=10_000)
    early.note(delivery(5, ["a", "b"]))  # too early to judge
    assert early.failures == 2
    fair = Quarantine(path, max_share=0.1, samples=100)
    for _ in range(20):
        fair.note(delivery(9, ["a"]))
    fair.note(delivery(9))
    with pytest.raises(SaccadeError, match=r"of \d+ reads failed, more than the allowed share 0\.1") as caught:
        fair.note(delivery(8, ["a", "b"] * 10))
    assert caught.value.code == 1 and caught.value.path == str(path)
    small = Quarantine(path, max_share=0.0, samples=3)
    with pytest.raises(SaccadeError):
        small.note(delivery(3, ["a"]))


def test_fingerprint_sees_every_change():
    def of(count=30, swap=None, change=None):
        class Named(Toy):
            def key(self, index):
                return f"x{index}" if index == swap else f"k{index}"

            def content(self, index):
                return b"new" if index == change else b"old%d" % index

        return fingerprint(Named(count))

    base = of()
    assert base == of() and base["samples"] == 30 and base["contents"]["covered"] == 30
    assert base["sizes"] == {**base["sizes"], "covered": 30, "bytes": 4 * 10 + 5 * 20}
    prints = {of(**change)["fingerprint"] for change in ({}, {"count": 31}, {"swap": 4}, {"change": 29})}
    assert len(prints) == 4


def test_fingerprint_of_many_is_quick():
    class Many(Toy):
        reads = 0

        def key(self, index):
            return f"k{index}"

        def size(self, index):
            return 5

        def content(self, index):
            self.reads += 1
            return b"x"

    class Swapped(Many):
        def size(self, index):
            return {3: 4, 4: 6}.get(index, 5)  # as many bytes together

    plain, swapped = fingerprint(Many(50_000)), fingerprint(Swapped(50_000))
    assert plain["sizes"]["bytes"] == swapped["sizes"]["bytes"] and plain["contents"] == swapped["contents"]
    assert plain["fingerprint"] != swapped["fingerprint"]
    source, start = Many(200_000), time.perf_counter()
    record = fingerprint(source)
    assert record["sizes"]["covered"] == 20_000 and record["contents"]["covered"] == source.reads == 256
    assert record["keys"]["covered"] == 200_000 and time.perf_counter() - start < 5


def test_a_source_answers_from_its_samples():
    source = Toy(3)
    assert (source.key(2), source.label(2), source.group(2), source.size(2)) == ("k2", None, None, 48)
    assert source.parts() == ([3], None)
