"""Chats from one command to the next: each model reads the messages by its own chat template, once."""

import json

import pytest

from helpers.chats import (
    CHATML,
    TEMPLATES,
    THINKING,
    TURNS,
    as_parts,
    chat_policy,
    chat_reward,
    chat_tokenizer,
    save,
    stock_ids,
    stock_reward,
)
from helpers.command import verb
from rgtg.data.rollouts import read_rollouts, tokenize_rollouts
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import UsageError
from rgtg.types.generation import Completion

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*trained on an unknown objective:UserWarning", "ignore:.*resamples:UserWarning"
)
run = verb()
CHATS = [
    [{"role": "user", "content": "Two and two?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go!"}],
]


def shown(messages, name):
    """Messages as a template sees them."""
    return as_parts(messages) if name == "parts" else messages


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def policy(tmp_path):
    return save(chat_policy(), chat_tokenizer(), tmp_path / "policy")


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": chat} for chat in CHATS])


def generate(policy, prompts, output, *more):
    done = run("generate", "--policy", policy, "--method", "policy", "--max-new-tokens", 6, "--prompts", prompts,
               "--output", output, *more)  # fmt: skip
    assert done.exit_code == 0, done.output
    return lines(output)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_reward_model_scores_completions_of_chats_by_its_own_template(tmp_path, policy, prompts, name, finished):
    rows = generate(policy, prompts, tmp_path / "out.jsonl")
    tokenizer, model = chat_tokenizer(TEMPLATES[name]), chat_reward()
    save(model, tokenizer, tmp_path / "reward")
    for row in rows:
        row["finish_reason"] = "stop" if finished else "length"
    # a row may also have its messages as the prompt
    given = [rows[0], {"prompt": as_parts(rows[1]["messages"])} | {k: rows[1][k] for k in ("text", "finish_reason")}]
    scored = run("score", "--scorer", tmp_path / "reward", "--input", write(tmp_path / "in.jsonl", given),
                 "--output", tmp_path / "scored.jsonl")  # fmt: skip
    assert scored.exit_code == 0, scored.output
    for chat, row, before in zip(CHATS, lines(tmp_path / "scored.jsonl"), given, strict=True):
        text, reply = row["text"], [{"role": "assistant", "content": row["text"]}]
        if finished:
            ids = tokenizer.apply_chat_template(shown([*chat, *reply], name), return_dict=False)
        else:
            ids = stock_ids(tokenizer, shown(chat, name), text, finished=False)
        assert ids.count(1) == 1
        assert row == before | {"reward": pytest.approx(stock_reward(model, ids), abs=1e-4)}


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_on_scored_completions_reads_the_tokens_that_the_policy_was_given(tmp_path, prompts, name):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    policy = save(chat_policy(), tokenizer, tmp_path / "policy")
    rows = generate(policy, prompts, tmp_path / "out.jsonl")
    rows += [rows[0] | {"finish_reason": "stop"}]
    path = write(tmp_path / "rollouts.jsonl", [row | {"reward": 1.0} for row in rows])
    made = tokenize_rollouts(read_rollouts(path, tokenizer=tokenizer).rows, tokenizer)
    for chat, row, one in zip([*CHATS, CHATS[0]], rows, made, strict=True):
        assert one.prompt_ids == stock_ids(tokenizer, shown(chat, name), "", finished=False)
        ended = one.completion_ids[len(row["token_ids"]) :]
        assert one.completion_ids[: len(row["token_ids"])] == row["token_ids"]
        assert len(ended) == (row["finish_reason"] == "stop")
    # the last token of a finished reply is the one that the template ends it with
    whole = tokenizer.apply_chat_template(
        shown([*CHATS[0], {"role": "assistant", "content": rows[0]["text"]}], name), return_dict=False
    )
    assert whole[: len(made[2].prompt_ids) + len(made[2].completion_ids)] == [
        *made[2].prompt_ids,
        *made[2].completion_ids,
    ]


def test_records_keep_messages_and_variables_and_plain_records_are_as_before(tmp_path):
    policy = save(chat_policy(), chat_tokenizer(THINKING), tmp_path / "policy")
    text = {"type": "text", "text": "Hi"}
    prompts = write(
        tmp_path / "mixed.jsonl",
        [
            {"prompt": "Hi"},
            {"messages": [{"role": "user", "name": "Ann", "content": [text, text]}]},
            {"messages": CHATS[0], "chat_template_kwargs": {"enable_thinking": True}},
        ],
    )
    plain, named, own = generate(
        policy, prompts, tmp_path / "out.jsonl", "--chat-template-kwargs", '{"enable_thinking": false}'
    )
    assert "messages" not in plain
    assert named["messages"] == [{"role": "user", "name": "Ann", "content": "HiHi"}]
    assert named["prompt"] == "<s><|im_start|>user Ann\nHiHi<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert (named["chat_template_kwargs"], own["chat_template_kwargs"]) == (
        {"enable_thinking": False}, {"enable_thinking": True},
    )  # fmt: skip
    assert own["prompt"].endswith("assistant\n")
    for row in (plain, named, own):
        assert Completion.model_validate(row).model_dump(mode="json") == row
    assert Completion.model_validate(named).source == named["messages"]


def test_openai_lines_hold_what_they_held(tmp_path, policy):
    body = {"messages": as_parts(CHATS[0]), "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (made,) = generate(policy, write(tmp_path / "batch.jsonl", [line]), tmp_path / "out.jsonl")
    assert made["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert not {"messages", "chat_template_kwargs"} & made["response"]["body"]["rgtg"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "Hi", "--system", "Be brief."], "add --chat"),
        (["--prompt", "Hi", "--chat-template-kwargs", '{"a": 1}'], "the prompt is plain text: add --chat"),
        (["--prompt", "Hi", "--chat", "--chat-template-kwargs", "nonsense"], "must be a JSON object, such as"),
        (["--prompt", "Hi", "--chat", "--chat-template-kwargs", '["a"]'], "should be a valid dictionary"),
        (["--prompt", "Hi", "--chat", "--chat-template-kwargs", '{"thinking": 1}'], "does not read thinking; it reads"),
    ],
)
def test_options_of_chats_that_cannot_be_used_are_refused(policy, options, message):
    done = run("generate", "--policy", policy, "--method", "policy", *options)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output


def test_a_plain_prompt_becomes_a_chat(tmp_path, policy):
    done = run("generate", "--policy", policy, "--method", "policy", "--prompt", "Hi", "--chat", "--system",
               "Be brief.", "--max-new-tokens", 3, "--json")  # fmt: skip
    row = json.loads(done.stdout)
    system = {"role": "system", "content": "Be brief."}
    assert row["messages"] == [system, {"role": "user", "content": "Hi"}]
    assert row["prompt"].startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    streamed = run("generate", "--policy", policy, "--method", "policy", "--prompt", "Hi", "--chat", "--system",
                   "Be brief.", "--max-new-tokens", 3)  # fmt: skip
    assert streamed.stdout == row["text"] + "\n"
    # and so do those of a file; chats keep their own messages
    mixed = write(tmp_path / "mixed.jsonl", [{"prompt": "Hi"}, {"prompt": CHATS[0]}])
    first, second = generate(policy, mixed, tmp_path / "out.jsonl", "--chat", "--system", "Be brief.")
    assert (first["messages"], second["messages"]) == (row["messages"], CHATS[0])
    assert first["token_ids"][:3] == row["token_ids"]


def test_chat_needs_a_template_that_takes_the_messages(tmp_path):
    bare = save(chat_policy(), chat_tokenizer(None), tmp_path / "bare")
    prompts = write(tmp_path / "plain.jsonl", [{"prompt": "Hi"}])
    for more in (["--prompt", "Hi"], ["--prompts", prompts, "--output", tmp_path / "out.jsonl"]):
        done = run("generate", "--policy", bare, "--method", "policy", "--chat", *more)
        assert (done.exit_code, "--chat: the policy's tokenizer has no chat template" in done.stderr) == (2, True)
    turns = save(chat_policy(), chat_tokenizer(TURNS), tmp_path / "turns")
    done = run("generate", "--policy", turns, "--method", "policy", "--chat", "--prompt", "Hi", "--system", "Be brief.")
    assert (done.exit_code, "System role not supported" in done.stderr) == (3, True), done.output


def test_the_same_chats_are_compared_swept_audited_and_shown(tmp_path, policy, prompts):
    own = chat_tokenizer(TEMPLATES["brackets"])
    gold, scorer = chat_reward(5), chat_reward(6)
    save(gold, own, tmp_path / "gold")
    save(scorer, chat_tokenizer(TURNS), tmp_path / "scorer")
    config = tmp_path / "compare.yaml"
    config.write_text(
        f"policy: {policy}\nprompts: {prompts}\nreward: {tmp_path / 'gold'}\noutput: {tmp_path / 'compared'}\n"
        f"max_new_tokens: 4\nbootstrap: 100\nmethods:\n  - {{method: policy}}\n"
        f"  - {{method: pargs, scorer: {tmp_path / 'scorer'}, beta: [1]}}\n"
        f"  - {{method: best-of-n, n: 2, scorer: {tmp_path / 'scorer'}}}\n"
    )
    done = run("compare", "--config", config)
    assert done.exit_code == 0, done.output
    rows = lines(tmp_path / "compared" / "completions.jsonl")
    assert len(rows) == 6
    for row in rows:
        ids = stock_ids(own, row["messages"], row["text"], finished=row["finish_reason"] == "stop")
        assert row["reward"] == pytest.approx(stock_reward(gold, ids), abs=1e-4)
    results = json.loads((tmp_path / "compared" / "results.json").read_text())
    assert len({*results["provenance"]["data"].values()}) == 1
    report = run("report", tmp_path / "compared", "--output", tmp_path / "report.html")
    assert report.exit_code == 0, report.output
    text = (tmp_path / "report.md").read_text()
    assert "Two and two?" in text
    assert "<|im_start|>" not in text
    swept = run("sweep", "--policy", policy, "--scorer", tmp_path / "scorer", "--prompts", prompts, "--target-kl", 1,
                "--output", tmp_path / "swept", "--max-new-tokens", 4, "--tries", 2)  # fmt: skip
    assert swept.exit_code in (0, 1), swept.output
    audited = run("audit", "--rollouts", "--scorer", tmp_path / "scorer", "--policy", policy, "--prompts", prompts,
                  "--reward", tmp_path / "gold", "--output", tmp_path / "audited", "--prefixes", 3, "--candidates", 2,
                  "--per-candidate", 2, "--max-new-tokens", 4, "--bootstrap", 100)  # fmt: skip
    assert audited.exit_code == 0, audited.output
    for row in lines(tmp_path / "audited" / "rollouts.jsonl")[1:]:
        assert row["prompt_ids"] == stock_ids(chat_tokenizer(CHATML), row["messages"], "", finished=False)
        for texts, ends, rewards in zip(row["texts"], row["finished"], row["rewards"], strict=True):
            ids = stock_ids(own, row["messages"], texts[0], finished=ends[0])
            assert rewards[0] == pytest.approx(stock_reward(gold, ids), abs=1e-4)


def test_scorers_are_trained_checked_and_audited_with_variables_of_the_template(tmp_path):
    policy = save(chat_policy(), chat_tokenizer(THINKING), tmp_path / "policy")
    reply = [[{"role": "assistant", "content": text}] for text in ("Four.", "Five.")]
    question = [{"role": "user", "content": "Two and two?"}]
    rows = [{"prompt": [{**question[0], "content": f"{i}?"}], "chosen": as_parts(reply[0]), "rejected": reply[1]}
            for i in range(4)]  # fmt: skip
    pairs = write(tmp_path / "pairs.jsonl", rows)
    kwargs = ["--chat-template-kwargs", '{"enable_thinking": false}']
    checked = run("data", "check", pairs, "--tokenizer", policy, "--json", *kwargs)
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["kept"] == 4
    trained = run("train", "--pairs", pairs, "--base", policy, "--output", tmp_path / "scorer", *kwargs, "--quiet",
                  "--set", "train.max_steps=1", "--set", "train.use_cpu=true")  # fmt: skip
    assert trained.exit_code == 0, trained.output
    settings = json.loads((tmp_path / "scorer" / "settings.json").read_text())
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}
    audited = run("audit", "--scorer", tmp_path / "scorer", "--pairs", pairs, "--json", "--bootstrap", 100, *kwargs)
    assert audited.exit_code == 0, audited.output
    commands = [
        ["data", "check", pairs, "--tokenizer", policy],
        ["audit", "--scorer", tmp_path / "scorer", "--pairs", pairs],
        ["train", "--pairs", pairs, "--base", policy, "--output", tmp_path / "no"],
    ]
    for command in commands:
        refused = run(*command, "--chat-template-kwargs", '{"thinking": 1}')
        assert (refused.exit_code, "does not read thinking; it reads enable_thinking" in refused.stderr) == (2, True)


def test_a_model_without_a_chat_template_is_refused_before_any_work(tmp_path, policy, prompts):
    bare = save(chat_reward(5), chat_tokenizer(None), tmp_path / "gold")
    config = tmp_path / "compare.yaml"
    config.write_text(f"policy: {policy}\nprompts: {prompts}\nreward: {bare}\noutput: {tmp_path / 'compared'}\n"
                      "methods:\n  - {method: policy}\n")  # fmt: skip
    done = run("compare", "--config", config)
    assert (done.exit_code, "and the reward gold has no chat template" in done.stderr) == (2, True), done.output
    assert not (tmp_path / "compared" / "parts").exists()
    save(chat_reward(6), chat_tokenizer(TURNS), tmp_path / "scorer")
    done = run("audit", "--rollouts", "--scorer", tmp_path / "scorer", "--policy", policy, "--prompts", prompts,
               "--reward", bare, "--output", tmp_path / "audited")  # fmt: skip
    assert (done.exit_code, "and the reward has no chat template" in done.stderr) == (2, True), done.output
    done = run("compare", "--config", config, "--chat-template-kwargs", '{"a": 1}')
    assert done.exit_code == 2


def test_another_chat_template_is_another_job(tmp_path, policy, prompts):
    rows = generate(policy, prompts, tmp_path / "out.jsonl")
    assert generate(policy, prompts, tmp_path / "out.jsonl") == rows
    save(chat_policy(), chat_tokenizer(TEMPLATES["brackets"]), policy)
    done = run("generate", "--policy", policy, "--method", "policy", "--max-new-tokens", 6, "--prompts", prompts,
               "--output", tmp_path / "out.jsonl")  # fmt: skip
    assert (done.exit_code, "chat_templates" in done.stderr) == (2, True), done.output


def test_rows_of_a_comparison_may_differ_in_variables_of_the_template(tmp_path, prompts):
    policy = save(chat_policy(), chat_tokenizer(THINKING), tmp_path / "policy")
    gold = save(chat_reward(5), chat_tokenizer(THINKING), tmp_path / "gold")
    config = tmp_path / "compare.yaml"
    config.write_text(
        f"policy: {policy}\nprompts: {prompts}\nreward: {gold}\noutput: {tmp_path / 'compared'}\nmax_new_tokens: 3\n"
        "bootstrap: 100\nchat_template_kwargs: {enable_thinking: false}\nmethods:\n  - {method: policy, label: fast}\n"
        "  - {method: policy, label: slow, chat_template_kwargs: {enable_thinking: true}}\n"
    )
    done = run("compare", "--config", config)
    assert done.exit_code == 0, done.output
    rows = lines(tmp_path / "compared" / "completions.jsonl")
    assert [row["chat_template_kwargs"]["enable_thinking"] for row in rows] == [False, False, True, True]
    assert [row["prompt"].endswith("<think></think>") for row in rows] == [True, True, False, False]
    tokenizer, model = chat_tokenizer(THINKING), chat_reward(5)
    for row in rows:
        ids = stock_ids(tokenizer, row["messages"], row["text"], finished=row["finish_reason"] == "stop",
                        **row["chat_template_kwargs"])  # fmt: skip
        assert row["reward"] == pytest.approx(stock_reward(model, ids), abs=1e-4)


def test_variables_need_chats(tmp_path, policy):
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "Hi"}])
    done = run("generate", "--policy", policy, "--method", "policy", "--prompts", plain, "--output",
               tmp_path / "out.jsonl", "--chat-template-kwargs", '{"a": 1}')  # fmt: skip
    assert (done.exit_code, "every prompt is plain text" in done.stderr) == (2, True), done.output
    body = {"prompt": "Hi", "chat_template_kwargs": {"a": 1}}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    done = run("generate", "--policy", policy, "--method", "policy", "--prompts", write(plain, [line]), "--output",
               tmp_path / "out.jsonl")  # fmt: skip
    assert (done.exit_code, "the prompt is plain text, not a chat" in done.stderr) == (3, True), done.output
    guided = GuidedPolicy.from_pretrained(str(policy), method="policy")
    with pytest.raises(UsageError, match="every prompt is plain text"):
        guided.generate(["Hi"], chat_template_kwargs={"a": 1})
    with pytest.raises(UsageError, match="every prompt is plain text"):
        next(guided.stream("Hi", chat_template_kwargs={"a": 1}))
