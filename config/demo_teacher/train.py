"""Trains the demo's teacher: a tiny, real CLIP on crops of procedural scenes and captions of them.

    python config/demo_teacher/train.py            # about 25 minutes on two cores; writes the weights beside it

Contrastive learning alone: a crop and a caption that names what is in it; captions that name the
same things are each other's positives, since "a zebra" of one crop is true of the other. All 20
names occur in captions, as unseen classes do in CLIP's web captions; no pixel label reaches the
loss. Trained at 64 x 64, run at 128 x 128 by position interpolation, as ViT-B/16 goes from 224 to
512. Weights are stored in float16; the gate below is measured on what is stored.

Gate (printed and logged): zero-shot accuracy on single things >= 90 %, largest cosine between two
class texts <= 0.9, cluster purity >= 95 %. Scenes for it come from seeds that no run uses.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, interpolate, normalize

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from pipeline.data.demo import CLASSES, TEXTURES, THINGS, render_scene  # noqa: E402

SEED, WORLD, GATE_WORLD = 0, 9001, 9002
STEPS, BATCH, SCENES, PEAK_LR, WARMUP = 1800, 192, 1600, 1e-3, 100
CROP, SIDES = 64, (44, 112)  # crops of 44 to 112 pixels at 64: the scales that views ask for
MAX_SCALE = 25.0  # caps exp(logit_scale): a hotter softmax lets the texts crowd into one cone
TEMPLATES = (
    "a photo of a {}.",
    "a photo of {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "there is a {} here.",
    "a {} in the scene.",
    "the {}.",
    "{}",
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


def learn_bpe(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one token."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in spelled.items():
            joined: list[str] = []
            while parts:
                if len(parts) > 1 and (parts[0], parts[1]) == best:
                    joined.append(parts[0] + parts[1])
                    parts = parts[2:]
                else:
                    joined.append(parts[0])
                    parts = parts[1:]
            spelled[word] = joined


def write_model_files() -> None:
    words = Counter(word for t in TEMPLATES for word in t.replace("{}", " ").replace(".", " ").split())
    words.update(dict.fromkeys(CLASSES, 5) | {"and": 5, "on": 5})
    merges = learn_bpe(words)
    with open(HERE / "bpe.txt.gz", "wb") as out, gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed:
        packed.write("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]).encode())
    model_cfg = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": CROP, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 512 + len(merges) + 2,
            "width": 64,
            "heads": 4,
            "layers": 2,
            "tokenizer_kwargs": {"clean": "lower"},
        },
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": MEAN, "std": STD, "size": CROP}}
    (HERE / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def caption(rng: np.random.Generator, present: list[int]) -> tuple[str, frozenset[int]]:
    """A caption that names the things of a crop, the ground too in half of them, in any order."""
    things = [c for c in present if c >= len(TEXTURES)]
    ground = [c for c in present if c < len(TEXTURES)]
    with_ground = not things or rng.random() < 0.5
    named = [CLASSES[c] for c in rng.permutation(things)] if things else []
    if things and with_ground and ground and rng.random() < 0.5:
        text = " and a ".join(named) + " on " + " and ".join(CLASSES[c] for c in rng.permutation(ground))
    else:
        text = " and a ".join(named + [CLASSES[c] for c in rng.permutation(ground)] * with_ground)
    shown = frozenset(things) | frozenset(ground if with_ground else ())
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(text), shown


def crop_batch(rng, scenes, count):
    """count crops (count, 3, 64, 64) in 0..1, their captions and the sets of classes named."""
    crops, texts, sets = [], [], []
    size = scenes[0].labels.shape[0]
    while len(crops) < count:
        scene = scenes[rng.integers(len(scenes))]
        side = round(math.exp(rng.uniform(math.log(SIDES[0]), math.log(SIDES[1]))))
        x, y = rng.integers(0, size - side + 1, 2)
        share = np.bincount(scene.labels[y : y + side, x : x + side].ravel(), minlength=len(CLASSES)) / side**2
        present = [c for c in np.flatnonzero(share > 0) if share[c] >= (0.15 if c < len(TEXTURES) else 0.04)]
        if not present:
            continue
        piece = torch.from_numpy(scene.image[y : y + side, x : x + side]).permute(2, 0, 1)[None].float() / 255
        piece = interpolate(piece, (CROP, CROP), mode="bilinear", antialias=True, align_corners=False)[0]
        crops.append(piece.flip(-1) if rng.random() < 0.5 else piece)
        text, shown = caption(rng, present)
        texts.append(text)
        sets.append(shown)
    return torch.stack(crops), texts, sets


def train(log) -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    write_model_files()
    model = open_clip.create_model(f"local-dir:{HERE}", load_weights=False)
    cfg = json.loads((HERE / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(HERE / "bpe.txt.gz"), context_length=cfg["context_length"])
    scenes = [render_scene(WORLD, i) for i in range(SCENES)]
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0}])
    began = time.time()
    for step in range(STEPS):
        rate = min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * rate
        crops, texts, sets = crop_batch(rng, scenes, BATCH)
        unique = sorted(set(texts))
        image = normalize(model.encode_image((crops - mean) / std), dim=1)  # (B, C)
        words = normalize(model.encode_text(tokenizer(unique)), dim=1)[[unique.index(t) for t in texts]]  # (B, C)
        logits = model.logit_scale.exp().clamp(max=MAX_SCALE) * image @ words.T
        same = torch.tensor([[a == b for b in sets] for a in sets], dtype=torch.float32)
        target = same / same.sum(1, keepdim=True)
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0 or step == STEPS - 1:
            hit = (logits.argmax(1) == torch.arange(BATCH)) | (same[torch.arange(BATCH), logits.argmax(1)] > 0)
            scale = model.logit_scale.exp().item()
            log(
                f"step {step:5d}  loss {loss.item():.3f}  match {hit.float().mean():.3f}  "
                f"scale {scale:.1f}  {time.time() - began:.0f} s"
            )
        if step % 300 == 299 or step == STEPS - 1:
            save_file(
                {k: v.half().contiguous() for k, v in model.state_dict().items()}, HERE / "open_clip_model.safetensors"
            )


@torch.inference_mode()
def gate(log) -> bool:
    """The three numbers that the demo stands on, from the stored weights."""
    from pipeline.data.demo import DemoDataSet
    from pipeline.models.teacher import Teacher
    from pipeline.ops import fusion, kmeans, views

    teacher = Teacher.load(f"local-dir:{HERE}", image_size=CROP)
    text = teacher.encode_text([[f"a photo of a {name}."] for name in CLASSES])  # (K, C)
    cosine = (text @ text.T).fill_diagonal_(-1)
    worst = divmod(int(cosine.argmax()), len(CLASSES))
    log(f"largest text cosine {cosine.max():.3f} ({CLASSES[worst[0]]}, {CLASSES[worst[1]]}); want <= 0.9")

    pieces, truth = [], []
    for index in range(400):
        scene = render_scene(GATE_WORLD, index, things=(1, 1))
        thing = scene.labels >= len(TEXTURES)
        y, x = (int(np.clip(axis.mean() - CROP / 2, 0, 128 - CROP)) for axis in np.nonzero(thing))
        pieces.append(torch.from_numpy(scene.image[y : y + CROP, x : x + CROP]).permute(2, 0, 1))
        truth.append(int(scene.labels[thing][0]))
    cls, _ = teacher.encode(torch.stack(pieces))
    scores = normalize(cls.float(), dim=1) @ text.T
    guess = scores[:, len(TEXTURES) :].argmax(1) + len(TEXTURES)
    accuracy = (guess == torch.tensor(truth)).float().mean().item()
    log(f"zero-shot accuracy on {len(truth)} single things, {len(THINGS)} names: {accuracy:.1%}; want >= 90 %")

    wide = Teacher.load(f"local-dir:{HERE}", image_size=128)
    data = DemoDataSet(seed=GATE_WORLD, test_seed=GATE_WORLD + 1, train=128, test=1)
    samples = data.samples("train")
    images = torch.stack([torch.from_numpy(data.image(s)).permute(2, 0, 1) for s in samples])
    _, tokens = wide.encode(images)
    tokens = normalize(tokens.float(), dim=-1)
    good = total = 0
    for sample, grid in zip(samples, tokens, strict=True):
        inside = np.ones((128, 128), dtype=bool)
        state = views.token_state(torch.from_numpy(data.seen_labels(sample)), torch.from_numpy(inside), 8)[None]
        centres, alive = kmeans.window_centres(grid[None], state)
        found = kmeans.lloyd(grid.reshape(1, -1, grid.shape[-1]), (state == 1).reshape(1, -1), centres, alive)
        group = fusion.fuse(fusion.similar_pairs(found.centres, found.alive, 0.8)[0], found.alive[0])
        pseudo = fusion.pseudo_map(found.assign[0], group, state[0])
        blocks = data.labels(sample).reshape(16, 8, 16, 8).transpose(0, 2, 1, 3).reshape(16, 16, 64)
        token_class = torch.tensor([[np.bincount(b).argmax() for b in row] for row in blocks])
        majority, count = fusion.purity(pseudo, token_class)
        good, total = good + majority, total + count
    log(f"cluster purity on the ignored area of {len(samples)} scenes: {good / total:.1%}; want >= 95 %")
    return cosine.max() <= 0.9 and accuracy >= 0.9 and good / total >= 0.95


if __name__ == "__main__":
    torch.set_num_threads(2)
    with open(HERE / "train.log", "a" if "--gate" in sys.argv else "w") as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        if "--gate" not in sys.argv:
            train(log)
        sys.exit(0 if gate(log) else 1)
