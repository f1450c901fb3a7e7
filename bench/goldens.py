"""What a refactoring must not change, to the bit: caches, labels, losses, weights, scores, masks, ONNX logits.

    python -m bench.goldens --out before.json             # on the old commit
    python -m bench.goldens --out after.json --against before.json

Small runs of the demo through cli.py, each with one thread, and a digest of everything they leave. Only files are
looked at, never the program's own modules, so that the same script runs on any commit. Digests are of one machine:
another processor or another torch may round otherwise, so both sides are made on the same one. About four minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = ("data.train=96", "data.test=24", "train.warmup=10", "train.log_every=1", "train.threads=1")
SMALL += ("train.iterations=50", "train.checkpoint_every=50", "eval.pictures=2")
SHORT = ("train.iterations=6", "train.checkpoint_every=6")
# Branches of the losses and of the two stages that the presets leave out: settings of a run of six iterations.
TRAININGS = {
    "glm_max": ["train.glm=max"],
    "glm_mean": ["train.glm=mean"],
    "glm_off": ["train.glm=off"],
    "glm_teacher_length": ["train.glm_length=null"],
    "vla_mlp": ["train.vla=mlp"],
    "vla_original": ["train.vla=original"],
    "negatives": ["train.negatives=64"],
    "potentials_image": ["train.potentials=image", "train.nel=all"],
    "no_potential": ["train.potential=false", "train.generate=false"],
    "no_nel": ["train.nel=off", "train.potential_ce=false"],
    "full_grid": ["train.loss_grid=full", "train.photometric=true"],
}
CACHES = {
    "int8": ["cache.tokens=int8", "views.num=2", "cluster.debug=false"],
    "stream": ["cache.tokens=stream", "views.num=2"],
    "tokens_windows": ["cluster.window=tokens"],
    "euclidean": ["cluster.distance=euclidean", "cluster.backend=torch"],
    "torch": ["cluster.backend=torch"],
}
NOT_CONTENT = ("time/", "elapsed", "date", "machine", "revision", "evaluated", "torch", "seconds")
NOT_CONTENT += ("config", "fingerprint")


def cli(folder: Path, *words: str) -> str:
    """Runs cli.py; returns what it printed. Raises: CalledProcessError, after showing what was said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "cli.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    with (folder / "log.txt").open("a") as log:
        log.write(f"$ {' '.join(words)}\n{done.stderr}{done.stdout}")
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def stage(folder: Path, name: str, config: str, *settings: str) -> None:
    sets = [word for setting in (f"runs={folder}/runs", *SMALL, *settings) for word in ("--set", setting)]
    cli(folder, name, "--config", f"config/{config}.yaml", *sets)


def of_bytes(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()


def of_array(values: Any) -> str:
    """A digest of shape, kind and values, not of the width in which integers are held."""
    values = np.asarray(values)
    if values.dtype.kind in "iub":
        values = values.astype(np.int64)
    return of_bytes(str(values.shape).encode(), values.dtype.kind.encode(), np.ascontiguousarray(values).tobytes())


def of_cache(cache: Path) -> dict[str, str]:
    """A digest of each array."""
    group = zarr.open_group(str(cache / "data.zarr"), mode="r")
    return {name: of_array(array[...]) for name, array in sorted(group.arrays())}


def of_file(path: Path) -> str:
    return of_bytes(path.read_bytes())


def content(value: Any) -> Any:
    """Nested values without what differs from run to run."""
    if isinstance(value, dict):
        return {k: content(v) for k, v in value.items() if not any(word in k for word in NOT_CONTENT)}
    return [content(item) for item in value] if isinstance(value, list) else value


def of_training(run: Path) -> dict[str, Any]:
    """Every iteration's losses, and the weights after the last."""
    lines = (run / "train" / "losses.jsonl").read_text().splitlines()
    from safetensors.numpy import load_file

    weights = load_file(run / "train" / "student.safetensors")
    joined = of_bytes(*(of_array(weights[name]).encode() for name in sorted(weights)))
    return {"losses": [content(json.loads(line)) for line in lines], "weights": joined}


def of_pictures(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".png":
            found[path.relative_to(folder).as_posix()] = of_array(Image.open(path))
        elif path.suffix == ".npy":
            found[path.relative_to(folder).as_posix()] = of_array(np.load(path))
    return found


def onnx_logits(path: Path) -> str:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (text,) = [found for found in path.parent.glob("*.npy") if found.stem.startswith(path.stem)]
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 128, 96)).astype(np.float32)
    (logits,) = session.run(None, {"images": images, "text": np.load(text)})
    return of_array(logits)


def goldens(folder: Path, tell: Any, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """All of them, or those named `demo`, `demo_clip_es`, `trainings` (which need demo's cache) and `caches`."""
    found: dict[str, Any] = {}
    for config, labels in (("demo", "cluster"), ("demo_clip_es", "cams")):
        if only and config not in only:
            continue
        run = folder / "runs" / config
        for name in ("extract", labels, "train", "eval"):
            tell(f"{config}: {name}")
            stage(folder, name, config, f"name={config}")
        found[config] = {
            "cache": of_cache(run / "cache"),
            "training": of_training(run),
            "metrics": content(json.loads((run / "eval" / "metrics.json").read_text())),
        }
        images = folder / "images"
        images.mkdir(exist_ok=True)
        rng = np.random.default_rng(1)
        for index, (height, width) in enumerate(((128, 128), (90, 160), (200, 300))):
            blocks = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(images / f"{index}.png")
        for mode in ("whole", "slide"):
            tell(f"{config}: predict, {mode}")
            out = folder / f"{config}-{mode}"
            words = ["--out", str(out), "--mode", mode, "--probabilities"]
            cli(folder, "predict", str(images), "--run", str(run), *words)
            found[config][f"predict {mode}"] = of_pictures(out)
        if config == "demo":
            tell(f"{config}: export")
            cli(folder, "export", str(run), "--out", str(folder / "student.onnx"))
            found[config]["onnx"] = onnx_logits(folder / "student.onnx")
            tell("demo: evaluation at several scales")
            several = ("eval.scales=[0.75, 1.25]", "eval.flip=true", "eval.mode=slide", "data.test=6")
            stage(folder, "eval", config, f"name={config}", *several)
            found[config]["metrics of scales"] = content(json.loads((run / "eval" / "metrics.json").read_text()))
    for name, settings in TRAININGS.items() if not only or "trainings" in only else ():
        tell(f"training {name}")
        stage(folder, "train", "demo", f"name={name}", f"cache.path={folder}/runs/demo/cache", *SHORT, *settings)
        found[name] = of_training(folder / "runs" / name)
    for name, settings in CACHES.items() if not only or "caches" in only else ():
        tell(f"cache {name}")
        for step in ("extract", "cluster"):
            stage(folder, step, "demo", f"name={name}", *settings)
        found[name] = {"cache": of_cache(folder / "runs" / name / "cache")}
    return found


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list) or not value:
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, inner in items for k, v in leaves(inner, f"{key} / {name}" if key else str(name)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--against", type=Path, help="an earlier one: exit code 1 where they differ")
    parser.add_argument("--keep", type=Path, help="an empty folder for the runs, kept; default: one that is deleted")
    parts = "demo, demo_clip_es, trainings (with demo), caches; several separated by commas"
    parser.add_argument("--only", default="", help=parts)
    chosen = parser.parse_args()
    only = tuple(filter(None, chosen.only.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        where = chosen.keep or Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        found = goldens(where.resolve(), lambda line: print(line, file=sys.stderr, flush=True), only)
    chosen.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{chosen.out}: {len(leaves(found))} values, {of_file(chosen.out)}")
    if chosen.against:
        was, now = leaves(json.loads(chosen.against.read_text())), leaves(json.loads(json.dumps(found)))
        if only:
            was = {key: value for key, value in was.items() if key in now or key.partition(" / ")[0] in found}
        other = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        for key in other[:20]:
            print(f"differs: {key}: {was.get(key)!r} and {now.get(key)!r}")
        print(f"{len(was) - len(other)} of {len(was)} are the same" if other else f"all {len(was)} are the same")
        sys.exit(bool(other))


if __name__ == "__main__":
    main()
