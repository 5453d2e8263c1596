"""rgtg plan: what fits, batch and split, measured rates, and errors."""

import functools
import json

import pytest
from benchmarks import plan as benchmark

from helpers.command import verb
from helpers.naive import info
from helpers.tiny_models import tiny_policy
from rgtg.config import PlanSettings
from rgtg.decoding.methods import METHODS
from rgtg.errors import DataError, ModelNotFoundError, UsageError
from rgtg.models.loading.scorer_info import write_info
from rgtg.planning import calibrate
from rgtg.planning.hardware import Device, from_sheet, parse_hardware
from rgtg.planning.model_shapes import count_shape, model_shape
from rgtg.planning.plan import make_plan

plan = verb("plan")
EIGHT = ("--policy", "70B", "--scorer", "8B", "--k", "10", "--hardware", "h200x8", "--prompts", "1e6")


@pytest.fixture
def quick(monkeypatch):
    """Calibration by one try of everything."""
    once = functools.partial(calibrate.measure_device, tries=1)
    monkeypatch.setattr(calibrate, "measure_device", once)


def planned(**given):
    return make_plan(PlanSettings(**{"policy": "8B", "scorer": "1B", "hardware": "h200"} | given))


def row_of(result, method, scorer="separate"):
    (row,) = [row for row in result.rows if (row.method, row.scorer) == (method, scorer)]
    return row


def test_a_plan_states_its_assumptions():
    result = plan(*EIGHT, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert {row["method"] for row in said["rows"]} == set(METHODS)
    assert all(row["fits"] for row in said["rows"])
    assert said["settings"]["prompts"] == 1_000_000
    assumed = "\n".join(said["assumptions"])
    for told in ("H200 SXM data sheet", "75%", "no GPU was measured", "256 tokens", "bfloat16", "cards draws 2.6"):
        assert told in assumed
    shown = plan(*EIGHT).stdout
    for told in ("pargs-greedy", "state head", "device-h", *said["assumptions"]):
        assert told in shown
    assert max(map(len, shown.split("batch: ")[0].splitlines())) <= 80


def test_a_70b_policy_needs_more_than_one_device():
    one, eight = planned(policy="70B", scorer="8B"), planned(policy="70B", scorer="8B", hardware="h200x8")
    assert not row_of(one, "pargs").fits
    row = row_of(eight, "pargs")
    assert row.fits
    assert row.tensor_parallel * row.copies == 8
    assert row.weights_gb * row.tensor_parallel == pytest.approx(2 * (70.6 + 7.5), rel=0.01)
    assert "too large" in plan("--policy", "70B", "--hardware", "h200").stdout


def test_the_limits_are_those_of_the_data_sheet():
    # 8 billion weights of two bytes, read at three quarters of 4.8 TB/s, and the embedding that is not read
    row = row_of(planned(batch_size=1), "policy", "none")
    assert row.limit_ms == pytest.approx(1e3 * 2 * (8.03e9 - 128_256 * 4096) / (0.75 * 4.8e12), rel=0.02)
    assert row.ms_per_token > row.limit_ms


def test_hours_follow_the_prompts_and_the_devices():
    few, many = planned(prompts=64_000), planned(prompts=640_000)
    two = planned(prompts=64_000, hardware="h200x2", tensor_parallel=1)
    for method in ("pargs", "best-of-n"):
        assert row_of(many, method).hours == pytest.approx(10 * row_of(few, method).hours)
        assert row_of(two, method).hours == pytest.approx(row_of(few, method).hours / 2)
        assert row_of(two, method).device_hours == pytest.approx(row_of(few, method).device_hours)
    row = row_of(few, "pargs")
    assert row.tokens_per_second == pytest.approx(64_000 * 256 / (3600 * row.hours))


def test_the_batch_is_the_one_that_fits():
    small = from_sheet("h200", "bfloat16").model_copy(update={"memory": 22e9})
    large = planned(new_tokens=2048, prompt_tokens=4096)
    held = row_of(large, "pargs")
    assert held.batch == 64
    from rgtg.planning import plan as module

    row = module._best_row(
        module.MethodVariant(METHODS["pargs"], "separate"),
        PlanSettings(policy="8B", prompt_tokens=4096, new_tokens=2048),
        model_shape("8B"), model_shape("1B"), small, 1,
    )  # fmt: skip
    assert row.fits
    assert row.batch < 64
    assert row.weights_gb + row.caches_gb + row.work_gb <= 0.9 * 22


def test_folders_are_counted_exactly_and_show_their_kind(policy_folder, scorer_folder, tmp_path):
    shape = model_shape(str(policy_folder))
    assert shape == count_shape(tiny_policy(), str(policy_folder))
    assert shape.exact
    result = planned(policy=str(policy_folder), scorer=str(scorer_folder))
    assert {row.scorer for row in result.rows} == {
        "none", "separate", "adapter", "vocabulary", "state head", "vocabulary head"
    }  # fmt: skip
    write_info(scorer_folder, info())
    assert {row.scorer for row in planned(scorer=str(scorer_folder)).rows} == {"none", "separate"}
    for trunk, head, kind in (("own", "state", "state head"), ("own", "vocab", "vocabulary head"),
                              ("shared", "scalar", "adapter")):  # fmt: skip
        write_info(tmp_path, info().model_copy(update={"trunk": trunk, "head": head}))
        assert {row.scorer for row in planned(scorer=str(tmp_path)).rows} == {"none", kind}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(policy_folder)})
    )  # fmt: skip
    assert model_shape(str(tmp_path / "lora")).trunk == shape.trunk


def test_only_the_config_is_downloaded_from_the_hub(policy_folder, hub):
    hub.put("me/policy", {path.name: path.read_bytes() for path in policy_folder.iterdir()})
    assert model_shape("me/policy").trunk == model_shape(str(policy_folder)).trunk
    assert not [path for _, path in hub.requests if "safetensors" in path or "tokenizer" in path]
    hub.put("me/nothing", {"README.md": b"none"})
    for source, told in (("me/nothing", "has no config.json"), ("me/nobody", "no such model")):
        with pytest.raises(ModelNotFoundError, match=told):
            model_shape(source)


def test_a_folder_may_be_named_like_a_number(policy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy_folder.rename(tmp_path / "70GB")
    assert model_shape("70GB").exact


def test_sizes_between_known_models_are_scaled():
    known, between = model_shape("8B"), model_shape("20B")
    assert (known.layers, known.hidden, known.kv_heads) == (32, 4096, 8)
    assert known.total == pytest.approx(8.03e9, rel=0.01)
    assert between.total == 20e9
    assert known.layers < between.layers < model_shape("70B").layers
    for size, total in (("0.5B", 0.494e9), ("3B", 3.21e9), ("32B", 32.8e9), ("70B", 70.6e9), ("405B", 405.9e9)):
        assert model_shape(size).total == pytest.approx(total, rel=0.01)
    assert model_shape("1B").total == 1e9  # a fifth less than the nearest


def test_measured_rates_are_saved_and_read_back(quick, policy_folder, tmp_path):
    file = tmp_path / "here.json"
    options = ("--policy", policy_folder, "--dtype", "float32", "--prompts", "10", "--new-tokens", "8", "--json")
    ran = plan(*options, "--hardware", "cpu", "--save-hardware", file)
    assert ran.exit_code == 0, ran.stderr
    first = json.loads(ran.stdout)
    device = Device.model_validate_json(file.read_text())
    assert device.measured
    assert first["device"] == device.model_dump(mode="json")
    assert 1e8 < device.bandwidth < 1e12
    assert 1e9 < device.compute < 1e14
    assert all(value >= 0 for value in device.model_dump().values() if isinstance(value, float))
    again = json.loads(plan(*options, "--hardware", file).stdout)
    assert again["rows"] == first["rows"]
    assert "measured here" in "".join(again["assumptions"])
    other = plan("--policy", policy_folder, "--hardware", file)
    assert (other.exit_code, "was measured in float32" in other.stderr) == (2, True)


def test_more_rows_and_layers_cost_more_on_this_machine(quick):
    device = calibrate.measure_device("cpu", "float32")
    assert device.pass_seconds < 0.1
    assert 0 < device.layer_seconds < 0.05
    assert device.step_seconds < 0.1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--policy", "8B", "--hardware", "tpu"), "unknown hardware 'tpu'; expected one of a100"),
        (("--policy", "8B", "--hardware", "h200x0"), "unknown hardware"),
        (("--policy", "8B", "--hardware", "h200x100001"), "'h200x100001': expected at most 100,000 devices"),
        (("--policy", "8B", "--hardware", f"h200x{'9' * 5000}"), "expected at most 100,000 devices"),
        (("--policy", "3M", "--hardware", "h200"), "sizes from 10M"),
        *(
            (("--policy", name, "--hardware", "h200"), f"{name} is no folder, and no size: those are written 70B")
            for name in ("70GB", "1e9B", "7b-chat", "1,5B", ".5B", "7 B", "1T")
        ),
        (("--policy", "8B", "--scorer", "8BB", "--hardware", "h200"), "8BB is no folder, and no size"),
        (("--policy", "./7b", "--hardware", "h200"), "no model folder ./7b"),
        (("--policy", "70", "--hardware", "h200"), "it needs a unit: 70B or 70M"),
        (("--policy", "nowhere/at/all", "--hardware", "h200"), "no model folder nowhere/at/all"),
        (("--policy", "8B", "--hardware", "h200x8", "--tensor-parallel", "3"), "does not divide 8 devices"),
        (("--policy", "8B", "--hardware", "h200", "--save-hardware", "x.json"), "use it with --hardware cpu"),
        (("--policy", "8B", "--hardware", "h200", "--prompts", "1.5"), "prompts"),
        (("--policy", "8B", "--hardware", "h200", "--prompts", "many"), "prompts"),
        (("--policy", "8B", "--hardware", "h200", "--dtype", "int8"), "dtype"),
        (("--policy", "8B", "--hardware", "h200", "--set", "batch=3"), "did you mean batch_size"),
        (("--hardware", "h200"), "policy"),
    ],
)
def test_unusable_inputs_are_errors(options, told):
    ran = plan(*options)
    assert ran.exit_code == 2
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr


def test_damaged_hardware_files_and_models_are_errors(tmp_path, policy_folder):
    file = tmp_path / "here.json"
    with pytest.raises(DataError, match="cannot read the hardware"):
        planned(hardware=str(file))
    file.write_text('{"name": "cpu"}')
    with pytest.raises(DataError, match="is not what --save-hardware writes"):
        planned(hardware=str(file))
    (policy_folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}')
    with pytest.raises(ModelNotFoundError, match="cannot determine the sizes"):
        planned(policy=str(policy_folder))
    (policy_folder / "config.json").unlink()
    (policy_folder / "adapter_config.json").write_text("[]")
    with pytest.raises(DataError, match="names no base model"):
        planned(policy=str(policy_folder))
    with pytest.raises(UsageError, match="unknown hardware"):
        parse_hardware("h200x")


def test_the_benchmark_compares_every_row(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["plan.py", "--tiny", "--output", str(tmp_path / "plan.json")])
    benchmark.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "plan.json").read_text())
    assert {row["method"] for row in last["rows"]} == set(METHODS)
    assert all(0.02 < row["ratio"] < 50 for row in last["rows"])
