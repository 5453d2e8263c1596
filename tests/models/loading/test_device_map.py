"""Models that a device map spreads over memory and disk give the same results; wrong settings raise errors."""

import pytest
import torch

from helpers.command import verb
from helpers.naive import info, write_adapter
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg import GuidedPolicy
from rgtg.errors import UsageError
from rgtg.models.loading import device_map
from rgtg.models.loading.device_map import has_device_map, memory_bytes
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import fingerprint_weights, write_info
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.reward_model import PrefixScorer

# peft reads an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PROMPTS = ["so it ", "A long time ago, "]
SPREAD = {f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")} | {
    "model.layers.1": "disk"
}
OF_POLICY, OF_SCORER = SPREAD | {"lm_head": "disk"}, SPREAD | {"score": "disk"}


def tokens(*models, **settings):
    guided = GuidedPolicy.from_pretrained(*map(str, models), **settings)
    return guided, [one.token_ids for one in guided.generate(PROMPTS, max_new_tokens=12, temperature=0.8, seed=3)]


@pytest.fixture
def scorer_folder(scorer_folder):
    """A reward model that was trained on prefixes."""
    write_info(scorer_folder, info("prefix-bt"))
    return scorer_folder


@pytest.fixture
def language_model_folder(tmp_path):
    """A language model that scores next tokens."""
    folder = tmp_path / "genarm"
    tiny_policy(seed=5).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_info(folder, info("autoregressive").model_copy(update={"head": "vocab"}))
    return folder


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize(
    "places",
    [
        {"device_map": OF_POLICY},
        {"scorer_device_map": OF_SCORER},
        {"device_map": OF_POLICY, "scorer_device_map": OF_SCORER},
    ],
)
def test_a_device_map_of_policy_and_scorer_gives_the_same_tokens(policy_folder, scorer_folder, places, tree):
    whole, expected = tokens(policy_folder, scorer_folder, device="cpu", token_tree=tree)
    spread, found = tokens(policy_folder, scorer_folder, token_tree=tree, **places)
    assert has_device_map(spread.policy.model) == ("device_map" in places)
    assert has_device_map(spread.scorers[0].model) == ("scorer_device_map" in places)
    assert found == expected
    for one, other in zip((whole.policy, *whole.scorers), (spread.policy, *spread.scorers), strict=True):
        assert fingerprint_weights(one.model) == fingerprint_weights(other.model)


def test_a_device_map_of_a_next_token_scorer_gives_the_same_tokens(policy_folder, language_model_folder):
    _, expected = tokens(policy_folder, language_model_folder, method="genarm", device="cpu")
    spread, found = tokens(
        policy_folder, language_model_folder, method="genarm", device_map=OF_POLICY, scorer_device_map=OF_POLICY
    )
    assert has_device_map(spread.scorers[0].model)
    assert found == expected


def test_a_device_map_gives_the_same_scores_of_whole_texts(scorer_folder):
    whole, spread = (load_scorer(str(scorer_folder), **one) for one in ({"device": "cpu"}, {"device_map": OF_SCORER}))
    assert isinstance(spread, PrefixScorer)
    assert spread.score(PROMPTS, ["ab", "c."]) == pytest.approx(whole.score(PROMPTS, ["ab", "c."]), abs=1e-6)


def test_device_maps_from_the_command_line_and_a_settings_file(policy_folder, scorer_folder, tmp_path):
    arguments = ["--policy", policy_folder, "--scorer", scorer_folder, "--prompt", "so ", "--temperature", "0"]
    whole = verb("generate")(*arguments)
    auto = verb("generate")(*arguments, "--device-map", "auto", "--scorer-device-map", "cpu")
    places = "\n".join(f"  {name}: {place}" for name, place in OF_POLICY.items())
    (tmp_path / "places.yaml").write_text(f"device_map:\n{places}\n")
    spread = verb("generate")(*arguments, "--config", tmp_path / "places.yaml")
    assert (whole.exit_code, auto.exit_code, spread.exit_code) == (0, 0, 0), (auto.output, spread.output)
    assert whole.stdout == auto.stdout == spread.stdout


@pytest.fixture
def adapter_folder(tmp_path):
    """A LoRA adapter of a reward model, of the policy's trunk."""
    pytest.importorskip("peft")
    return write_adapter(tmp_path / "adapter", tmp_path / "base")


def test_an_adapter_is_merged_on_one_device_only(policy_folder, adapter_folder):
    write_info(adapter_folder, info("prefix-bt"))
    _, expected = tokens(policy_folder, adapter_folder, device="cpu")
    with pytest.raises(UsageError, match="can only be merged into a base model on one device"):
        tokens(policy_folder, adapter_folder, scorer_device_map=OF_SCORER)
    assert tokens(policy_folder, adapter_folder, scorer_device_map={"": "cpu"})[1] == expected


def test_an_adapter_on_the_trunk_of_a_policy_with_a_device_map_raises_an_error(policy_folder, adapter_folder):
    write_info(adapter_folder, info("prefix-bt").model_copy(update={"trunk": "shared"}))
    with pytest.raises(UsageError, match="load the policy without device_map"):
        tokens(policy_folder, adapter_folder, device_map=OF_POLICY)
    with pytest.raises(UsageError, match="an adapter is where its policy is"):
        tokens(policy_folder, adapter_folder, scorer_device_map=OF_SCORER)


def test_a_model_on_one_device_has_no_device_map(policy_folder):
    assert not has_device_map(load_policy(str(policy_folder), device="cpu").model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"scorer_device": "cpu", "scorer_device_map": "auto"}, "give one of them"),
        ({"device_map": OF_POLICY | {"model.embed_tokens": "disk"}}, "embedding must be on a device"),
        ({"device_map": "everywhere"}, "everywhere"),
        ({"device_map": {"": "cuda:77"}}, "cannot load the policy"),
    ],
)
def test_unusable_placements_raise_an_error_of_one_line(policy_folder, scorer_folder, settings, said):
    with pytest.raises(UsageError) as caught:
        GuidedPolicy.from_pretrained(str(policy_folder), str(scorer_folder), **settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_device_map_of_a_loaded_model_raises_an_error(policy_folder, scorer_folder):
    loaded = Policy(tiny_policy(), tiny_tokenizer())
    with pytest.raises(UsageError, match="device_map applies to a policy loaded by name"):
        GuidedPolicy.from_pretrained(loaded, str(scorer_folder), device_map="auto")
    with pytest.raises(UsageError, match="loaded by name"):
        load_policy(loaded, device_map="auto")
    scorer = PrefixScorer(tiny_reward_model(), tiny_tokenizer())
    with pytest.raises(UsageError, match="scorer_device_map and scorer_tp_plan apply to a scorer loaded by name"):
        GuidedPolicy.from_pretrained(str(policy_folder), scorer, scorer_device_map="auto")
    with pytest.raises(UsageError, match="scorer that is a model of its own"):
        GuidedPolicy.from_pretrained(str(policy_folder), None, method="policy", scorer_device_map="auto")


def test_outputs_are_on_the_device_of_the_inputs(policy_folder):
    model = load_policy(str(policy_folder), device_map=OF_POLICY).model
    assert model(input_ids=torch.tensor([[5, 9]])).logits.device == model.device == torch.device("cpu")


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def half_folder(policy_folder, tmp_path, request):
    """A policy saved in a 16-bit dtype."""
    policy = load_policy(str(policy_folder), dtype=request.param)
    policy.model.save_pretrained(tmp_path / "half")
    policy.tokenizer.save_pretrained(tmp_path / "half")
    return tmp_path / "half", request.param


@pytest.mark.parametrize("named", [None, "auto"])
def test_a_cpu_that_cannot_multiply_16_bit_weights_computes_in_float32(half_folder, monkeypatch, named):
    folder, dtype = half_folder
    monkeypatch.setattr(device_map, "multiplies", lambda dtype: dtype == torch.float32)
    wide = load_policy(str(folder), dtype=named, device="cpu").model
    narrow = load_policy(str(folder), dtype=dtype, device="cpu").model
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype), "a dtype that was asked for is kept"
    assert fingerprint_weights(wide) == fingerprint_weights(narrow), "the same weights, to the bit"


def test_16_bit_weights_stay_where_the_cpu_multiplies_them_or_memory_is_short(half_folder, monkeypatch):
    folder, dtype = half_folder
    monkeypatch.setattr(device_map, "multiplies", lambda dtype: True)
    assert load_policy(str(folder), device="cpu").model.dtype == dtype
    monkeypatch.setattr(device_map, "multiplies", lambda dtype: False)
    monkeypatch.setattr(device_map, "memory_bytes", lambda: 1e4)
    assert load_policy(str(folder), device="cpu").model.dtype == dtype


def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device_map, "_CONTAINER_LIMIT", limit)
    machine = memory_bytes()
    for text, expected in (("max\n", machine), ("1048576\n", 2**20), (f"{2**60}\n", machine)):
        limit.write_text(text)
        assert memory_bytes() == expected
