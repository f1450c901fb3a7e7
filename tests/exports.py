"""Small exports of labelling tools, made up: each as its tool lays it out, with what its masks should hold."""

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 6, 8


def photo(path: Path, size=(WIDTH, HEIGHT), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (50, 60, 70)).save(path, **options)
    return path


def picture(path: Path, pixels, mode=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(path)
    return path


def square(x0, y0, x1, y1) -> list[float]:
    """Corners of the pixels x0..x1-1, y0..y1-1, as COCO counts: a pixel's corner is a whole number."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def runs(mask) -> list[int]:
    """COCO's runs of a mask, off first, down the columns."""
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def boxed(x0, y0, x1, y1, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def thing(key, image, category, shape, **more) -> dict:
    return {"id": key, "image_id": image, "category_id": category, "segmentation": shape, "iscrowd": 0} | more


def coco_json(names=("a", "b", "c")) -> dict:
    """Categories 7 (sky) and 3 (bee): bee is class 0. In a: a sky, a smaller bee on it, listed first; runs of both
    forms, a crowd below. In b: one bee of runs. c has nothing."""
    compressed = boxed(6, 4, 8, 6)
    from pycocotools import mask as tool

    text = tool.encode(np.asfortranarray(compressed.astype(np.uint8)))["counts"].decode()
    crowd = {"counts": runs(boxed(0, 4, 8, 6)), "size": [HEIGHT, WIDTH]}
    return {
        "info": {"year": 2026},
        "annotations": [  # before the images, as some tools write them
            thing(1, 10, 3, [square(1, 1, 3, 3)]),
            thing(2, 10, 7, [square(0, 0, 4, 4)]),
            thing(3, 10, 7, {"counts": text, "size": [HEIGHT, WIDTH]}),
            thing(4, 10, 3, crowd, iscrowd=1),
            thing(5, 20, 3, {"counts": runs(boxed(0, 0, 8, 3)), "size": [HEIGHT, WIDTH]}),
        ],
        "images": [
            {"id": 10 * (i + 1), "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": 7, "name": "sky"}, {"id": 3, "name": "bee", "supercategory": "insects"}],
    }


def expected_coco() -> dict:
    a = np.full((HEIGHT, WIDTH), 255, np.uint8)
    a[:4, :4] = 1
    a[1:3, 1:3] = 0
    a[4:, 6:] = 1
    b = np.full((HEIGHT, WIDTH), 255, np.uint8)
    b[:3] = 0
    return {"a": a, "b": b, "c": np.full((HEIGHT, WIDTH), 255, np.uint8)}


def coco_export(root: Path, content: dict | None = None) -> Path:
    for name in "abc":
        photo(root / "photos" / f"{name}.jpg")
    path = root / "annotations.json"
    path.write_text(json.dumps(coco_json() if content is None else content))
    return path


SKY, BEE, BLACK = (70, 130, 180), (200, 10, 10), (0, 0, 0)


def coloured(mapping: dict) -> np.ndarray:
    """Rows of sky, bee and nothing, two each, in the colours of a map."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:2], pixels[2:4], pixels[4:] = mapping["sky"], mapping["bee"], mapping["nothing"]
    return pixels


def cvat_export(root: Path) -> Path:
    """CVAT's Segmentation mask 1.1, one mask in RGB, one indexed."""
    pixels = coloured({"sky": SKY, "bee": BEE, "nothing": BLACK})
    picture(root / "SegmentationClass" / "a.png", pixels)
    Image.fromarray(pixels).quantize(8).save(root / "SegmentationClass" / "b.png")
    for name in "ab":
        photo(root / "JPEGImages" / f"{name}.jpg")
    path = root / "labelmap.txt"
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "bee:200,10,10::", "sky:70,130,180:head,hand:"]
    path.write_text("\n".join(lines) + "\n")
    return path


def brush(root: Path, task, annotation, rest, mask, by="3") -> Path:
    name = f"task-{task}-annotation-{annotation}-by-{by}-{rest}.png"
    return picture(root / "brushes" / name, np.asarray(mask, np.uint8) * 200)


def label_studio_export(root: Path, *, is_min=False) -> Path:
    """Tasks 1 (uploaded, a), 2 (local file, b) and 3 without a region; one label with a slash, one of two words."""
    for name in "abc":
        photo(root / "photos" / f"{name}.jpg")
    brush(root, 1, 11, "my-tag-sky-0", boxed(0, 0, 8, 4))
    brush(root, 1, 11, "my-tag-bee-wasp-0", boxed(1, 1, 3, 3))  # bee/wasp
    brush(root, 2, 12, "my-tag-garden bee-0", boxed(0, 0, 2, 2), by="ann@example.com")
    brush(root, 2, 12, "my-tag-garden bee-1", boxed(6, 4, 8, 6), by="ann@example.com")
    brush(root, 2, 12, "my-tag-no_label-0", boxed(3, 3, 4, 4), by="ann@example.com")
    names = {1: "/data/upload/5/0a1b2c3d-a.jpg", 2: "/data/local-files/?d=photos/b.jpg", 3: "s3://bucket/c.jpg"}
    labels = {1: ["sky", "bee/wasp"], 2: ["garden bee"], 3: []}

    def value(label):
        return {"format": "rle", "rle": [0, 1, 2], "brushlabels": [label]}

    tasks = []
    for task, address in names.items():
        results = [{"from_name": "my-tag", "type": "brushlabels", "value": value(label)} for label in labels[task]]
        if is_min:
            tasks.append({"id": task, "image": address, "my-tag": [r["value"] for r in results], "annotator": 3})
        else:
            tasks.append({"id": task, "data": {"image": address}, "annotations": [{"id": 10, "result": results}]})
    path = root / "export.json"
    path.write_text(json.dumps(tasks))
    return path


def bitmap(mask) -> str:
    """Supervisely's: an indexed PNG whose 0 is transparent, deflated, in base64."""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


def supervisely_export(root: Path, folders=("train", "val")) -> Path:
    classes = [
        {"title": "sky", "shape": "polygon", "color": "#4682b4"},
        {"title": "bee", "shape": "bitmap", "color": "#C80A0A"},
        {"title": "box", "shape": "rectangle", "color": "#00FF00"},
    ]
    (root).mkdir(parents=True, exist_ok=True)
    (root / "meta.json").write_text(json.dumps({"classes": classes, "tags": [], "projectType": "images"}))
    outline = [[0, 0], [7, 0], [7, 3], [0, 3]]
    hole = [[5, 0], [7, 0], [7, 2], [5, 2]]
    objects = [
        {"classTitle": "sky", "geometryType": "polygon", "points": {"exterior": outline, "interior": [hole]}},
        {"classTitle": "bee", "geometryType": "bitmap", "bitmap": {"data": bitmap([[1, 0], [1, 1]]), "origin": [2, 3]}},
        {"classTitle": "box", "geometryType": "rectangle", "points": {"exterior": [[0, 0], [1, 1]], "interior": []}},
    ]
    for i, folder in enumerate(folders):
        photo(root / folder / "img" / f"{'ab'[i]}.jpg")
        path = root / folder / "ann" / f"{'ab'[i]}.jpg.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"size": {"height": HEIGHT, "width": WIDTH}, "tags": [], "objects": objects}))
    return root


def roboflow_coco_export(root: Path, folders=("train", "valid", "test")) -> Path:
    for folder in folders:
        name = f"a_jpg.rf.{folder}.jpg"
        photo(root / folder / name)
        content = {
            "categories": [
                {"id": 0, "name": "garden", "supercategory": "none"},
                {"id": 1, "name": "bee", "supercategory": "garden"},
                {"id": 2, "name": "sky", "supercategory": "garden"},
            ],
            "images": [{"id": 0, "file_name": name, "height": HEIGHT, "width": WIDTH}],
            "annotations": [thing(0, 0, 2, [square(0, 0, 8, 4)]), thing(1, 0, 1, [square(1, 1, 3, 3)])],
        }
        (root / folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def roboflow_masks_export(root: Path, folders=("train", "valid")) -> Path:
    for folder in folders:
        photo(root / folder / f"a_jpg.rf.{folder}.jpg")
        values = np.zeros((HEIGHT, WIDTH), np.uint8)
        values[:2], values[2:4] = 1, 2
        picture(root / folder / f"a_jpg.rf.{folder}_mask.png", values)
        (root / folder / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, bee\n2, sky\n")
    return root
