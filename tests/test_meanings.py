"""One fact around a finished run changes: the next stage does its work again, says why not, or nothing differs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.meanings import FAULTS, HARMLESS, World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(what=st.sampled_from(sorted(FAULTS)), seed=st.integers(0, 2**16))
def test_a_change_is_noticed(world, what, seed):
    assert world.tried(what, seed) == ""


@settings(max_examples=2, deadline=None, derandomize=True)
@given(what=st.sampled_from(sorted(HARMLESS)), seed=st.integers(0, 2**16))
def test_what_makes_no_difference_makes_no_work(world, what, seed):
    assert world.tried(what, seed) == ""
