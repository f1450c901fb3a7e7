"""What CLIP-ES calls classes and background: named sets of words, as data with their sources.

Source of all: CLIP-ES, section 3.2 and its public tables (method section 11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.data.base import DataError, unknown

# Synonym fusion: what stands in the sentence instead of the class's own name.
SYNONYMS: dict[str, dict[str, str]] = {
    "voc": {
        "person": "person with clothes,people,human",
        "bird": "bird avian",
        "chair": "chair seat",
        "tvmonitor": "tvmonitor screen",
    },
}
_VOC_BACKGROUND = (
    "ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house "
    "mountain ocean road rock street valley bridge sign"
)
# What the background of a picture may be: each name is a class of its own in the softmax.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "voc": tuple(_VOC_BACKGROUND.split()),
    "coco": tuple(name for name in _VOC_BACKGROUND.split() if name not in ("keyboard", "sign")),
}


def fused_name(synonyms: str | Mapping[str, str], class_name: str) -> str:
    """The words of a class in a prompt: those of the named set or mapping, else its own name.

    Raises: DataError for an unknown set.
    """
    if isinstance(synonyms, str):
        if synonyms not in SYNONYMS:
            raise unknown("cams.synonyms: unknown set", synonyms, SYNONYMS)
        synonyms = SYNONYMS[synonyms]
    return synonyms.get(class_name, class_name)


def background_names(name_or_list: str | Sequence[str]) -> tuple[str, ...]:
    """The background's names: a named set's, or the given ones. Raises: DataError for an unknown or empty one."""
    if isinstance(name_or_list, str):
        if name_or_list not in BACKGROUNDS:
            raise unknown("cams.background: unknown set", name_or_list, BACKGROUNDS)
        return BACKGROUNDS[name_or_list]
    if not name_or_list or not all(isinstance(name, str) and name.strip() for name in name_or_list):
        raise DataError(
            f"cams.background is {list(name_or_list)!r}: want names, or one of {', '.join(BACKGROUNDS)}."
        )
    return tuple(name_or_list)


def names_of_classes(classes: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """What each class is called in its prompts: the names given for it, else its own.

    Raises: DataError for names of no class, an empty list of them, or a blank one.
    """
    for name, others in synonyms.items():
        if name not in classes:
            raise unknown("text.synonyms: no class is called", name, classes)
        if not others or not all(other.strip() for other in others):
            raise DataError(
                f"text.synonyms.{name} is {list(others)!r}: want at least one name, none of them blank."
            )
    return [tuple(synonyms.get(name, (name,))) for name in classes]
