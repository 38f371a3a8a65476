"""A mapping by name or pattern: which key decides for a parameter, and errors that name it."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockprune.core.patterns import check_pattern, matches, matching_keys, resolve_by_name, suggest

names_ = st.text("ab.", min_size=1, max_size=5)
keys = st.one_of(names_, st.sampled_from(["*", "a*", "*.b", "?"]))


@given(st.dictionaries(keys, st.integers(), max_size=4), st.lists(names_, min_size=1))
def test_the_name_itself_comes_first_then_the_first_pattern_that_matches_then_the_star(values: dict[str, int], names: list[str]) -> None:
    unused = [key for key in values if key != "*" and not any(matches(key, name) for name in names)]
    if unused:
        with pytest.raises(KeyError, match=re.escape(f"budget has a key {unused[0]!r} that matches no parameter")):
            resolve_by_name(values, names, what="budget", default=-1)
        return
    patterns = [key for key in values if key != "*"]
    expected = {}
    for name in names:
        chosen = [name] if name in values else [key for key in patterns if matches(key, name)]
        expected[name] = values[chosen[0]] if chosen else values.get("*", -1)
    assert resolve_by_name(values, names, what="budget", default=-1) == expected
    assert {name: -1 if key is None else values[key] for name, key in matching_keys(values, names).items()} == expected


@pytest.mark.parametrize(
    "values", [{"*": 0.1, "a.*": 0.2, "a.w": 0.3}, {"a.w": 0.3, "a.*": 0.2, "*": 0.1}, {"a.*": 0.2, "*": 0.1, "a.w": 0.3}]
)
def test_the_star_has_the_lowest_priority_wherever_it_stands(values: dict[str, float]) -> None:
    assert resolve_by_name(values, ["a.w", "a.v", "b.w"], what="sparsity") == {"a.w": 0.3, "a.v": 0.2, "b.w": 0.1}


def test_the_star_may_match_nothing() -> None:
    assert resolve_by_name({"a": 1, "*": 2}, ["a"], what="sparsity") == {"a": 1}


@pytest.mark.parametrize(
    ("values", "missing"), [({"a.w": 0.5}, "b.w"), ({"b.*": 0.5}, "a.w"), ({"a.*": 0.5, re.compile("^b"): 0.5}, "c"), ({}, "a.w")]
)
def test_a_name_without_a_key_is_an_error_that_names_it(values: Any, missing: str) -> None:
    names = ["a.w", "b.w", "c"]
    with pytest.raises(KeyError) as caught:
        resolve_by_name(values, names, what="sparsity")
    assert not [part for part in (f"sparsity has no key for {missing!r}", "'*'", "no other key matches") if part not in str(caught.value)]
    assert resolve_by_name(values, names, what="sparsity", default=0.25)[missing] == 0.25


def test_a_regular_expression_is_searched_and_a_glob_matches_the_whole_name() -> None:
    assert matches(re.compile("mlp"), "layers.0.mlp.weight")
    assert not matches("mlp", "layers.0.mlp.weight")
    assert matches("*mlp*", "layers.0.mlp.weight")
    assert not matches("*MLP*", "layers.0.mlp.weight")
    pattern: Any = re.compile(r"\.w$")
    assert resolve_by_name({pattern: 1, "*": 0}, ["a.w", "a.v"], what="sparsity") == {"a.w": 1, "a.v": 0}


def test_a_name_that_looks_like_a_pattern_is_its_own_key() -> None:
    assert resolve_by_name({"w[0]": 1}, ["w[0]"], what="sparsity") == {"w[0]": 1}


def test_a_key_that_is_no_name_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"min_keep has a key 5 that is not a parameter name or pattern.*'a'"):
        resolve_by_name({5: 1}, ["a"], what="min_keep")  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "names", "text"),
    [
        ("haed.weight", ["stem.bias", "head.weight"], "; similar names: 'head.weight'"),
        ("weight", ["encoder.weight", "x"], "; similar names: 'encoder.weight'"),
        ("zzz", ["a", "b"], "; the names are 'a', 'b'"),
        ("zzz", list("abcdefgh"), "; the names are 'a', 'b', 'c', 'd', 'e', 'f', ..."),
        ("zzz", [], "; there are no names"),
    ],
)
def test_an_error_suggests_names(name: str, names: list[str], text: str) -> None:
    assert suggest(name, names) == text


@pytest.mark.parametrize("pattern", ["a.*", re.compile("a")])
def test_globs_and_regular_expressions_are_patterns(pattern: Any) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "text"), [(["a", "b"], "must be one pattern; give several"), (re.compile(b"a"), "must be a glob"), (None, "must be a glob")]
)
def test_what_is_no_pattern_is_refused(pattern: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        check_pattern(pattern)
    if not isinstance(pattern, list):
        with pytest.raises(KeyError, match="is not a parameter name or pattern"):
            resolve_by_name({pattern: 1}, ["a"], what="sparsity")
