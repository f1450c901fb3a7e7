"""Stage two: any segmenter, trained from the shards alone.

    python cli.py train --config config/demo.yaml                            one process
    python cli.py train --config config/demo.yaml --set train.processes=2    two, on CPU or GPU
    accelerate launch --multi_gpu --num_processes 2 cli.py train ...         the same, started by accelerate

The teacher isn't here: CLS tokens, pseudo labels and view boxes come from the cache, images and
seen labels from the data set. The student is handed T_seen alone; the text table of all classes
only travels into the checkpoint, for `eval` and `predict`.

Whatever iteration t draws (its images, their flips and colours, the student's dropout) is a function
of (seed, t): a resumed run goes on as the uninterrupted one would have.

Axes: B images, C channels, H x W loss grid.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cache.ledger import reading, write_manifest
from pipeline.config import Config, version
from pipeline.data.base import data_of
from pipeline.learning.batches import CachedViews, training_batches
from pipeline.learning.checkpoint import BEST, LAST, ended, save_checkpoint, save_student
from pipeline.learning.claims import claim, training_in
from pipeline.learning.journal import Clock, Curve, note, peak_memory_bytes, peak_resident_bytes
from pipeline.learning.memory import Forecast, views_to_keep
from pipeline.learning.objective import OBJECTIVES
from pipeline.learning.training import (
    Run,
    TrainError,
    batches_of,
    new_run,
    open_accelerator,
    prepare,
    resume,
    schedule,
    state_of,
)
from pipeline.learning.validation import seen_miou
from pipeline.looking.pictures import pictures, show
from pipeline.running.console import console, mention, progress, say
from pipeline.running.manifests import asked_of, found_manifest, manifest_path, required_manifest, save_config
from pipeline.running.processes import LOST_S, end_with_parent
from pipeline.running.rows import check_current
from pipeline.running.table import fingerprint, labels_stage

TRIAL_ITERATIONS = 10  # of a dry run
# What torch.distributed says when a peer is gone: gloo, NCCL and the store have no error class in common.
PEER_IS_GONE = re.compile(r"(?i)gloo|nccl|connection (closed|reset)|broken pipe|process group|peer")


def train(config: Config) -> dict[str, Any]:
    """Trains to the configured iteration, resuming from the last checkpoint; returns the manifest.

    Raises: MissingCache, StaleCache, CorruptShard, DataError, StudentError, TrainError (a loss that isn't
    finite, a process that is gone, a batch that doesn't divide, a tracker that isn't there), RunBusy.
    """
    end_with_parent()
    data = data_of(config.data)  # what is wrong with it is said before what is stale
    above = required_manifest(config, labels_stage(config))
    extracted = required_manifest(config, "extract")
    facts = {"classes": data.classes, "unseen": data.unseen, "text": extracted["text"]}
    identity = fingerprint(config, "train", above["content"], facts)
    accelerator = open_accelerator(config)
    is_main = accelerator.is_main_process
    with ExitStack() as stack:
        if is_main:
            check_current(config.cache_path, labels_stage(config), data, str(above["fingerprint"]))
        manifest = found_manifest(config, "train")
        accelerator.wait_for_everyone()
        if manifest is not None and manifest.get("fingerprint") == identity:
            return _nothing_to_do(config, manifest, is_main)
        if is_main:
            stack.enter_context(training_in(config.run_path))
            stack.enter_context(reading(config.cache_path))
            claim(config.run_path, identity)
        accelerator.wait_for_everyone()
        found = ended(config.run_path / "train" / LAST, identity)
        if found is not None:  # its manifest was taken away
            return _nothing_to_do(config, found, is_main)
        if is_main:
            save_config(config)
        return _trained(config, accelerator, identity, above["content"])


def _nothing_to_do(config: Config, manifest: dict[str, Any], is_main: bool) -> dict[str, Any]:
    if is_main:
        path, manifest = manifest_path(config, "train"), manifest | asked_of(config, "train")
        if found_manifest(config, "train") != manifest:
            write_manifest(path, manifest)
        mention(f"train: nothing to do, {manifest.get('iterations')} iterations are in {config.run_path / 'train'}")
    return manifest


def _trained(config: Config, accelerator: Accelerator, identity: str, labels: str) -> dict[str, Any]:
    """The training itself, in all processes; `labels` is the content of the cache's labels."""
    run = new_run(config, accelerator, identity, labels)
    resume(run)
    prepare(run)
    accelerator.init_trackers("losses")
    try:
        iterations = _loop(run)
        accelerator.wait_for_everyone()
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not PEER_IS_GONE.search(str(error)):
            raise
        time.sleep(LOST_S)  # whoever started the processes ends this one meanwhile, and knows more
        raise TrainError(
            f"process {accelerator.process_index}: another of the {accelerator.num_processes} training "
            "processes is gone. The last checkpoint stands, and the same command resumes from it."
        ) from None
    if (required_manifest(config, labels_stage(config))["content"]) != labels:
        raise TrainError(
            f"{config.cache_path}: its labels were made again while training read them, so this student is of neither. "
            "Run `cli.py train` again."
        )
    validation = config.train.validation
    manifest = {
        "stage": "train",
        "fingerprint": identity,
        **asked_of(config, "train"),
        "version": version(),
        "upstream": labels,
        "classes": list(run.checkpoint.classes),
        "unseen": list(run.checkpoint.unseen),
        "iterations": iterations,
        "processes": accelerator.num_processes,
        "student": BEST if validation.fraction and validation.use == "best" else LAST,
    }
    if validation.fraction:
        manifest["validation"] = asdict(run.best)
    if accelerator.is_main_process:
        save_student(run.folder / LAST, run.student, replace(run.checkpoint, manifest=manifest))
        write_manifest(manifest_path(config, "train"), manifest)
    accelerator.end_training()
    return manifest


def _loop(run: Run) -> int:
    """The iterations; returns how many were done. A story of batches, steps and what is kept of them."""
    section, accelerator, is_main = run.config.train, run.accelerator, run.accelerator.is_main_process
    batches = batches_of(run, section.iterations)
    curve = Curve(run.folder, run.start) if is_main else None
    clock, done, is_last = Clock(), run.start, run.start >= section.iterations
    unseen = nullcontext(lambda count, note=None: None)  # the progress of a process that nobody looks at
    bar = progress("train", section.iterations, done=run.start, unit="it") if is_main else unseen
    with bar as advance:
        while not is_last:
            values, terms = _step(run, next(batches), done, clock)
            done += 1
            is_last = done == section.iterations
            if section.validation.fraction and (done % section.validation.every == 0 or is_last):
                is_last |= _validate(run, done)
                clock.mark("validation")
            if done % section.log_every == 0 or is_last:
                values = _mean(accelerator, values) | clock.shares()
                values["lr"] = run.optimiser.param_groups[0]["lr"]
                values["time/elapsed_s"] = clock.elapsed_s()
                if section.validation.fraction:
                    values["best_mIoU_S"] = run.best.score
                accelerator.log(values, step=done)
                if curve:
                    curve.write(done, values)
            speed = (done - run.start) * section.batch / max(clock.elapsed_s(), 1e-9)
            advance(1, note=note(terms, speed, console.width) if done % 10 == 0 or is_last else None)
            if is_main and section.pictures_every and (done % section.pictures_every == 0 or is_last):
                show(accelerator.trackers, pictures(run.learner, run.student, run.views), done)
                clock.mark("pictures")
            if is_main and done % section.checkpoint_every == 0 and not is_last:
                save_checkpoint(run.folder, done, run.checkpoint, run.student, state_of(run), keep=section.keep)
                clock.mark("checkpoints")
    if curve:
        curve.close()
        mention(f"train: time {clock.line()}")
    return done


def _step(
    run: Run, batch: dict[str, Tensor], iteration: int, clock: Clock
) -> tuple[dict[str, float], dict[str, float]]:
    """One iteration: features, terms, backward, schedule. What is worth a curve, and the loss terms alone."""
    section, accelerator, learner = run.config.train, run.accelerator, run.learner
    torch.manual_seed(_draw(section.seed, iteration, accelerator.process_index))
    batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
    clock.mark("data")
    images = batch["image"].float()
    if section.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        dense = learner.student(images)  # (B, C, H, W)
    clock.mark("forward")
    terms, counts = OBJECTIVES[run.config.recipe](section, learner, dense, batch, accelerator)
    stacked = torch.stack(list(terms.values()))
    values = dict(zip(terms, stacked.tolist(), strict=True))
    clock.mark("losses")
    _stop_if_not_finite(values, iteration, run.views, batch)
    run.optimiser.zero_grad()
    accelerator.backward(stacked.sum())
    clock.mark("backward")
    for group in run.optimiser.param_groups:
        group["lr"] = group["initial_lr"] * schedule(section, iteration)
    run.optimiser.step()
    clock.mark("optimiser")
    return values | counts | {"total": sum(values.values())}, values


def _draw(seed: int, iteration: int, process: int) -> int:
    """The seed of all that an iteration draws in one process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{iteration}/{process}".encode(), digest_size=7).digest())


def _mean(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """Values averaged over the processes."""
    if accelerator.num_processes == 1:
        return values
    stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))


def _validate(run: Run, done: int) -> bool:
    """Scores the student, keeps the best one; whether training should end. One process scores for all."""
    section, accelerator, learner = run.config.train.validation, run.accelerator, run.learner
    score = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    if accelerator.is_main_process:
        score += seen_miou(run.student, run.views, learner.text_seen, learner.seen_ids)
    is_better = run.best.better(float(accelerator.reduce(score)), done)
    if is_better and accelerator.is_main_process:
        save_student(run.folder / BEST, run.student, run.checkpoint)
    ends = 0 < section.patience <= run.best.num_worse
    if ends and accelerator.is_main_process:
        say(
            f"train: ends at iteration {done}; the best was mIoU(S) {run.best.score:.1f} on held-out images at "
            f"iteration {run.best.iteration}"
        )
    return ends


def _stop_if_not_finite(values: dict[str, float], iteration: int, views: CachedViews, batch: dict[str, Tensor]) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        names = ", ".join(views.samples[int(row)].id for row in batch["sample"])
        raise TrainError(
            f"iteration {iteration}: {', '.join(bad)} is not finite (batch: {names}). The last checkpoint stands; "
            "lower train.lr, or train without mixed precision."
        )


def plan(config: Config) -> None:
    """Says what training will do and cost, from ten steps whose results are thrown away; writes nothing.

    Several processes: one process's share of each batch.
    """
    above = required_manifest(config, labels_stage(config))
    section, num = config.train, config.train.processes or 1
    run = new_run(config, open_accelerator(config, tracks=False), "", above["content"])
    prepare(run)
    images = len(run.views.rows)
    sizes = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad)
        for name, part in (("student", run.student), ("VLA", run.learner.vla))
    }
    kept = f", {len(run.views.held_out)} held out" if section.validation.fraction else ""
    say(
        f"train: {section.iterations} iterations of {section.batch} images, {section.batch // num} in each of "
        f"{num} processes: {section.iterations * section.batch / images:.1f} epochs of {images} images{kept}"
    )
    say("train: " + ", ".join(f"{name} {size / 1e6:.2f} M parameters" for name, size in sizes.items()))
    trials, room = min(TRIAL_ITERATIONS, section.iterations), run.views.replayed.room_bytes
    memory, clock, seconds = Forecast(num, saving=4 * sizes["student"]), Clock(), []
    for iteration, batch in enumerate(training_batches(run.views, start=0, stop=trials, num_processes=num)):
        began = time.perf_counter()
        _step(run, batch, iteration, clock)
        seconds.append(time.perf_counter() - began)
        memory.look()  # the loaders end with the last batch
    if section.validation.fraction:
        run.views.held_out = run.views.held_out[:1]
        seen_miou(run.student, run.views, run.learner.text_seen, run.learner.seen_ids)
        memory.own = peak_resident_bytes()
    memory.views = views_to_keep(run.views, section, room, num, trials)
    waited = clock.total["data"] / trials
    whole = section.iterations * (median(seconds) + waited)
    fixed = 4 * 4 * sum(sizes.values())  # float32: weights, gradients, AdamW's two moments
    parts = f"{fixed / 1e9:.2f} GB of it weights, gradients and moments"
    if torch.cuda.is_available():
        say(f"train: memory {peak_memory_bytes() / 1e9:.2f} GB of the GPU at its peak, {parts}")
    say(f"train: memory {memory.line()}" + ("" if torch.cuda.is_available() else f"; {parts}"))
    say(f"train: {median(seconds):.3f} s an iteration (median of {trials}): {whole / 3600:.2f} hours for all")
