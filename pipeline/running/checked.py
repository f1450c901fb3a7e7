"""Labels looked at before an hour is spent on them: every mask of a part, and where an image's tags are read, these.

`extract` and `cluster` call it for the training images before the teacher or the clustering begins, `eval` for the test
images. What can't be right is an error in one line; what can't be decided, and what is likely to be wrong, is said.
A mask takes about a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.base import STAMP_THREADS, BadImage, DataError, DataSet, Sample
from pipeline.data.survey import CERTAIN, Palettes, Seen, look_at_masks, never_seen, no_labels
from pipeline.ops.labels import IGNORE
from pipeline.running.console import progress, say

FEW = 16  # training masks that test masks are compared with
MOST_SAID = 3  # of a list


def check_labels(data: DataSet, samples: Sequence[Sample], *, are_tags: bool, is_needed: bool) -> Seen | None:
    """Looks at the training labels; None where they are made, not read.

    Without any they are an error where `is_needed`, unless tags take their place: images may be extracted first and
    labelled later.

    Raises: DataError for what can't be right.
    """
    if not data.has_files:
        return None
    if are_tags:
        refuse_wrong_tags(data, samples)
    seen = check_masks(data, samples, "train")
    if is_needed and not are_tags and (complaint := no_labels(data, seen)):
        raise DataError(f"{data.name}: {complaint}")
    if seen.num_unlabelled:
        what = "tagged" if are_tags else "unlabelled"
        say(f"labels: {seen.num_samples} train images, {seen.num_unlabelled} without a mask: {what}")
    if missing := never_seen(data, seen):
        listed = ", ".join(map(repr, missing[:MOST_SAID])) + (", ..." if len(missing) > MOST_SAID else "")
        say(f"labels: {len(missing)} seen classes are in no training mask and can't be learned: {listed}")
    return seen


def check_masks(data: DataSet, samples: Sequence[Sample], part: str) -> Seen:
    """Looks at the masks of a part's samples, and says what is doubtful. Raises: DataError for what can't be right."""
    with progress(f"{part} masks", len(samples)) as advance:
        seen = look_at_masks(data, samples, part, advance)
    if part == "test":
        seen.palettes.join(_some_palettes(data))
    if seen.wrong:
        more = f" ({len(seen.wrong)} of {seen.num_masks + len(seen.wrong)} {part} masks can't be used.)"
        raise DataError(seen.wrong[0] + (more if len(seen.wrong) > 1 else ""))
    for check in CERTAIN:
        if complaint := check(data, seen):
            raise DataError(f"{data.name}: {complaint}")
    if len(data.classes) == 1 and seen.pixels[IGNORE]:
        name = data.classes[0]
        say(
            f"in doubt: {name!r} is the only class, so each labelled pixel is right whatever is predicted. Describe "
            "what else there is, be it `background`."
        )
    if seen.doubts:
        more = f" ({len(seen.doubts)} images)" if len(seen.doubts) > 1 else ""
        say(f"in doubt: {seen.doubts[0]}{more}")
    return seen


def _some_palettes(data: DataSet) -> Palettes:
    """The colours of a few training masks, whose indices must mean the same; none where they aren't to be had."""
    try:
        return look_at_masks(data, data.samples("train")[:FEW], "train").palettes
    except DataError:
        return Palettes()


def wrong_tags(data: DataSet, sample: Sample) -> str:
    """What is wrong with an image's labels, "" if nothing."""
    try:
        tags = data.tags(sample)
    except BadImage:
        return ""  # the image itself is broken, and extraction leaves it out
    except DataError as error:
        return str(error)
    strange = [tag for tag in tags if not 0 <= tag < len(data.classes) or tag == data.background]
    return (
        f"{data.name}: image {sample.id} has the label {strange[0]}, which is none of its foreground classes."
        if strange
        else ""
    )


def refuse_wrong_tags(data: DataSet, samples: Sequence[Sample]) -> None:
    """Raises DataError for images whose image-level labels are missing or are no classes, naming the first."""
    with ThreadPoolExecutor(STAMP_THREADS) as pool:
        wrong = [*filter(None, pool.map(lambda sample: wrong_tags(data, sample), samples))]
    if wrong:
        more = f" ({len(wrong)} of {len(samples)} images have wrong tags.)" if len(wrong) > 1 else ""
        raise DataError(wrong[0] + more)
