"""Every method with every kind of scorer, through ``GuidedPolicy`` and what else of ``rgtg`` is public."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rgtg
from goldens import told
from goldens.models import FAMILIES

PROMPTS = [
    "Once upon a time", "Hi", "What is it?", "The cat sat on the mat. It was", "A", "Tell me: why", "no no no no",
    "Go\nhome",
]  # fmt: skip
STORIES = ["Once upon a time, there was", "Tom and Lily", "One day, a big", "The dog"]
PREFIXES = ("reward", "state", "vocab", "adapter", "farma", "autoregressive", "lora-reward", "lora-farma", "pieces",
            "encoder")  # fmt: skip
REWARDS = ("reward", "whole", "state", "vocab", "adapter", "lora-reward", "autoregressive", "pieces", "pieces-trained",
           "encoder")  # fmt: skip
CARDS = {"reward_threshold": 1.0, "entropy_threshold": 2.0, "segment_length": 6, "min_segment": 2, "retries": 4}
SEGMENTS = {"n": 3, "segment_length": 4}


def by_methods():
    """(name, arguments of ``Guided``): methods × kinds of scorer × greedy and sampled."""
    kinds = {
        "pargs": PREFIXES, "pargs-greedy": ("reward", "state", "vocab", "adapter", "pieces", "encoder"),
        "args": ("stock", "adapter", "pieces"), "args-sample": ("stock", "state", "pieces"),
        "cd": ("reward", "adapter", "vocab"), "rad": ("reward", "farma", "pieces"),
        "farma": ("farma", "vocab", "lora-farma"), "genarm": ("autoregressive", "draft", "vocab"),
        "cards": REWARDS, "cd-blockwise": REWARDS, "best-of-n": REWARDS, "policy": (None,),
        "smc": PREFIXES, "beam": ("reward", "state", "vocab", "adapter", "pieces"),
        "vfd": ("reward", "state", "vocab", "adapter", "pieces"),
    }  # fmt: skip
    own = {
        "cards": CARDS,
        "cd-blockwise": SEGMENTS,
        "best-of-n": {"n": 3},
        "smc": {"n": 4},
        "beam": {"n": 3},
        "vfd": {"value_threshold": 0.5},
    }
    for method, scorers in kinds.items():
        for scorer in scorers:
            name = f"{method}/{scorer}" if scorer else method
            given = {"method": method, "scorer": scorer} | own.get(method, {})
            if method in ("cards", "cd-blockwise") and scorer in ("vocab", "autoregressive"):
                given["prompts"] = [prompt for prompt in PROMPTS if len(prompt) > 1]  # of one token is refused
            yield f"{name}/default", given
            if method not in ("pargs-greedy", "args", "smc", "beam") and (
                method not in own or scorer in ("reward", "pieces")
            ):
                yield f"{name}/greedy", given | {"temperature": 0.0}


def by_settings():
    """Settings that change what is drawn, each with the scorers that read it in a way of their own."""
    everything = {
        "temperature": 0.7, "top_p": 0.9, "min_new_tokens": 5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2,
        "stop": ["e", "th"], "top_k": 12,
    }  # fmt: skip
    for scorer in ("reward", "state", "vocab", "adapter", "farma", "pieces"):
        yield f"entropy-gate/{scorer}", {"scorer": scorer, "entropy_gate": 2.0}
        yield f"top-p/{scorer}", {"scorer": scorer, "top_p": 0.7}
        yield f"whole-vocabulary/{scorer}", {"scorer": scorer, "top_k": None}
        yield f"everything/{scorer}", {"scorer": scorer, **everything}
        yield f"no-tree/{scorer}", {"scorer": scorer, "token_tree": False}
    for method, more in {
        "policy": {}, "farma": {"scorer": "farma"}, "genarm": {"scorer": "autoregressive"},
        "cards": {"scorer": "reward", **CARDS}, "best-of-n": {"scorer": "reward", "n": 4},
        "cd-blockwise": {"scorer": "pieces", **SEGMENTS},
    }.items():  # fmt: skip
        yield f"everything/{method}", {"method": method, **more, **everything}
        yield f"no-tree/{method}", {"method": method, **more, "token_tree": False}
        yield f"stop/{method}", {"method": method, **more, "stop": [" ", "a"]}
    for method, top_k in (("policy", None), ("farma", None), ("farma", 3), ("genarm", 5), ("rad", 3)):
        scorer = {"policy": None, "farma": "farma", "genarm": "autoregressive", "rad": "reward"}[method]
        yield f"top-k/{method}-{top_k}", {"method": method, "scorer": scorer, "top_k": top_k}
    yield "stop/reward", {"scorer": "reward", "stop": [" ", "a", "ab"], "min_new_tokens": 2}
    yield "least/reward", {"scorer": "reward", "min_new_tokens": 7}
    yield "beta/none", {"scorer": "reward", "beta": 0.0}
    yield "beta/negative", {"scorer": "reward", "beta": -1.5}
    yield "beta/large", {"scorer": "pieces", "beta": 12.0}
    yield "tree/reward", {"scorer": "reward", "token_tree": True}
    yield "one-candidate/reward", {"scorer": "reward", "top_k": 1}
    yield "full-context/short", {"scorer": "short", "max_new_tokens": 24, "prompts": ["Once", "Hi", "no no no"]}
    yield "full-context/best-of-n", {
        "scorer": "short", "method": "best-of-n", "n": 3, "max_new_tokens": 24, "prompts": ["Once", "Hi", "no no no"]
    }  # fmt: skip
    yield "cards/accepts-all", {"method": "cards", "scorer": "reward", **CARDS, "reward_threshold": -9.0}
    yield "cards/rejects-all", {"method": "cards", "scorer": "pieces", **CARDS, "reward_threshold": 30.0, "beta": 9.0}


def by_parts():
    """Several scorers, two passes at once, and drafts."""
    for name, scorers, betas in (
        ("rewards", ["reward", "stock"], [1.5, -0.5]), ("state-reward", ["reward", "state"], [0.5, 1.0]),
        ("adapter-pieces", ["adapter", "pieces"], [1.0, 1.0]), ("heads", ["state", "vocab"], [1.0, 0.5]),
        ("vocab-farma", ["vocab", "farma"], [1.0, 0.5]),
        ("three", ["encoder", "adapter", "autoregressive"], [0.5, 1.0, 0.3]),
    ):  # fmt: skip
        yield f"several/{name}", {"scorer": scorers, "beta": betas}
    yield "several/greedy", {"scorer": ["reward", "adapter"], "beta": [1.0, 1.0], "method": "pargs-greedy"}
    yield "several/genarm", {"scorer": ["autoregressive", "draft"], "beta": [1.0, 0.5], "method": "genarm"}
    yield "several/farma", {"scorer": ["farma", "vocab"], "beta": [1.0, 0.5], "method": "farma"}
    yield "several/entropy-gate", {"scorer": ["reward", "state"], "beta": [1.0, 1.0], "entropy_gate": 2.0}
    yield "several/whole-vocabulary", {"scorer": ["reward", "farma"], "beta": [1.0, 1.0], "top_k": None}
    yield "several/no-tree", {"scorer": ["reward", "vocab"], "beta": [1.0, 1.0], "token_tree": False}
    for scorer in ("reward", "pieces", "encoder"):
        yield f"overlap/{scorer}", {"scorer": scorer, "overlap": True}
    yield "overlap/greedy", {"scorer": "reward", "overlap": True, "method": "args"}
    prompts = ["no no no no", "Hi", "aba aba aba ab", "The cat. The cat. The", "A"]
    for draft in ("policy", "prompt-lookup", "draft"):
        speculates = {"scorer": "reward", "draft": draft, "prompts": prompts, "max_new_tokens": 12}
        yield f"draft/{draft}/default", speculates
        yield f"draft/{draft}/greedy", speculates | {"method": "pargs-greedy"}
        yield f"draft/{draft}/three", speculates | {"draft_length": 3, "temperature": 0.7, "beta": 0.3}
        yield f"draft/{draft}/stops", speculates | {"stop": ["e", " "], "top_p": 0.8, "min_new_tokens": 4}
        yield f"draft/{draft}/no-tree", speculates | {"token_tree": False}
    for draft in ("prompt-lookup", "draft"):
        plain = {"method": "policy", "draft": draft, "prompts": prompts, "max_new_tokens": 12}
        yield f"draft/{draft}/unguided", plain
        yield f"draft/{draft}/unguided-greedy", plain | {"temperature": 0.0, "repetition_penalty": 1.2}


def by_models():
    """Other architectures, a model that is laid out for the processor, half precision, and a real model."""
    for family in FAMILIES:
        of = {"policy": family, "scorer": f"{family}-reward"}
        yield f"family/{family}/pargs", of
        yield f"family/{family}/best-of-n", of | {"method": "best-of-n", "n": 3}
        if family in ("gpt2", "mistral"):
            yield f"family/{family}/cards", of | {"method": "cards", **CARDS}
    yield "family/gpt2/state", {"policy": "gpt2", "scorer": "gpt2-state"}
    yield "family/gpt2/vocab", {"policy": "gpt2", "scorer": "gpt2-vocab", "method": "farma"}
    for scorer in ("wide-reward", "wide-adapter", "wide-vocab"):
        wide = {"policy": "wide", "scorer": scorer, "prompts": PROMPTS[:4], "max_new_tokens": 5}
        yield f"wide/{scorer}", wide
        yield f"wide/{scorer}/bfloat16", wide | {"dtype": "bfloat16"}
        if scorer == "wide-reward":
            yield "wide/stock-layout", wide | {"pack": False}
            yield "wide/best-of-n", wide | {"method": "best-of-n", "n": 3}
    half = {"dtype": "bfloat16"}
    for scorer in ("reward", "state", "vocab", "adapter", "farma", "pieces"):
        yield f"bfloat16/{scorer}", {"scorer": scorer} | half
    yield "bfloat16/best-of-n", {"scorer": "reward", "method": "best-of-n", "n": 3} | half
    yield "bfloat16/cards", {"scorer": "reward", "method": "cards", **CARDS} | half
    yield "bfloat16/draft", {"scorer": "reward", "draft": "policy"} | half
    yield "bfloat16/several", {"scorer": ["reward", "adapter"], "beta": [1.0, 1.0]} | half
    real = {"policy": "stories", "scorer": "stories-reward", "prompts": STORIES, "max_new_tokens": 16}
    yield "stories/pargs", real
    yield "stories/greedy", real | {"method": "args"}
    yield "stories/best-of-n", real | {"method": "best-of-n", "n": 4, "stop": ["."]}
    yield "stories/cards", real | {"method": "cards", **CARDS}
    yield "stories/draft", real | {"draft": "policy"}
    yield "stories/lookup", real | {"draft": "prompt-lookup", "temperature": 0.0}
    yield "stories/pieces", real | {"scorer": "pieces"}
    yield "stories/several", real | {"scorer": ["stories-reward", "pieces"], "beta": [1.0, 0.5]}
    yield "stories/bfloat16", real | half


JOINED = ("method", "beta", "top_k", "n", "dtype", "token_tree", "overlap", "draft", "pack")


def joined(policy="policy", scorer=None, **given):
    """A ``GuidedPolicy``, and what is left for its ``generate``."""
    join = {name: given.pop(name) for name in JOINED if name in given}
    return rgtg.GuidedPolicy.from_pretrained(policy, scorer, device="cpu", **join), given


def in_three_ways(arguments):
    """Alone, three at a time, and eight at a time with every candidate's figures."""
    prompts = arguments.pop("prompts", PROMPTS)
    arguments.setdefault("max_new_tokens", 8)
    guided, settings = joined(**arguments)
    return {
        "alone": told.completions(guided.generate(prompts[:1], **settings)),
        "three": told.completions(guided.generate(prompts[:4], batch_size=3, seed=1, **settings)),
        "eight": told.completions(guided.generate(prompts, batch_size=8, seed=2, trace=True, **settings)),
    }


def ids():
    guided, _ = joined(scorer="reward", beta=1.5)
    prompts = [[0, 5, 9, 12, 33], [0, 44], list(range(4, 40)), [7]]
    return {"ids": told.completions(guided.generate_ids(prompts, max_new_tokens=10, seed=[5, 6, 7, 8], trace=True))}


def seeds():
    guided, _ = joined(scorer="reward")
    many = ["Hi", "Hi", "A", "Hi"]
    return {
        "derived": guided.row_seeds(many, 3),
        "by-seed": told.completions(guided.generate(many, seed=3, max_new_tokens=6)),
        "by-seeds": told.completions(guided.generate(many, seed=[1, 1, 2, 3], max_new_tokens=6)),
    }


def chats():
    """Messages, which a scorer with another tokenizer reads by its own template."""
    talks = [
        [{"role": "user", "content": "Hi you"}],
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who is it?"}],
    ]
    found = {}
    for scorer in ("reward", "pieces", "pieces-trained", "adapter"):
        guided, _ = joined(scorer=scorer)
        found[scorer] = told.completions(guided.generate(talks, max_new_tokens=8, trace=True))
    guided, _ = joined(scorer="pieces-trained", method="best-of-n", n=3)
    return found | {"best-of-n": told.completions(guided.generate(talks, max_new_tokens=8))}


def streams():
    """The pieces of a text, as they come."""
    found = {}
    for name, given in {
        "pargs": {"scorer": "reward"}, "stop": {"scorer": "reward", "stop": ["ab", "e", "th"]},
        "policy": {"method": "policy"}, "draft": {"scorer": "reward", "draft": "policy"},
        "cards": {"scorer": "reward", "method": "cards", **CARDS},
        "best-of-n": {"scorer": "reward", "method": "best-of-n", "n": 3}, "pieces": {"scorer": "pieces"},
    }.items():  # fmt: skip
        guided, settings = joined(**given)
        found[name] = [list(guided.stream(prompt, seed=4, max_new_tokens=10, **settings)) for prompt in PROMPTS[:2]]
    return found


def in_transformers():
    """``model.generate`` with guidance."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained("policy"), AutoTokenizer.from_pretrained("policy")
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS[:4], padding=True, return_tensors="pt")
    found = {}
    for name, scorer, given in (
        ("pargs", "reward", {"do_sample": True, "top_p": 0.9, "top_k": 0}), ("greedy", "adapter", {"do_sample": False}),
        ("policy", None, {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2}),
    ):  # fmt: skip
        method = {"method": "policy"} if scorer is None else {"beta": 1.5}
        guide = rgtg.custom_generate(scorer, tokenizer=tokenizer, seed=3, **method)
        found[name] = model.generate(**batch, custom_generate=guide, max_new_tokens=8, **given).tolist()
    return found


def scores():
    """Scorers of every kind, asked about whole completions and about every prefix."""
    prompts, texts, finished = PROMPTS[:4], [" a dog.", "the", " Yes", ", old"], [True, False, True, True]
    prefix_ids = [[0, 5, 9, 12], [0, 44], [0, 6, 7]], [[8, 9, 10, 2], [33], [5, 6]]
    found = {}
    for name in (*REWARDS, "stock", "farma", "lora-farma"):
        scorer = rgtg.load_scorer(name, device="cpu")
        found[name] = {"whole": scorer.score(prompts, texts, finished=finished, batch_size=3)}
        if name not in ("pieces", "pieces-trained", "encoder"):
            found[name]["prefixes"] = [row.tolist() for row in scorer.score_prefixes(*prefix_ids, batch_size=2)]
    return found


def losses():
    """The two that are public, and their gradients."""
    chosen = torch.tensor([[0.1, 0.4, 1.2], [0.3, -0.2, 0.0]], requires_grad=True)
    rejected = torch.tensor([[0.0, 0.7, -0.2], [0.5, 0.1, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    differs = torch.tensor([[False, True, True], [True, True, False]])
    found = {}
    for name, loss in (
        ("full", lambda: rgtg.bradley_terry_loss(chosen[:, -1], rejected[:, -1])),
        ("prefix", lambda: rgtg.prefix_bradley_terry_loss(chosen, rejected, mask, mask, differs)),
    ):
        value = loss()
        found[name] = [value.tolist(), *(g.tolist() for g in torch.autograd.grad(value, (chosen, rejected)))]
    return found


def pairs():
    """What is read of a file, and a scorer's audit on it."""
    found = {"read": [pair.model_dump() for pair in rgtg.read_pairs("pairs.jsonl").pairs][:3]}
    for name in ("reward", "vocab", "pieces"):
        audited = rgtg.audit_prefixes(name, "pairs.jsonl", bootstrap=100, seed=1)
        found[name] = told.lasting(json.loads(audited.model_dump_json()))
    return found


PUBLIC = {
    "ids": ids, "seeds": seeds, "chats": chats, "streams": streams, "in-transformers": in_transformers,
    "scores": scores, "losses": losses, "pairs": pairs,
}  # fmt: skip


def cases():
    """{name: what makes its record}."""
    made = {}
    for group, source in (
        ("method", by_methods), ("setting", by_settings), ("part", by_parts), ("model", by_models),
    ):  # fmt: skip
        for name, arguments in source():
            made[f"{group}/{name}"] = lambda arguments=arguments: in_three_ways(dict(arguments))
    return made | {f"public/{name}": run for name, run in PUBLIC.items()}
