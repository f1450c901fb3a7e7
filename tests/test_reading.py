"""YAML, read strictly: what isn't plain is one line, whatever the text, and what we write reads back."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.reading import MAX_ALIASED, Unreadable, read_yaml, yaml_text


def bomb(levels, width):
    lines = ["a0: &a0 [" + ", ".join("x" * width) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * width) + "]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: {c: 2, c: 3}", "line 2, column 11: key 'c' is given twice, first in line 2"),
        ("1: a\n0x1: b", "key '0x1' is given twice, first in line 1"),
        (bomb(9, 9), "aliases repeat more than"),
        ("<<: &a {x: 1}\nb: &b [*a, *b]", "inside its own anchor"),
        ("a: *b", "undefined alias"),
        ("[" * 100_000, "levels of nesting"),
        ("- " * 60 + "a", "levels of nesting"),
        ("a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99)), "levels of nesting"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
        ("a: b\0c", "character 5 is U.0000"),
        ('a: "b\\0c"', "U.0000, which is no text"),
        ('a: "\\e[31m"', "U.001B, which is no text"),
        ('a: "\\ud800"', "U.D800, which is no text"),
        ("\udc80", "U.DC80"),
        ('a: "\\U99999999"', "not readable"),
        ("a: !!binary aGk=", "tag .*binary"),
        ("a: !!python/object/apply:os.system [ls]", "tag .*python"),
        ("a: !!timestamp 2026-11-21", "tag .*timestamp"),
        ("a: !!bool maybe", "neither true nor false"),
        ("a: !!int b", "not readable"),
        ("a: [1", "line 1, column 6: expected"),
        ("a: 1\n---\nb: 2", "single document"),
        ("? [1]\n: 2", "unhashable"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(
        Unreadable, match=f"^here: not readable as YAML: .*{says.removeprefix('not readable')}"
    ) as error:
        read_yaml(text, where="here")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("0010", "0010"),  # 8 in YAML 1.1, 10 in YAML 1.2
        ("-007", "-007"),
        ("12:30", "12:30"),  # 750 in YAML 1.1
        ("2026-11-21", "2026-11-21"),
        ("0.5", 0.5),
        ("yes", True),
        ("", None),
        ("=", "="),
        ("9" * 300, int("9" * 300)),
        ("{a: &x [1, 2], b: *x, c: {<<: {d: 1}, d: 2}}", {"a": [1, 2], "b": [1, 2], "c": {"d": 2}}),
        ("{base: &b {x: 1, y: 2}, more: {<<: *b, x: 3}}", {"base": {"x": 1, "y": 2}, "more": {"x": 3, "y": 2}}),
    ],
)
def test_what_is_read(text, value):
    found = read_yaml(text, where="here")
    assert found == value
    assert type(found) is type(value)


def test_keys_that_are_text():
    text = "0001: [a]\n8: [b]\n'0010': c\nno: d\n~: e\n1e3: f\n2026-11-21: g\n"
    found = read_yaml(text, where="tags", keys_are_text=True)
    assert list(found) == ["0001", "8", "0010", "no", "~", "1e3", "2026-11-21"]
    assert found["no"] == "d"
    assert set(read_yaml(text, where="tags")) == {"0001", 8, "0010", False, None, 1000.0, "2026-11-21"}
    with pytest.raises(Unreadable, match="'8' is given twice"):
        read_yaml("8: a\n'8': b", where="tags", keys_are_text=True)
    assert read_yaml("8: a\n'8': b", where="tags") == {8: "a", "8": "b"}


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa4\n")
    assert read_yaml(path, where="a") == {"a": "ä"}
    path.write_bytes(b"a: \xe4\n")
    for odd in (path, tmp_path, tmp_path / "none", tmp_path / ("n" * 300)):
        with pytest.raises(Unreadable, match=r"^b: not readable as YAML: "):
            read_yaml(odd, where="b")


def test_aliases_that_people_write():
    """A list of 40 classes, named 100 times."""
    names = ", ".join(f"class{i}" for i in range(40))
    found = read_yaml(f"- &names [{names}]\n" + "- *names\n" * 100, where="names")
    assert len(found) == 101
    assert MAX_ALIASED > 41 * 100


PIECES = st.sampled_from(
    [
        "a",
        "1",
        "0",
        "- ",
        ": ",
        "? ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&a ",
        "*a",
        "<<",
        "!!int ",
        "!!map ",
        "!x ",
        "!",
        "'",
        '"',
    ]
    + [
        "\n",
        "\n  ",
        "|\n",
        ">-\n",
        "#",
        " #",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "~",
        ".inf",
        "0x",
        "0b",
        "-",
        "1e9",
        "\t",
        "\0",
    ]
    + ["\\U99999999", "\\x00", "@", "`", "=", "9" * 400, "\ufeff", "\ud800", "\x85", "\u2028", "é", "_", "yes", "12:30"]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join)), st.booleans())
def test_any_text_is_read_or_refused_in_one_line(text, keys_are_text):
    began = time.perf_counter()
    refused = ["any: not readable as YAML: "]
    try:
        read_yaml(text, where="any", keys_are_text=keys_are_text)
    except Unreadable as error:
        refused = str(error).splitlines()
    assert len(refused) == 1
    assert refused[0].startswith("any: not readable as YAML: ")
    assert time.perf_counter() - began < 5


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 12), st.sampled_from(["&a{i} [{x}]", "&a{i} {{k: {x}}}", "&a{i} {{<<: [{x}]}}"])
)
def test_no_repetition_grows_out_of_hand(levels, width, form):
    lines = ["- &a0 {k: 1}"]
    for i in range(1, levels):
        x = ", ".join([f"*a{i - 1}"] * (1 if "k: " in form else width))
        lines.append("- " + form.format(i=i, x=x))
    began = time.perf_counter()
    with contextlib.suppress(Unreadable):
        assert len(repr(read_yaml("\n".join(lines), where="any"))) < 1_000_000
    assert time.perf_counter() - began < 5


WRITABLE = st.characters(blacklist_categories=("Cs", "Cc"))
TEXT = st.one_of(
    st.text(WRITABLE),
    st.from_regex(r"[-+]?[0-9_.:eExobf]{1,8}", fullmatch=True),
    st.sampled_from(["no", "~", "<<", "=", "1e-4", "0001", "2026-11-21", ".inf", "null", "12:30", "0o7"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
    )
)
def test_what_we_write_reads_back_the_same(value):
    text = yaml_text(value)
    found = read_yaml(text, where="ours")
    assert found == value
    assert repr(found) == repr(value)
