"""Stage one over dask: the same cache with 1, 2 and 4 workers, after a worker's death, after the scheduler's."""

import os
import subprocess
import sys

import dask
import distributed  # noqa: F401  (its defaults first: a key set before it is known takes all of them along)
import pytest

from bench import workers as bench
from bench.small_run import forkserver, small_arguments, small_config
from pipeline.cluster import cluster
from pipeline.extract import extract
from pipeline.running import engine, processes
from pipeline.running.engine import EngineError, map_shards
from tests.conftest import ROOT, is_one_line_error

SETTINGS = ("views.num=1",)  # five shards
NUM_SHARDS = 5


@pytest.fixture(scope="module", autouse=True)
def quick_workers():
    """Dask's own workers are forked off the server that the bench's are, instead of importing torch each."""
    os.chdir(ROOT)
    forkserver()
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_workers):
    """Content and manifests of one process's run."""
    config = small_config(tmp_path_factory.mktemp("whole"), *SETTINGS)
    bench.undisturbed(config, 0)
    return bench.content(config)


def test_a_killed_worker_is_replaced(whole, tmp_path):
    """--workers 2: one of the two dies after its first shard. Then --workers 1."""
    config = small_config(tmp_path, *SETTINGS)
    with bench.killed_after(config, "extract", bench.kill_process) as records_then:
        extract(config, workers=2)
    assert records_then[0] < NUM_SHARDS, "the kill came too late to test anything"
    cluster(config, workers=1)
    assert bench.content(config) == whole


def test_four_workers_and_a_lost_scheduler(whole, tmp_path, run_cli):
    """The scheduler ends after the first record; a new one at its address goes on with the same command."""
    config = small_config(tmp_path, *SETTINGS)
    with bench.Cluster(4) as farm:
        command = (*small_arguments(tmp_path, *SETTINGS), "--scheduler", farm.address)
        with bench.killed_after(config, "extract", lambda _: farm.scheduler.kill()) as records_then:
            done = run_cli("extract", *command)
        assert records_then[0] < NUM_SHARDS, "the kill came too late to test anything"
        assert is_one_line_error(done, farm.address, "same command resumes")
        assert not (config.cache_path / "extract.manifest.json").exists()
        farm.end()
        kept = bench.records(config, "extract")
        farm.start()
        done = run_cli("extract", *command)
        assert done.returncode == 0, done.stderr
        assert f"resuming, {sum(e['rows'][1] - e['rows'][0] for e in kept.values())} of 296" in done.stderr
        assert {s: bench.records(config, "extract")[s] for s in kept} == kept, "a finished shard was made again"
        assert run_cli("cluster", *command).returncode == 0
    assert bench.content(config) == whole
    assert len({entry["pid"] for entry in bench.records(config, "cluster").values()}) > 1


def test_a_shard_that_ends_every_worker(quick_workers):
    none_allowed = dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with none_allowed, pytest.raises(EngineError, match=r"ended 1 workers in a row.*same command resumes"):
        list(map_shards(os._exit, [1], workers=1))


def test_a_scheduler_that_is_not_there(tmp_path, run_cli):
    with dask.config.set({"distributed.comm.timeouts.connect": "300ms"}):
        done = run_cli("extract", *small_arguments(tmp_path), "--scheduler", "tcp://127.0.0.1:9")
    assert is_one_line_error(done, "tcp://127.0.0.1:9", "dask scheduler")
    assert is_one_line_error(
        run_cli("extract", *small_arguments(tmp_path), "--scheduler", "nowhere"), "nowhere", "tcp://host:port"
    )


def test_our_scheduler_is_closed_to_others():
    """Neither without keys nor with other keys, and nothing is told over HTTP."""
    import urllib.error
    import urllib.request

    import psutil
    from dask.distributed import Client
    from distributed.comm import CommClosedError
    from distributed.security import Security

    found = map_shards(address_of, [0, 1, 2], workers=1)
    address = next(found)
    assert address.startswith("tls://127.0.0.1:")
    for stranger in (
        {"address": address.replace("tls", "tcp")},
        {"address": address, "security": Security.temporary()},
    ):
        with pytest.raises((OSError, CommClosedError)):
            Client(**stranger, timeout="2s")
    me = psutil.Process()
    ports = {
        listening.laddr.port
        for process in (me, *me.children(recursive=True))
        for listening in process.net_connections()
        if listening.status == psutil.CONN_LISTEN
    }
    assert int(address.rpartition(":")[2]) in ports
    for port in ports:
        for path in ("info/main/workers.html", "json/counts.json", "metrics", "health"):
            with pytest.raises((urllib.error.URLError, OSError)):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=2)
    assert len(list(found)) == 2


def address_of(shard):
    from distributed import get_worker

    return get_worker().scheduler.address


def test_without_the_package_for_keys(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(EngineError, match=r"--workers: the package cryptography.*pip install cryptography"):
        list(map_shards(address_of, [1], workers=1))


def test_no_more_workers_than_cores_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    monkeypatch.setattr(processes, "available_bytes", lambda: 30e9)
    assert engine._num_workers(2) == 2
    assert capsys.readouterr().err == ""
    assert engine._num_workers(64) == 2
    assert "--workers is 64; 2 are started: 2 cores" in capsys.readouterr().err
    monkeypatch.setattr(processes, "available_bytes", lambda: 1e9)
    assert engine._num_workers(2) == 1
    assert "--workers is 2; 1 is started: 1.0 GB of memory free" in capsys.readouterr().err


def test_workers_come_and_go_without_a_word():
    """distributed tells of each start and end, several lines a worker, unless it is told not to before its import."""
    code = "from pipeline.running.engine import map_shards; print(list(map_shards(abs, [-1, -2], workers=1)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.strip()) == sorted("[1, 2]")
    assert "INFO" not in done.stderr
