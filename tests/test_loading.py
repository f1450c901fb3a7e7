"""Views kept in memory and batches made ahead: the same batches, only sooner."""

import threading

import pytest
import torch
from torch.utils.data import default_collate

from pipeline.data.base import data_of
from pipeline.learning.batches import CachedViews, Plan, _Batches, training_batches
from pipeline.learning.loading import Kept, loader_processes, made_ahead
from pipeline.running import processes


def test_kept_until_the_room_is_taken():
    # 10 bytes of room: 4 + 4 fit, the third does not and neither does it push another out; 2 still fit.
    made = []

    def make(key, size_bytes):
        made.append(key)
        return (torch.full((size_bytes,), len(made), dtype=torch.uint8),)

    kept = Kept(10)
    for key, size_bytes in (("a", 4), ("b", 4), ("c", 4), ("d", 2)) * 2:
        kept.get(key, lambda key=key, size_bytes=size_bytes: make(key, size_bytes))
    assert made == ["a", "b", "c", "d", "c"]
    assert kept.room_bytes == 0
    assert kept.get("b", lambda: make("b", 4))[0].tolist() == [2, 2, 2, 2]


def test_made_ahead_in_order_by_another_thread():
    begun, threads = [], set()

    def make(number):
        begun.append(number)
        threads.add(threading.current_thread())
        return number**2

    results = made_ahead(range(6), make, 2)
    assert begun == [], "nothing before the first is asked for"
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()  # what was not begun is given up
    assert max(begun) < 6
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads), "the thread ends with the iterator"
    assert list(made_ahead([], make)) == []


def test_an_error_is_raised_at_its_own_place():
    results = made_ahead([4, 2, 0, 1], lambda number: 8 // number)
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_the_thread_leaves_the_students_threads_alone():
    torch.set_num_threads(2)
    assert list(made_ahead([0], lambda _: torch.get_num_threads())) == [1]
    assert torch.get_num_threads() == 2


def test_batches_are_the_same_from_memory(cached_demo, tiny):
    """Two epochs of 70 images and two views: nothing kept, room for 20 views of 80 KiB, room for all."""
    settings = (f"cache.path={cached_demo}", "train.photometric=true")
    num = 2 * 70 // 4
    views = {
        gb: CachedViews(config, data_of(config.data))
        for gb in (0, 20 * 5 * 128**2 / 1e9, 1)
        for config in [tiny(*settings, f"train.views_in_memory_gb={gb}")]
    }
    never, some, everything = views.values()
    plain = [default_collate([never[p] for p in places]) for places in _Batches(plan_of(never), 0, num, 0, 1)]
    for each in (never, some, everything):
        for first in (0, 20):
            batches = list(training_batches(each, start=first, stop=num))
            for found, wanted in zip(batches, plain[first:], strict=True):
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [len(each.replayed.held) for each in (never, some, everything)] == [0, 20, 140]


def test_batches_are_the_same_from_processes(cached_demo, tiny, monkeypatch):
    """Two loader processes of each of two training processes: what a thread makes, in its order."""
    monkeypatch.setattr(processes, "cores", lambda: 4)
    settings = (f"cache.path={cached_demo}", "train.photometric=true")
    batches = {}
    for workers in (0, 2):
        config = tiny(*settings, f"train.workers={workers}")
        batches[workers] = [
            list(training_batches(views, start=3, stop=8, process=process, num_processes=2))
            for process in (0, 1)
            for views in [CachedViews(config, data_of(config.data))]
        ]
    for made, wanted in zip(batches[2], batches[0], strict=True):
        assert len(made) == len(wanted) == 5
        for one, other in zip(made, wanted, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in other)


def plan_of(views):
    return Plan(views.rows, views.config.train.batch, views.config.train.seed)


def test_how_many_loader_processes(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loader_processes(None, 1, fits=False) == 0, "the student has the cores"
    assert loader_processes(3, 1, fits=True) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loader_processes(None, 1, fits=True) == 0
    assert loader_processes(None, 1, fits=False) == 8
    assert loader_processes(None, 4, fits=False) == 3
    assert loader_processes(None, 16, fits=False) == 0
    assert loader_processes(0, 1, fits=False) == 0


def test_no_more_loaders_than_cores_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    monkeypatch.setattr(processes, "available_bytes", lambda: 30e9)
    assert loader_processes(2, 1, fits=True) == 2
    assert capsys.readouterr().err == ""
    assert loader_processes(64, 1, fits=False) == 2
    assert "train.workers is 64; 2 are started: 2 cores" in capsys.readouterr().err
    assert loader_processes(64, 2, fits=False, is_main=False) == 1
    assert capsys.readouterr().err == "", "one of the training processes says it"
    # 2.2 GB hold three of 0.45 + 0.25 GB; 1 GB, for two training processes, not one each.
    monkeypatch.setattr(processes, "cores", lambda: 16)
    monkeypatch.setattr(processes, "available_bytes", lambda: 2.2e9)
    assert loader_processes(64, 1, fits=False, kept_bytes=250_000_000) == 3
    assert "3 are started: 2.2 GB of memory free, 0.70 GB for each" in capsys.readouterr().err
    monkeypatch.setattr(processes, "available_bytes", lambda: 1e9)
    assert loader_processes(4, 2, fits=False, kept_bytes=250_000_000) == 0
    assert "batches are made by a thread: 1.0 GB of memory free" in capsys.readouterr().err


def test_a_containers_memory_is_what_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "CGROUP", tmp_path)
    machine = processes.available_bytes()
    assert machine > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("40\n")
    assert processes.available_bytes() == pytest.approx(machine, rel=0.5)
    (tmp_path / "memory.max").write_text("100\n")
    assert processes.available_bytes() == 60
