"""The table of methods."""

import pytest

from rgtg.config import DecodingSettings
from rgtg.decoding.methods import METHODS, check_settings, find_method


def test_the_table_holds_the_methods_of_the_contract():
    assert list(METHODS) == ["policy", "pargs", "pargs-greedy", "args", "args-sample", "best-of-n"]
    assert all(find_method(name).name == name for name in METHODS)
    assert [m.name for m in METHODS.values() if m.scorer == "prefix-bt"] == ["pargs", "pargs-greedy"]
    assert [m.name for m in METHODS.values() if m.rule == "greedy"] == ["pargs-greedy", "args"]


@pytest.mark.parametrize("method", METHODS)
def test_defaults_suit_every_method(method):
    check_settings(find_method(method), DecodingSettings())
