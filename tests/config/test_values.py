"""Values as they are typed, and what is said of wrong ones."""

import ast

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as some

from preftune.config.values import Wants, wants, written

SCALARS = some.booleans() | some.none() | some.integers() | some.sampled_from([1e-6, 5e-7, 0.1, 2.5, 1.0, 1e20, 0.0])


@settings(max_examples=50, deadline=None)
@given(SCALARS | some.lists(SCALARS, max_size=3) | some.dictionaries(some.sampled_from("abc"), SCALARS, min_size=1))
def test_a_written_value_is_read_back_by_hydra(value):
    assert OverridesParser.create().parse_override(f"key={written(value)}").value() == value


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        ("int", [1, -1], [1.5, True, "1", None, [1]]),
        ("float", [1, 1.5], [True, "abc", None]),
        ("bool", [True, False], [1, "true", None]),
        ("str | None", ["a", None], [1, True, ["a"]]),
        ("Optional[Union[list[str], str]]", ["a", ["a", "b"], None], [1, [1]]),
        ("list[float] | None", [[1, 2.5], None], [1.0, ["a"]]),
        ("dict[str, Any] | str", [{"a": 1}, "a.json"], [1, ["a"]]),
        ("Literal['none', 'all']", ["none", "all"], ["some", 1]),
        ("bool | Literal['eva', 'pissa_niter_[number of iters]']", [True, "eva", "pissa_niter_4"], ["evo", 3]),
        ("SomeClass | None", [1, "a", {"a": 1}], []),
    ],
)
def test_an_annotation_accepts_what_it_names(annotation, right, wrong):
    wanted = wants(ast.parse(annotation, mode="eval").body, lambda name: None)
    assert all(wanted.accepts(value) for value in right)
    assert not any(wanted.accepts(value) for value in wrong)


def test_the_example_is_what_was_meant_where_that_can_be_told():
    assert Wants(frozenset({"bool"})).example("yes", False) is True
    assert Wants(frozenset({"list"}), items=Wants(frozenset({"str"}))).example("ipo", ["sigmoid"]) == ["ipo"]
    assert Wants(frozenset({"str"})).example(5, None) == "'\"5\"'"
    assert Wants(frozenset({"float"})).example("abc", 5e-5) == 5e-5
