"""Two processes against a reference in one, that follows the method by hand; and what happens when one dies."""

import json
import os
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import UserError, load
from pipeline.learning.batches import Plan, _Batches, training_batches
from pipeline.models.glm import of_length
from pipeline.ops import losses
from pipeline.running import processes
from tests.conftest import ROOT, TINY, is_one_line_error

SETTINGS = ("train.processes=2", "train.batch=4", "train.iterations=3", "train.precision=fp32", "train.nel=all")

# One of the two processes: the train stage, spied upon. Keeps weights and gradients of each iteration.
WORKER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from pipeline.learning import training
from pipeline.config import from_mapping
from tests.test_processes import spoiled
import json

raw, out, fault = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
rank, iteration = int(os.environ["RANK"]), [0]
real_step, real_batches = torch.optim.AdamW.step, training.training_batches

def step(self, *args, **kwargs):
    parameters = [p for group in self.param_groups for p in group["params"]]
    found = {{"weights": [p.detach() for p in parameters], "slopes": [p.grad for p in parameters]}}
    torch.save(found, f"{{out}}/{{rank}}-{{iteration[0]}}.pt")
    iteration[0] += 1
    return real_step(self, *args, **kwargs)

def batches(views, **where):
    for i, batch in enumerate(real_batches(views, **where), where["start"]):
        if rank == 1 and i == 2 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and i == 2 and fault == "nan":
            batch["cls"][:] = float("nan")
        yield spoiled(batch, rank, i)

torch.optim.AdamW.step, training.training_batches = step, batches
import cli
from pipeline import train as stage
sys.argv = ["worker"]
app = lambda **_: stage.train(from_mapping(raw))
cli.main(app)
"""


def spoiled(batch, rank, iteration):
    """The second process without any potential object in iteration 1, without any label id in iteration 2."""
    if rank == 1 and iteration == 1:
        batch["pseudo"][:] = 0
    if rank == 1 and iteration == 2:
        batch["labels"][:], batch["pseudo"][:] = 255, 255
    return batch


def start_two(folder, cache, name, fault="none", *settings, out=None):
    """Starts the worker in two processes; returns the config and the folder of what they kept."""
    worker, out = folder / "worker.py", folder / (out or name)
    worker.write_text(textwrap.dedent(WORKER))
    out.mkdir()
    wanted = [f"runs={folder}/runs", *TINY, f"name={name}", f"cache.path={cache}", *SETTINGS, *settings]
    config = load(ROOT / "config" / "demo.yaml", wanted)
    raw = json.dumps(config.model_dump(mode="json", by_alias=True))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        patched.setattr(sys, "argv", [str(worker), raw, str(out), fault])
        processes.start(2)
    return config, out


@pytest.fixture(scope="module")
def whole(cached_demo, tmp_path_factory):
    """Three iterations of two processes that nobody disturbs."""
    return start_two(tmp_path_factory.mktemp("whole"), cached_demo, "two")


def reference_terms(section, learner, dense, batches, bank, bank_samples):
    """Terms of both processes' halves, from the method: keys gathered, num_masks averaged, the rest apart."""
    num_seen, halves = len(learner.text_seen), []
    for half, batch in zip(dense, batches, strict=True):
        size = half.shape[2:]
        labels = torch.nn.functional.interpolate(batch["labels"][:, None].float(), size, mode="nearest-exact")
        ids, _, num = losses.combined_labels(labels[:, 0].to(torch.uint8), batch["pseudo"], learner.seen_ids)
        means, present = losses.centroids(half, ids, num_seen + num)
        generated = learner.vla(means[present], batch["cls"])
        potential = generated[int(present[:num_seen].sum()) :]
        halves.append((ids, present, generated, losses.logits(half, learner.text_seen, potential)))
    num_masks = sum(losses.count_masks(ids, x.shape[1]) for ids, _, _, x in halves) / 2
    totals = []
    for rank, (half, batch) in enumerate(zip(dense, batches, strict=True)):
        ids, present, generated, x = halves[rank]
        other = batches[1 - rank]
        terms = {
            "global": losses.infonce(
                batch["cls"],
                losses.pooled(of_length(batch["cls"], section.glm_length), half),
                torch.cat([other["cls"], *bank]),
                torch.cat([other["sample"], *bank_samples]),
                batch["sample"],
                section.tau,
            ),
            "generate": losses.generate_loss(generated, learner.text_seen, present),
            "ce": losses.cross_entropy(x, ids),
            "focal": section.weights.focal * losses.focal(x, ids, num_masks),
            "dice": losses.dice(x, ids, num_masks),
        }
        totals.append(terms)
    return totals


def test_two_processes_are_the_one_process_reference(whole):
    config, out = whole
    section = config.train
    kept = [[torch.load(out / f"{rank}-{i}.pt", weights_only=True) for i in range(3)] for rank in (0, 1)]
    from pipeline.learning.training import new_run, open_accelerator

    alone = config.model_copy(update={"train": section.model_copy(update={"processes": None})})
    run = new_run(alone, open_accelerator(alone, tracks=False), "", None)
    parameters = [p for group in run.optimiser.param_groups for p in group["params"]]
    bank, bank_samples = [], []
    lines = (config.run_path / "train" / "losses.jsonl").read_text().splitlines()
    iterators = [training_batches(run.views, start=0, stop=3, process=rank, num_processes=2) for rank in (0, 1)]
    for i, line in enumerate(lines):
        with torch.no_grad():
            for mine, first, second in zip(parameters, kept[0][i]["weights"], kept[1][i]["weights"], strict=True):
                assert torch.equal(first, second), "the processes have drifted apart"
                mine.copy_(first)
        batches = [spoiled(next(batches), rank, i) for rank, batches in enumerate(iterators)]
        dense = [run.learner.student(batch["image"].float()) for batch in batches]
        totals = reference_terms(section, run.learner, dense, batches, bank, bank_samples)
        mean = {name: (totals[0][name] + totals[1][name]) / 2 for name in totals[0]}
        found = json.loads(line)
        for name, value in mean.items():
            assert found[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-5), (i, name)
        slopes = torch.autograd.grad(sum(mean.values()), parameters, allow_unused=True)
        for rank in (0, 1):
            for slope, other in zip(slopes, kept[rank][i]["slopes"], strict=True):
                if slope is None:
                    assert other is None or not other.any()
                else:
                    assert (slope - other).norm() <= 1e-5 * (1 + slope.norm())
        bank += [batch["cls"] for batch in batches]
        bank_samples += [batch["sample"] for batch in batches]


def test_a_process_that_dies_ends_the_other_and_the_same_command_resumes(whole, cached_demo, tmp_path):
    """SIGKILL of the second one before its third iteration; resumed, losses and weights to the last bit."""
    began = time.monotonic()
    with pytest.raises(UserError, match=r"process 1 of 2 was ended by signal 9.*resumes"):
        start_two(tmp_path, cached_demo, "killed", "kill", "train.checkpoint_every=1")
    assert time.monotonic() - began < 60, "the other one waited for its peer"
    config, out = start_two(tmp_path, cached_demo, "killed", "none", "train.checkpoint_every=1", out="resumed")
    assert len(list(out.glob("0-*.pt"))) < 3, "it began anew"
    found, wanted = (
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
            for line in (run.run_path / "train" / "losses.jsonl").read_text().splitlines()
        ]
        for run in (config, whole[0])
    )
    assert found == wanted
    student, undisturbed = (load_file(run.run_path / "train" / "student.safetensors") for run in (config, whole[0]))
    assert student.keys() == undisturbed.keys()
    assert all(torch.equal(student[name], undisturbed[name]) for name in undisturbed)


def test_the_one_that_failed_says_why(cached_demo, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:  # an adapter that DDP has nothing to do with
        start_two(tmp_path, cached_demo, "not-finite", "nan", "train.vla=original")
    said = capfd.readouterr().err
    assert stop.value.code == 2
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "iteration 2: global is not finite" in errors[0]
    assert "train-" in errors[0], "the batch's samples are named"


def test_processes_share_every_batch_without_loss_or_repetition():
    plan = Plan(rows=tuple(range(7)), batch=6, seed=3)
    for num in (1, 2, 3):
        parts = [list(_Batches(plan, 0, 9, process, num)) for process in range(num)]
        for iteration in range(9):
            places = [place for part in parts for place in part[iteration]]
            assert sorted(place.position for place in places) == list(range(6))
            rows = [place.row for place in sorted(places, key=lambda place: place.position)]
            assert rows == [row for row, _ in plan.items(iteration)]
    epoch = [row for iteration in range(7) for row, at in plan.items(iteration) if at == 2]
    assert sorted(epoch) == list(range(7)), "an epoch that ends inside a batch is whole all the same"


def test_a_batch_that_does_not_divide(run_cli):
    done = run_cli("train", "--set", "train.processes=2", "--set", "train.batch=5")
    assert is_one_line_error(done, "5 images", "2 processes")


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """A launcher that is killed leaves nobody behind."""
    import subprocess

    child = tmp_path / "child.py"
    child.write_text(
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pipeline.running import processes\n"
        "if not processes.is_launched(): processes.start(2)\n"
        "processes.end_with_parent()\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen([sys.executable, child])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("[01]"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    launcher.kill()
    launcher.wait()
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_rank_and_launch_are_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert not processes.is_launched()
    assert processes.is_main()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert processes.is_launched()
    assert not processes.is_main()
    assert os.environ["RANK"] == "1"
