"""The command line: files of prompts, also killed half way, what reads their outputs, and training."""

import json
import multiprocessing
import time
from pathlib import Path

from goldens import told
from goldens.command import rgtg
from goldens.decoding import CARDS, PROMPTS
from goldens.models import write_rows

OBJECTIVES = {
    "prefix-bt": [], "full-bt": [], "farma": [], "autoregressive": [], "tcrm": [],
    "weighted": ["--objective", "prefix-bt", "--set", "prefix_bt.position_weights=linear", "--set",
                 "prefix_bt.prefixes=2"],
    "trusted": ["--objective", "prefix-bt", "--reference-scorer", "whole"],
    "lora": ["--objective", "prefix-bt", "--set", "lora.r=2"],
    "shared": ["--objective", "prefix-bt", "--trunk", "shared"],
    "state": ["--objective", "prefix-bt", "--trunk", "own", "--head", "state"],
    "vocab": ["--objective", "prefix-bt", "--trunk", "own", "--head", "vocab"],
    "farma-vocab": ["--objective", "farma", "--trunk", "own", "--head", "vocab", "--set", "layer=1", "--set",
                    "width=8"],
}  # fmt: skip
ROLLOUTS = {
    "value": [], "cumulative-mse": ["--set", "cumulative_mse.reward_range=[-3, 3]"],
    "value-q": ["--objective", "value", "--set", "value.target=q", "--trunk", "own", "--head", "vocab"],
    "value-state": ["--objective", "value", "--trunk", "own", "--head", "state"],
}  # fmt: skip


ROWS = 32  # of a job that is killed


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def of_models(**settings):
    """Arguments of ``rgtg generate``."""
    given = {"policy": "policy", "scorer": "reward", "device": "cpu", "max_new_tokens": 8} | settings
    flags = [[f"--{name.replace('_', '-')}", value] for name, value in given.items() if value is not None]
    return [part for flag in flags for part in flag]


def prompts(path, shape, rows=24):
    """A file of prompts: records of several kinds, or lines of an OpenAI batch with settings of their own."""
    made = []
    for i in range(rows):
        text, chat = f"{PROMPTS[i % 8]} {'abcdefgh'[i // 8]}", [{"role": "user", "content": PROMPTS[i % 8]}]
        if shape == "records":
            made.append({"id": f"r{i}", "prompt": text} if i % 3 else {"prompt": chat})
            continue
        body = {"prompt": text, "model": "policy"} if i % 3 else {"messages": chat, "model": "policy"}
        body |= [{}, {"max_tokens": 5}, {"temperature": 0.7, "seed": i}, {"stop": ["e"], "top_p": 0.8}][i % 4]
        url = "/v1/completions" if i % 3 else "/v1/chat/completions"
        made.append({"custom_id": f"b{i}", "method": "POST", "url": url, "body": body})
    write_rows(path, made)


def record_of(output):
    """A finished job's output, byte for byte, and what is said of it."""
    rows = lines(output)
    about = told.lasting(json.loads(Path(f"{output}.job.json").read_text()))
    found = {"digest": told.digest(Path(output).read_bytes()), "about": about}
    errors = Path(f"{output}.errors.jsonl")
    if errors.exists():
        found["errors"] = [[row.get("line"), row.get("reason"), row.get("id")] for row in lines(errors)]
    if rows and "response" in rows[0]:
        bodies = [row["response"]["body"] for row in rows]
        choices = [body["choices"][0] for body in bodies]
        found["texts"] = [choice.get("text", choice.get("message", {}).get("content")) for choice in choices]
        return found | {"token_ids": [body["rgtg"]["token_ids"] for body in bodies]}
    return found | told.completions(rows)


def jobs():
    """Files of prompts that run to their end."""
    for shape in ("records", "openai"):
        prompts(f"{shape}.jsonl", shape)
    bad = [{"prompt": "Hi"}, {"prompt": ""}, {"text": "no"}, {"prompt": "x" * 400}, {"prompt": "Go on", "id": "last"}]
    write_rows("bad.jsonl", bad)
    for name, source, given in (
        ("records", "records", ["--batch-size", 4, *of_models(beta=1.5)]),
        ("openai", "openai", ["--batch-size", 4, *of_models()]),
        ("as-records", "openai", ["--output-format", "records", *of_models()]),
        ("traced", "records", ["--trace", "--batch-tokens", 200, *of_models(scorer="pieces")]),
        ("best-of-n", "records", of_models(method="best-of-n", n=3)),
        ("cards", "records", [*of_models(method="cards", reward_threshold=1.0), "--set", "entropy_threshold=2.0"]),
        ("draft", "records", of_models(draft="policy", draft_length=2)),
        ("bfloat16", "records", ["--batch-size", 5, *of_models(scorer="adapter", dtype="bfloat16")]),
        ("bad-rows", "bad", [*of_models(), "--on-bad", "skip"]),
    ):  # fmt: skip
        yield f"job/{name}", lambda name=name, source=source, given=given: job(name, source, given)
    some_fail = [*of_models(scorer="broken", max_new_tokens=3), "--batch-size", 4, "--set", "top_k=3"]
    yield "job/nan", lambda: job("nan", "records", some_fail, code=1)


def job(name, source, given, code=0):
    output = f"{name}.out.jsonl"
    said = rgtg("generate", *given, "--prompts", f"{source}.jsonl", "--output", output, "--json", code=code)
    return {"said": json.loads(said), **record_of(output)}


def killed():
    """Jobs that are killed half way, and go on: their outputs are those of jobs that were not."""
    for shape in ("records", "openai"):
        prompts(f"long-{shape}.jsonl", shape, rows=ROWS)
        given = [*of_models(max_new_tokens=16), "--batch-size", 2, "--prompts", f"long-{shape}.jsonl", "--quiet"]
        for _ in range(5):  # one that was faster than the hand that kills it is tried again
            kill_half_way(shape, given)
            if 0 < finished(shape) < ROWS:
                break
        yield f"killed/{shape}", lambda shape=shape, given=given: resumed(shape, given)


def kill_half_way(shape, given):
    for left in Path().glob(f"killed-{shape}.jsonl*"):
        left.unlink()
    command = ("generate", *given, "--output", f"killed-{shape}.jsonl")
    process = multiprocessing.get_context("fork").Process(target=rgtg, args=command)
    process.start()
    while process.is_alive() and finished(shape) < 7:
        time.sleep(0.005)
    process.kill()
    process.join()


def finished(shape):
    """Rows that a killed job has finished, by its working file."""
    partial = Path(f"killed-{shape}.jsonl.partial")
    return partial.read_bytes().count(b"\n") - 1 if partial.exists() else -1


def resumed(shape, given):
    kept, whole, killed = finished(shape), f"whole-{shape}.jsonl", f"killed-{shape}.jsonl"
    rgtg("generate", *given, "--output", whole)
    rgtg("generate", *given, "--output", killed)
    same = Path(whole).read_bytes() == Path(killed).read_bytes()
    return {"half-way": 0 < kept < ROWS, "as-if-not-killed": same, **record_of(killed)}


def said(*arguments):
    return {"said": told.lasting(json.loads(rgtg(*arguments, "--json")))}


def commands():
    """What reads and judges completions, and the smaller verbs."""
    write_rows("few.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    rgtg("generate", *of_models(), "--prompts", "few.jsonl", "--output", "done.jsonl", "--quiet")
    yield "command/generate", one_prompt
    yield "command/methods", lambda: said("methods")
    yield "command/data-check", lambda: said("data", "check", "pairs.jsonl", "--tokenizer", "policy")
    yield "command/theory", lambda: said("theory")
    for scorer in ("reward", "whole", "vocab", "adapter", "pieces", "encoder", "autoregressive"):
        yield f"command/score/{scorer}", lambda scorer=scorer: rewards(scorer)
    yield "command/audit", lambda: said("audit", "--scorer", "state", "--pairs", "pairs.jsonl", "--bootstrap", 100)
    yield "command/audit-rollouts", lambda: said(
        "audit", "--scorer", "reward", "--rollouts", "--policy", "policy", "--prompts", "few.jsonl", "--reward",
        "whole", "--rollouts-file", "rollouts.jsonl", "--prefixes", 8, "--candidates", 4, "--per-candidate", 2,
        "--max-new-tokens", 8, "--bootstrap", 100,
    )  # fmt: skip
    yield "command/compare", compared
    yield "command/sweep", lambda: said(
        "sweep", "--policy", "policy", "--scorer", "reward", "--prompts", "few.jsonl", "--target-kl", 1, "--kl-to",
        "candidates", "--tolerance", 0.5, "--max-new-tokens", 6, "--output", "swept", "--set", "bootstrap=100",
    )  # fmt: skip


def one_prompt():
    asked = ("generate", *of_models(beta=1.5), "--seed", 3, "--prompt", "Once upon a time")
    return {
        "plain": rgtg(*asked), "quiet": rgtg(*asked, "--quiet"),
        "json": told.completions([json.loads(rgtg(*asked, "--json"))]),
        "trace": told.completions([json.loads(rgtg(*asked, "--trace"))]),
    }  # fmt: skip


def rewards(scorer):
    output = f"scored-{scorer}.jsonl"
    rgtg("score", "--scorer", scorer, "--input", "done.jsonl", "--output", output, "--quiet")
    return {"rewards": [row["reward"] for row in lines(output)]}


def compared():
    methods = [
        {"method": "policy"}, {"method": "pargs", "scorer": "reward", "beta": [1.0, 2.0]},
        {"method": "best-of-n", "scorer": "reward", "n": 3}, {"method": "farma", "scorer": "farma"},
        {"method": "cards", "scorer": "reward", **CARDS},
        {"method": "pargs", "scorers": [{"scorer": "state", "beta": 1.0}, {"scorer": "pieces", "beta": 0.5}]},
    ]  # fmt: skip
    given = {
        "policy": "policy", "prompts": "few.jsonl", "reward": "whole", "output": "compared", "methods": methods,
        "max_new_tokens": 8, "bootstrap": 100, "seeds": [0, 1],
    }  # fmt: skip
    Path("compare.yaml").write_text(json.dumps(given))
    result = said("compare", "--config", "compare.yaml")["said"]
    figures = ("label", "rewards", "policy_calls", "scorer_calls")
    rows = [{name: row[name] for name in figures} for row in result["methods"]]
    done = told.completions(lines("compared/completions.jsonl"))
    return {"rows": rows, "digest": told.digest([result, done]), "token_ids": done["token_ids"]}


def trained():
    """A few steps of every objective and every kind of scorer."""
    write_rows("openings.jsonl", [{"prompt": f"{prompt} {'abc'[i]}"} for prompt in PROMPTS for i in range(3)])
    sampled = of_models(method="policy", scorer=None, max_new_tokens=12)
    rgtg("generate", *sampled, "--prompts", "openings.jsonl", "--output", "sampled.jsonl", "--quiet")
    rgtg("score", "--scorer", "whole", "--input", "sampled.jsonl", "--output", "rewarded.jsonl", "--quiet")
    for data, objectives in ((("--pairs", "pairs.jsonl"), OBJECTIVES), (("--rollouts", "rewarded.jsonl"), ROLLOUTS)):
        for name, given in objectives.items():
            objective = [] if "--objective" in given else ["--objective", name]
            arguments = (*data, *objective, *given)
            yield f"train/{name}", lambda name=name, arguments=arguments: train(Path("trained", name), arguments)


def train(output, arguments):
    """A report, what was written, and weights to the byte."""
    few = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": "true", "learning_rate": 1e-3}
    few = [part for name, value in few.items() for part in ("--set", f"train.{name}={value}")]
    given = ("--base", "policy", "--set", "eval_fraction=0.25", *few)
    report = said("train", "--output", output, *given, *arguments)["said"]
    weights = {path.name: told.digest(path.read_bytes()) for path in sorted(output.glob("*.safetensors"))}
    files = sorted(path.name for path in output.iterdir())
    about = json.loads((output / "rgtg.json").read_text())
    about["base_model"] = Path(about["base_model"]).name
    return {"report": report, "files": files, "digest": weights, "about": about}
