"""What a config asks of a stage, as a fingerprint.

`config_fingerprint` says what a config asks of a stage (the Snakefile's trigger), `fingerprint` what the stage makes of
it: facts about the data included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import OPTIONS, Config, aside_keys, defaults, digest, settings_apart_from_defaults
from pipeline.running.table import STAGES, above

# A key at its default is in no fingerprint, so that a new version with one more key finds finished work finished.
# So a default that changes, or a key that gets another meaning, must raise this: then everything is made again.
MEANING = 3
SAMPLES = (
    "samples"  # what options bear on that say which samples there are: no content where these are a fact
)


def asked(config: Config, stage: str, *, apart_from: str = "") -> dict[str, Any]:
    """What the config asks of `stage` itself: dotted key -> value, without keys at their defaults.

    `apart_from`: what options of the data set bear on that are left out, SAMPLES.
    """
    entries = [STAGES[name] for name in (stage, *STAGES[stage].also(config))]
    sections = {section for entry in entries for section in entry.sections}
    hidden = aside_keys() | {f"data.{option}" for option in _hidden_options(config, stage, apart_from)}
    return {
        key: value
        for key, value in settings_apart_from_defaults(config).items()
        if key.partition(".")[0] in sections and key not in hidden
    }


def data_options(config: Config, stage: str) -> dict[str, Any]:
    """The data set's options that bear on what a stage makes of one sample."""
    hidden = _hidden_options(config, stage, SAMPLES)
    return {name: value for name, value in config.data.options().items() if name not in hidden}


def _hidden_options(config: Config, stage: str, apart_from: str) -> set[str]:
    names = (stage, *STAGES[stage].also(config))
    seen = {"all", SAMPLES, *(part for name in names for part in STAGES[name].reads)} - {apart_from}
    return {name for name, option in OPTIONS.items() if option.bears_on not in seen}


def config_fingerprint(config: Config, stage: str, *, apart_from: str = "") -> str:
    """Identity of what the config asks of `stage`: what it reads itself, and the same of all stages above it."""
    upstream = above(config, stage)
    over = config_fingerprint(config, upstream, apart_from=apart_from) if upstream else MEANING
    return digest([stage, asked(config, stage, apart_from=apart_from), over])


def fingerprint(config: Config, stage: str, upstream: str | None, facts: Mapping[str, Any]) -> str:
    """Identity of what `stage` makes: config, the fingerprint found upstream, and facts about the data.

    Options that only say which samples there are don't count; the samples are a fact.
    """
    return digest([config_fingerprint(config, stage, apart_from=SAMPLES), upstream, dict(facts)])


def difference(was: Mapping[str, Any], now: Mapping[str, Any], limit: int = 3) -> str:
    """The first keys in which two `asked` differ, with both values; "" where they don't."""
    usual = defaults()
    keys = [key for key in dict.fromkeys([*now, *was]) if was.get(key) != now.get(key)]
    said = [
        f"{key} was {was.get(key, usual.get(key))!r} and is {now.get(key, usual.get(key))!r}"
        for key in keys[:limit]
    ]
    return "; ".join(said) + (f"; and {len(keys) - limit} more" if len(keys) > limit else "")
