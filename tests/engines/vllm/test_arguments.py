"""Arguments of guided requests: what is read, and that everything else is refused with one line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgtg.engines.vllm.arguments import read_guide, require_sampling, xargs
from rgtg.errors import UsageError

KNOWN = {"helpful": True, "short": True, "slow": False}


class Sampling:
    """What `require_sampling` reads of vLLM's SamplingParams."""

    def __init__(self, temperature=1.0, repetition_penalty=1.0):
        self.temperature, self.repetition_penalty = temperature, repetition_penalty


def test_requests_without_guidance():
    for arguments in (None, {}, {"other": 1}, {"rgtg_method": "policy"}):
        assert read_guide(arguments, KNOWN) is None


def test_what_is_read():
    guide = read_guide({"rgtg_scorers": "helpful", "other": object()}, KNOWN)
    assert (guide.scorers, guide.betas, guide.top_k, guide.method.name) == (("helpful",), (1.0,), 10, "pargs")
    guide = read_guide(xargs(["helpful", "short"], [2, -0.5], top_k="all"), KNOWN)
    assert (guide.scorers, guide.betas, guide.top_k) == (("helpful", "short"), (2.0, -0.5), None)
    assert read_guide(xargs("short", 3, method="genarm"), KNOWN).top_k is None
    assert read_guide(xargs("short", 3, method="rad"), KNOWN).top_k == 20
    assert read_guide(xargs("short", 3, top_k=1), KNOWN).top_k == 1


REFUSED = {
    "a wrong name": ({"rgtg_scorer": "helpful"}, "did you mean rgtg_scorers?"),
    "an unknown name": ({"rgtgx": 1}, "unknown argument 'rgtgx'"),
    "betas alone": ({"rgtg_betas": [1.0]}, "rgtg_scorers = None"),
    "an unknown scorer": (xargs("nice"), "unknown scorer 'nice'; this server has helpful, short, slow"),
    "no scorers": (xargs([]), "rgtg_scorers = []"),
    "a number as a scorer": ({"rgtg_scorers": 3}, "rgtg_scorers = 3"),
    "numbers as scorers": ({"rgtg_scorers": [1, "short"]}, "rgtg_scorers = "),
    "a scorer twice": (xargs(["short", "short"]), "names a scorer twice"),
    "many scorers": (xargs(["short"] * 17), "at most 16"),
    "too few betas": ({"rgtg_scorers": ["short", "slow"], "rgtg_betas": 1.0}, "1 numbers for 2 scorers"),
    "text as a beta": ({"rgtg_scorers": "short", "rgtg_betas": "2"}, "expected finite numbers"),
    "true as a beta": ({"rgtg_scorers": "short", "rgtg_betas": True}, "expected finite numbers"),
    "NaN": (xargs("short", math.nan), "expected finite numbers"),
    "infinity": (xargs("short", math.inf), "expected finite numbers"),
    "a huge whole number": (xargs("short", 10**400), "expected finite numbers"),
    "top_k zero": (xargs("short", top_k=0), "rgtg_top_k = 0"),
    "a fraction": (xargs("short", top_k=1.5), "rgtg_top_k = 1.5"),
    "true": (xargs("short", top_k=True), "rgtg_top_k = True"),
    "a list": (xargs("short", top_k=[3]), "rgtg_top_k = [3]"),
    "an unknown method": (xargs("short", method="magic"), "rgtg_method = 'magic': expected one of policy, pargs"),
    "a list as a method": (xargs("short", method=["pargs"]), "rgtg_method = "),
    "a method of segments": (xargs("short", method="cards"), "decides on a whole segment"),
    "best-of-n": (xargs("short", method="best-of-n"), "decides on a whole completion"),
    "a scorer without guidance": (xargs("short", method="policy"), "is not guided: leave rgtg_betas, rgtg_scorers out"),
    "many candidates of a slow scorer": (xargs("slow", top_k=257), "at most 256 candidates"),
    "all candidates of a slow scorer": (xargs(["short", "slow"], [1, 1], top_k="all"), "at most 256 candidates"),
    "a slow scorer": (xargs("slow", method="genarm"), "slow scores one prefix at a time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    arguments, message = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        read_guide(arguments, KNOWN)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_sampling_parameters_that_would_change_what_guidance_means():
    guide = read_guide(xargs("short"), KNOWN)
    require_sampling(guide, Sampling(temperature=0.7))
    with pytest.raises(UsageError, match="repetition_penalty"):
        require_sampling(guide, Sampling(repetition_penalty=1.1))
    greedy = read_guide(xargs("short", method="pargs-greedy"), KNOWN)
    require_sampling(greedy, Sampling(temperature=0))
    with pytest.raises(UsageError, match="has no temperature"):
        require_sampling(greedy, Sampling(temperature=0.7))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["short", "pargs"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
ANY_NAME = st.sampled_from(["rgtg_scorers", "rgtg_betas", "rgtg_top_k", "rgtg_method"]) | st.text(max_size=8)


@given(st.dictionaries(ANY_NAME | ANY_NAME.map("rgtg_{}".format), VALUES, max_size=5))
def test_anything_is_read_or_refused(arguments):
    try:
        guide = read_guide(arguments, KNOWN)
    except UsageError:
        return
    if guide is not None:
        assert set(guide.scorers) <= set(KNOWN)
        assert len(guide.betas) == len(guide.scorers)
        assert guide.top_k is None or guide.top_k >= 1


def test_a_method_that_the_table_of_engines_lacks_is_refused():
    with pytest.raises(UsageError, match="rgtg_method = vfd: vLLM cannot carry it: the plug-in adds scores"):
        read_guide({"rgtg_scorers": "helpful", "rgtg_method": "vfd"}, {"helpful": True})
