"""The languages of --image-opts and json: names. Expected values are QEMU's rules, written out; the
real tools stand beside them in interop/test_qemu_img_names.py.
"""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.image_options import nested, parse_image_opts, parse_json_name
from pynbd.errors import UsageError


@pytest.mark.parametrize(
    "text, options",
    [
        ("", {}),
        ("driver=raw", {"driver": "raw"}),
        (
            "driver=qcow2,file.driver=file,file.filename=a,,b.qcow2",
            {"driver": "qcow2", "file": {"driver": "file", "filename": "a,b.qcow2"}},
        ),
        ("a.b.c=1,a.b.d=2,a.e=3", {"a": {"b": {"c": "1", "d": "2"}, "e": "3"}}),
        ("x=1,x=2", {"x": "2"}),
        ("x=a=b", {"x": "a=b"}),
        ("x=,,", {"x": ","}),
        ("x=,y=1", {"x": "", "y": "1"}),
        ("x=1,", {"x": "1"}),
        ("x=1,,,y=2", {"x": "1,", "y": "2"}),
        ("x=1,read-only", {"x": "1", "read-only": "on"}),
        ("x=1,noread-only", {"x": "1", "read-only": "off"}),
        ("node0,x=1", {"file": "node0", "x": "1"}),
        ("no,,de", {"file": "no,de"}),
    ],
)
def test_image_opts(text: str, options: dict[str, object]) -> None:
    assert parse_image_opts(text) == options


@pytest.mark.parametrize("text", ["=x", "x=1,=y", "x=1,no", "file=x,file.filename=y"])
def test_image_opts_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_image_opts(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


NAMES = st.from_regex(r"[a-mo-z][a-z0-9-]{0,8}", fullmatch=True)
TREES = st.recursive(
    st.text(), lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


def flat(tree: object, path: str = "") -> list[tuple[str, str]]:
    if not isinstance(tree, dict):
        return [(path[:-1], str(tree))]
    return [row for name, value in tree.items() for row in flat(value, f"{path}{name}.")]


@given(TREES)
def test_every_tree_can_be_said(tree: dict[str, object]) -> None:
    """A value is taken as it is, but for its commas, which are doubled."""
    rows = flat(tree)
    text = ",".join(f"{name}={value.replace(',', ',,')}" for name, value in rows)
    assert parse_image_opts(text) == tree
    assert parse_json_name("json:" + json.dumps(tree)) == tree
    assert parse_json_name("json:" + json.dumps(dict(rows))) == tree


@given(st.text(alphabet="ab.=,no", max_size=20))
def test_any_text_is_options_or_refused(text: str) -> None:
    with suppress(UsageError):
        parse_image_opts(text)


@given(st.text(alphabet="""ab.{}[]"'\\:,0 """, max_size=20))
def test_any_text_is_json_or_refused(text: str) -> None:
    with suppress(UsageError):
        parse_json_name("json:" + text)


@pytest.mark.parametrize(
    "name, options",
    [
        ("json:{}", {}),
        ("json: {'a': 'b'}", {"a": "b"}),
        (r"""json:{'a': 'it\'s "b"', "c": "it's"}""", {"a": 'it\'s "b"', "c": "it's"}),
        ('json:{"a.b": 1, "a": {"c": null, "d": true}}', {"a": {"b": 1, "c": None, "d": True}}),
        ('json:{"a": {"b.c": 1}}', {"a": {"b": {"c": 1}}}),
    ],
)
def test_json_names(name: str, options: dict[str, object]) -> None:
    assert parse_json_name(name) == options


@pytest.mark.parametrize(
    "name",
    ["json:", "json:1", "json:[]", "json:{", 'json:{"a": 1, "a.b": 2}', "json:" + '{"a":' * 9999],
)
def test_json_names_that_are_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_json_name(name)
    assert "\n" not in str(caught.value)


def test_nested() -> None:
    assert nested({"a.b": 1, "a": {"c": 2}}, "here") == {"a": {"b": 1, "c": 2}}
    with pytest.raises(UsageError, match=r"here: 'a\.b' is given both"):
        nested({"a": {"b": {"c": 1}}, "a.b": 2}, "here")


def test_nested_too_deep() -> None:
    """A line, wherever Python would have had enough of it."""
    for count in (301, 900, 100_000):
        dotted = "file." * count + "filename"
        with pytest.raises(UsageError, match="options within more than 300 others"):
            nested({dotted: "x"}, "here")
    for count in (301, 900):
        text = 'json:{"driver":"raw"' + ',"file":{"driver":"raw"' * count + "}" * (count + 1)
        with pytest.raises(UsageError, match=r"within more than 300 others|not JSON"):
            parse_json_name(text)
