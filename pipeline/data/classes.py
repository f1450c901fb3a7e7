"""Class names, named splits and colours: data with its sources, in the order of the label ids."""

from __future__ import annotations

import numpy as np

# A named split is the tuple of its unseen names; a data set's first one is its default.
Splits = dict[str, tuple[str, ...]]


def _names(text: str) -> tuple[str, ...]:
    """Names separated by commas; line breaks count as spaces."""
    return tuple(" ".join(name.split()) for name in text.split(","))


def _colours(text: str) -> np.ndarray:
    """(num, 3) uint8 of colours as #rrggbb, without the #."""
    return np.array([list(bytes.fromhex(colour)) for colour in text.split()], np.uint8)


BACKGROUND = "background"  # class 0 of a data set in which what is no object is a class

# Images of each part as published, of which any number is right. Source: method section 10 (the paper's Context, 4,996
# and 5,104, and mmseg's lists) and the data sets' own pages; COCO 2014 with and without images that hold no object.
PUBLISHED_COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "voc": {"train": (10_582,), "test": (1_449,)},
    "context": {"train": (4_998, 4_996), "test": (5_105, 5_104)},
    "coco_stuff": {"train": (118_287,), "test": (5_000,)},
    "coco14": {"train": (82_081, 82_783), "test": (40_137, 40_504)},
    "cityscapes": {"train": (2_975,), "test": (500,)},
    "camvid": {"train": (367,), "test": (233,)},
    "ade20k": {"train": (20_210, 25_574), "test": (2_000,)},  # of SceneParse150, of the full release
}

# PASCAL VOC 2012's twenty objects, ids 0-19 (raw 1-20). Source: the VOC 2012 development kit.
VOC_CLASSES = _names("""
    aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
    motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
""")
# Source of the split: CLIPTeacher (section 4.1) and ZegCLIP, ids 15-19.
VOC_SPLITS: Splits = {"voc-15-5": ("pottedplant", "sheep", "sofa", "train", "tvmonitor")}

CONTEXT_NUM_RAW = 459  # PASCAL Context's classes as published, of which 59 are frequent enough to be evaluated
# PASCAL Context's 59 classes without background, ids 0-58 (raw 1-59). Order: mmseg's PascalContextDataset59.
CONTEXT_CLASSES = _names("""
    aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet,
    car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food,
    grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform,
    pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree,
    truck, tvmonitor, wall, water, window, wood
""")
# The first is CLIPTeacher's (section 4.1), ids 19, 33, 48, 14, 7, 24, 6, 54, 31, 0.
# The second is published with Cascade-CLIP (configs/context_59), ids 0, 2, 3, 7, 9, 13, 17, 19, 31, 37.
CONTEXT_SPLITS: Splits = {
    "context-49-10": _names("cow, motorbike, sofa, cat, boat, fence, bird, tvmonitor, keyboard, aeroplane"),
    "context-49-10-cascade": _names("aeroplane, bed, bedclothes, boat, bottle, car, cloth, cow, keyboard, plate"),
}

# COCO-Stuff 164k: 80 things, then 91 stuffs, ids 0-170. Order: mmseg's COCOStuffDataset, which is
# COCO-Stuff's own (labels.txt of nightrome/cocostuff) without the eleven classes below.
COCO_STUFF_CLASSES = _names("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
    baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
    knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
    chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
    cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
    hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage,
    cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain,
    desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood,
    flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
    light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
    plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
    salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete,
    wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
    window-other, wood
""")
# COCO's eighty objects in the order of their category ids, as the first of COCO-Stuff's.
COCO_CLASSES = COCO_STUFF_CLASSES[:80]
# Raw ids (0-181 in stuffthingmaps, one less than in labels.txt) of classes that label no COCO image:
# street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush.
COCO_STUFF_RAW_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
# Source of the split: CLIPTeacher (section 4.1) and ZegCLIP, ids 19, 23, 28, 29, 36, 51, 76, 88, 94, 112,
# 133, 136, 137, 157, 160.
COCO_STUFF_SPLITS: Splits = {
    "coco-stuff-156-15": _names("""
        cow, giraffe, suitcase, frisbee, skateboard, carrot, scissors, cardboard, clouds, grass, playingfield,
        river, road, tree, wall-concrete
    """)
}

# Cityscapes' nineteen evaluated classes, their ids among the published 0-33, and colours. Source: labels.py of
# cityscapesScripts.
CITYSCAPES_CLASSES = _names("""
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person,
    rider, car, truck, bus, train, motorcycle, bicycle
""")
CITYSCAPES_RAW = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_PALETTE = _colours("""
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046
    003c64 005064 0000e6 770b20
""")

# CamVid's eleven classes in the order of SegNet's masks, with the data set's own colours.
CAMVID_CLASSES = _names("""
    sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist
""")
CAMVID_PALETTE = _colours("""
    808080 800000 c0c080 804080 0000c0 808000 c08080 404080 400080 404000 0080c0
""")

# ADE20K's 150 classes of SceneParse150, ids 0-149 (raw 1-150). Order: mmseg's ADE20KDataset.
ADE20K_CLASSES = _names("""
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
    door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
    field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column,
    signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path,
    stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind,
    coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer,
    swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning,
    streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator,
    ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank,
    trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce,
    vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag
""")


ADE20K_FULL = 847  # classes of the full release that are evaluated (see ade20k.py)


def bitwise_palette(num: int) -> np.ndarray:
    """(num, 3) uint8 distinct colours: entries 1..num of VOC's colour map, so never black.

    Entry i spreads the bits of i over red, green and blue, three at a time, from the highest bit down. For
    VOC it is the official palette. mmseg's for COCO-Stuff gives several classes one colour (person and
    bicycle, for instance), so it is not used.
    """
    ids = np.arange(1, num + 1)
    palette = np.zeros((num, 3), np.uint8)
    for step in range(8):
        for channel in range(3):
            palette[:, channel] |= (((ids >> (3 * step + channel)) & 1) << (7 - step)).astype(np.uint8)
    return palette


def with_black(palette: np.ndarray) -> np.ndarray:
    """(1 + num, 3): black before the others, the background's colour in VOC's own masks."""
    return np.concatenate([np.zeros((1, 3), np.uint8), palette])
