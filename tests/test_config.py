import importlib

import pytest
import yaml
from pydantic import Field

from pipeline.config import OPTIONS, Config, ConfigError, fields, from_mapping, load
from pipeline.config.keys import is_content
from pipeline.config.section import Section, kinds_of
from pipeline.data.base import KINDS, options_of
from pipeline.running.table import STAGES, config_fingerprint, fingerprint
from tests.conftest import ROOT


def prints(**changes: object) -> dict[str, str]:
    config = from_mapping({}, [f"{key}={value}" for key, value in changes.items()])
    return {stage: config_fingerprint(config, stage) for stage in STAGES}


def changed(key: str, value: object) -> list[str]:
    before, after = prints(), prints(**{key: value})
    return [stage for stage in STAGES if before[stage] != after[stage]]


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("train.lr", 1e-3, ["train", "eval", "report", "figures"]),
        ("cluster.threshold", 0.7, ["cluster", "train", "eval", "report", "figures"]),
        ("views.num", 5, list(STAGES)),
        ("teacher.image_size", 256, list(STAGES)),
        ("eval.gamma", 2.0, ["eval", "report", "figures"]),
        ("data.test_seed", 9, ["eval", "report", "figures"]),
        ("data.unseen", "[bee]", ["cluster", "cams", "train", "eval", "report", "figures"]),
        ("cams.sinkhorn", 2, ["cams"]),
        ("train.workers", 3, []),
        ("train.losses", "plain", []),
        ("teacher.device", "cpu", []),
        ("cache.path", "/tmp/x", []),
        ("name", "other", []),
        ("data.root", "/elsewhere", []),
        ("data.test_list", "test", ["eval", "report", "figures"]),
        ("data.tags", "masks", ["cluster", "cams", "train", "eval", "report", "figures"]),
    ],
)
def test_a_key_changes_the_stages_that_read_it_and_those_below(key, value, stages):
    assert changed(key, value) == stages


def test_the_recipe_says_which_labels_training_reads():
    settings = {"recipe": "clip_es"}
    before, after = prints(**settings), prints(**settings, **{"cams.sinkhorn": 2, "cluster.threshold": 0.7})
    changed_stages = [stage for stage in STAGES if before[stage] != after[stage]]
    assert changed_stages == ["cluster", "cams", "train", "eval", "report", "figures"]
    assert prints()["train"] != prints(**settings)["train"]


def test_facts_and_upstream_enter_the_fingerprint():
    config = Config()
    base = fingerprint(config, "cluster", "a", {"labels": "x"})
    assert base == fingerprint(config, "cluster", "a", {"labels": "x"})
    assert base != fingerprint(config, "cluster", "b", {"labels": "x"})
    assert base != fingerprint(config, "cluster", "a", {"labels": "y"})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.lerning_rate=1", ["train.lerning_rate", "nearest", "train."]),
        ("trian.lr=1", ["'trian'", "'train'"]),
        ("train.lr=-1", ["train.lr", "-1", "greater than 0"]),
        ("train.glm=attn", ["train.glm", "attn", "'attention'"]),
        ("train.lr", ["train.lr", "section.key=value"]),
        ("train.lr.x=1", ["train.lr"]),
        ("train.seed=-1", ["train.seed", "-1"]),
        ("train.threads=0", ["train.threads", "0"]),
        ("cluster.sizes=[]", ["cluster.sizes", "at least 1"]),
        ("cluster.sizes=[3,0]", ["cluster.sizes", "0"]),
        ("cache.tokens=pooled", ["no dense tokens", "clip_es"]),
    ],
)
def test_a_wrong_key_or_value_is_named(setting, words):
    with pytest.raises(ConfigError) as error:
        from_mapping({}, [setting])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


NUMBERS = [key for key, field in fields(Config) if {int, float} & kinds_of(field.annotation)]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "nan", "1e400", "'inf'"])
@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_infinite_or_none(key, value):
    for text in (value, f"[{value}]", f"[1, 2, {value}]"):
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            from_mapping({}, [f"{key}={text}"])


@pytest.mark.parametrize("key", ["data.radius", "student.options", "data.size"])
@pytest.mark.parametrize("value", [".inf", "{a: .nan}", "[1, [-.inf]]"])
def test_nor_in_options_that_the_schema_does_not_know(key, value):
    with pytest.raises(ConfigError, match="finite"):
        from_mapping({}, [f"{key}={value}"])


@pytest.mark.parametrize("value", ["yes", "true", "off", "[true]"])
@pytest.mark.parametrize("key", NUMBERS)
def test_yes_is_no_number(key, value):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        from_mapping({}, [f"{key}={value}"])


@pytest.mark.parametrize(
    "setting",
    [
        *("train.threads=100000", "train.bank=1e8", "train.batch=1e6", "train.workers=1e5", "train.processes=5000"),
        *("train.negatives=1e9", "train.iterations=1e12", "teacher.image_size=100000", "teacher.batch=1e7"),
        *("cluster.iterations=1e9", "cluster.sizes=[1e9]", "cams.max_side=1e6", "cams.batch=1e6", "cams.sinkhorn=1e9"),
        *("eval.batch=1e6", "eval.stride=1e-9", "eval.scales=[1e6]", "eval.pictures=1e9", "report.images=1e9"),
        "eval.gamma_sweep=[" + "1," * 2000 + "1]",
    ],
)
def test_absurd_sizes_are_refused_before_work(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")) as error:
        from_mapping({}, [setting])
    assert len(str(error.value)) < 600


def test_presets_and_paper_are_far_from_the_bounds():
    for path in (ROOT / "config").glob("*.yaml"):
        if path.name != "environment.yaml":
            load(path)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lr", "'train.lr'"),
        ("batch", "'teacher.batch' or 'cams.batch' or 'train.batch' or 'eval.batch'"),
        ("train.image_size", "'teacher.image_size'"),
        ("fraction", "'train.validate.fraction'"),
        ("weights", "'student.weights' or 'train.weights'"),
    ],
)
def test_a_key_of_another_section_is_found(key, says):
    with pytest.raises(ConfigError, match=says):
        from_mapping({}, [f"{key}=1"])


def test_a_dotted_key_in_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train.lr: 1\n")
    with pytest.raises(ConfigError, match=r"inside its section, train: \{lr: "):
        load(path)


@pytest.mark.parametrize("value", ["/data #1", "#1", "[1] # two"])
def test_a_comment_in_a_setting_is_no_value(value):
    with pytest.raises(ConfigError, match="comment"):
        from_mapping({}, [f"data.root={value}"])
    assert from_mapping({}, ["data.root='/data #1'"]).data.options()["root"] == "/data #1"
    assert from_mapping({}, ["data.root=/data#1"]).data.options()["root"] == "/data#1"


def test_a_file_that_says_a_key_twice(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  lr: 1\n  batch: 2\n  lr: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml.*line 4.*'lr' is given twice, first in line 2"):
        load(path)


def test_keys_stay_as_written(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("text: {synonyms: {no: [nope], 0010: [ten]}}\n")
    assert load(path).text.synonyms == {"no": ["nope"], "0010": ["ten"]}


def test_settings_are_typed_as_yaml():
    config = from_mapping(
        {}, ["train.lr=1e-4", "train.potential=false", "cluster.sizes=[2, 5]", "text.templates=['a {}']"]
    )
    assert config.train.lr == 1e-4
    assert config.train.potential is False
    assert config.cluster.sizes == (2, 5)
    assert config.text.templates == ["a {}"]


def test_a_missing_file_names_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "voc.yaml").write_text("name: voc\n")
    with pytest.raises(ConfigError, match=r"config/vox.yaml.*config/voc.yaml"):
        load("config/vox.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"bad.yaml: not readable as YAML"):
        load("bad.yaml")


@pytest.mark.parametrize("value", ["[a {} b]", "[1", "{a: 1"])
def test_a_setting_that_is_not_yaml(value):
    with pytest.raises(ConfigError, match=r"--set 'text.templates=.*not YAML.*quotes"):
        from_mapping({}, [f"text.templates={value}"])


def test_every_key_is_explained_in_the_configs_readme(monkeypatch):
    """The page is what the schema says today; mend it by `python -m pipeline.looking.keys > config/README.md`."""
    from pipeline.looking.keys import page

    monkeypatch.chdir(ROOT)
    wanted = page()
    assert (ROOT / "config" / "README.md").read_text() == wanted
    rows = [line for line in wanted.splitlines() if line.startswith("| `")]
    assert not [row for row in rows if row.endswith("|  |")]  # a key without a meaning
    assert "| `train.lr` | `6e-05` | number > 0 | mmseg's SegFormer schedule, as the three below |" in rows
    assert "| `train.views` | `null` | whole number or null >= 1 |" in "".join(rows)


def test_a_name_that_yaml_takes_for_a_date():
    assert from_mapping(yaml.safe_load("name: 2026-11-21")).name == "2026-11-21"


def test_every_key_says_whether_it_is_content():
    """A key that says nothing fails here; what the data sets' own options bear on is said in OPTIONS."""
    policies = {key: is_content(field) for key, field in fields(Config)}
    assert policies["train.lr"]
    assert not policies["train.workers"]

    class Forgetful(Section):
        key: int = Field(1, description="of no policy")

    with pytest.raises(KeyError, match="is_content"):
        [is_content(field) for _, field in fields(Forgetful)]


def test_every_option_of_a_data_set_says_what_it_bears_on():
    known = set()
    for module, name in KINDS.values():
        known |= options_of(getattr(importlib.import_module(module), name)).keys()
    assert known == OPTIONS.keys()
