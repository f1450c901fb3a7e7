"""The config of a run: its schema, its keys one by one, its files. Loads no torch."""

# ruff: noqa: F401 - these names are what other folders import

from pipeline.config.files import from_mapping, kept, load, nearest_keys, version
from pipeline.config.keys import as_mapping, aside_keys, defaults, digest, fields, leaves, settings_apart_from_defaults
from pipeline.config.schema import OPTIONS, Cams, Cluster, Config, Data, Eval, Student, TeacherSection, Train
from pipeline.config.section import ConfigError, UserError
