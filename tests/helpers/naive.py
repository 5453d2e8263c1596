"""What guided decoding must equal, written the slow way: stock models, one whole text at a time, float64 formulas."""

import itertools
import math

import torch

from helpers.tiny_models import VOCAB, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import ScorerInfo, fingerprint_weights, write_info
from rgtg.models.scorers.heads import StateHead, VocabularyHead, save_head
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.tokenization.encoding import tokenizer_hash

EOS = 2
torch.set_num_threads(1)  # the models are tiny: threads only get in each other's way


def info(objective: str = "prefix-bt", append_eos: bool = True) -> ScorerInfo:
    return ScorerInfo(
        rgtg_version="0", objective=objective, base_model="tiny", base_fingerprint="", tokenizer_hash="",
        data_fingerprint="", append_eos=append_eos,
    )  # fmt: skip


def tiny_scorer(family: str = "llama", seed: int = 1, objective: str = "prefix-bt") -> PrefixScorer:
    return PrefixScorer(tiny_reward_model(family, seed), tiny_tokenizer(), info=info(objective), name="tiny")


def make_guided(method: str = "pargs", family: str = "llama", **settings) -> GuidedPolicy:
    """A guided tiny policy; the scorer is left out where the method needs none."""
    row = METHODS[method]
    scorer = None
    if row.vocabulary:
        model = Policy(tiny_policy(family, seed=9), tiny_tokenizer())
        scorer = VocabularyScorer(model, info=info(row.scorer), name="tiny")
    elif row.scorer:
        scorer = tiny_scorer(family, objective="cumulative-mse" if row.clip else "prefix-bt")
    return GuidedPolicy.from_pretrained((tiny_policy(family), tiny_tokenizer()), scorer, method=method, **settings)


@torch.no_grad()
def next_log_probs(model, ids) -> torch.Tensor:
    """Stock causal LM on one text: log-probabilities (V,) of the next token, in float64."""
    return torch.log_softmax(model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double(), -1)


@torch.no_grad()
def reward(model, ids) -> float:
    """Stock reward model on one text; without a padding id, so that it reads the last token whatever it is."""
    pad = model.config.pad_token_id
    model.config.pad_token_id = None
    try:
        return float(model(input_ids=torch.tensor([list(ids)])).logits[0, 0])
    finally:
        model.config.pad_token_id = pad


def score(guided, scorer, ids) -> float:
    """What a scorer says of the last token of a text, as the method reads it."""
    if isinstance(scorer, VocabularyScorer):
        return float(next_log_probs(scorer.model, ids[:-1])[ids[-1]])
    read = reward(scorer.model, ids)
    return min(max(read, 0.0), 1.0) if guided.method.clip else read


def entropy_of(log_probs) -> float:
    return float(-(log_probs.exp() * log_probs).sum())


def step_distribution(
    guided,
    ids,
    *,
    beta=0.0,
    top_k=None,
    top_p=1.0,
    temperature=1.0,
    gate=None,
    sums=None,
    logit_bias=None,
    threshold=None,
) -> dict[int, float]:
    """Log-probability of each candidate after ``ids``: the definition, term by term."""
    whole = plain = next_log_probs(guided.policy.model, ids)
    if logit_bias:
        whole = torch.log_softmax(plain + torch.tensor([logit_bias.get(t, 0.0) for t in range(len(plain))]), -1)
    tokens = whole.argsort(descending=True)[: top_k or len(whole)].tolist()
    mass = sum(math.exp(whole[t]) for t in tokens)
    kept, before = [], 0.0
    for token in tokens:
        if not kept or before < top_p:
            kept.append(token)
        before += math.exp(whole[token]) / mass
    energy = {t: float(whole[t]) for t in kept}
    if beta and not (gate is not None and entropy_of(plain) <= gate):
        betas = beta if isinstance(beta, list) else [beta]
        energy = {t: e + sum(b * score(guided, s, [*ids, t]) for b, s in zip(betas, guided.scorers, strict=True))
                  for t, e in energy.items()}  # fmt: skip
    if threshold is not None:
        scores = {t: score(guided, guided.scorer, [*ids, t]) for t in energy}
        good = {t for t, r in scores.items() if r >= threshold} or {max(scores, key=scores.__getitem__)}
        energy = {t: energy[t] for t in good}
    if sums is not None:
        energy = {t: energy[t] for t in sorted(energy, key=energy.__getitem__)[-sums:]}
    if temperature == 0:
        return {max(energy, key=energy.__getitem__): 0.0}
    energy = {t: e / temperature for t, e in energy.items()}
    top = max(energy.values())
    total = top + math.log(sum(math.exp(e - top) for e in energy.values()))
    return {t: e - total for t, e in energy.items()}


def completion_distribution(guided, prompt, length, **settings) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most ``length`` tokens, EOS ending it early."""
    done, open_ = {}, {(): 0.0}
    for _ in range(length):
        grown = {}
        for tokens, log_prob in open_.items():
            for token, step in step_distribution(guided, [*prompt, *tokens], **settings).items():
                (done if token == EOS else grown)[(*tokens, token)] = log_prob + step
        open_ = grown
    return {tokens: math.exp(log_prob) for tokens, log_prob in (done | open_).items()}


def winner_distribution(guided, prompt, length, n, **settings) -> dict[tuple[int, ...], float]:
    """Distribution of the best of n independent completions, by order statistics of their rewards."""
    drawn = completion_distribution(guided, prompt, length, **settings)
    rewards = {tokens: reward(guided.scorer.model, [*prompt, *tokens]) for tokens in drawn}
    return best_among(drawn, rewards, n)


def write_head(folder, policy_folder, kind: str = "state"):
    """A head with random weights on a saved tiny policy's states, as a folder."""
    folder.mkdir()
    torch.manual_seed(3)
    save_head(folder, StateHead(32, 8) if kind == "state" else VocabularyHead(32, 8, 4, VOCAB))
    tiny_tokenizer().save_pretrained(folder)
    about = {
        "trunk": "own", "head": kind, "layer": 2, "base_model": str(policy_folder),
        "base_fingerprint": fingerprint_weights(tiny_policy()), "tokenizer_hash": tokenizer_hash(tiny_tokenizer()),
    }  # fmt: skip
    write_info(folder, info().model_copy(update=about))
    return folder


def write_adapter(folder, base):
    """A LoRA adapter of a tiny reward model, which is written to ``base``."""
    import peft

    model = tiny_reward_model()
    model.save_pretrained(base)
    model.name_or_path = model.config._name_or_path = str(base)
    lora = peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], r=2, init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def segments_of(guided, prompt, begun, limit, *, length, unsure=None, shortest=1, **settings):
    """Every segment behind a started completion: its probability under the policy, and whether it ends the text."""
    done, open_ = {}, {(): 0.0}
    while open_:
        grown = {}
        for tokens, log_prob in open_.items():
            text = [*prompt, *begun, *tokens]
            doubt = unsure is not None and entropy_of(next_log_probs(guided.policy.model, text)) >= unsure
            if doubt and len(tokens) >= shortest:
                done[tokens] = (math.exp(log_prob), False)
                continue
            for token, step in step_distribution(guided, text, **settings).items():
                new = (*tokens, token)
                ended = token == EOS or len(begun) + len(new) == limit
                if ended or len(new) == length:
                    done[new] = (math.exp(log_prob + step), ended)
                else:
                    grown[new] = log_prob + step
        open_ = grown
    return done


def segmented_distribution(guided, prompt, limit, choose, **settings) -> dict[tuple[int, ...], float]:
    """Probability of every completion that is drawn segment by segment; ``choose`` says how one is selected."""
    finished, open_ = {}, {(): 1.0}
    while open_:
        grown = {}
        for begun, mass in open_.items():
            drawn = segments_of(guided, prompt, begun, limit, **settings)
            texts = {tokens: [*prompt, *begun, *tokens] for tokens in drawn}
            rewards = {tokens: reward(guided.scorer.model, text) for tokens, text in texts.items()}
            for tokens, p in choose({t: p for t, (p, _) in drawn.items()}, rewards, len(begun)).items():
                into = finished if drawn[tokens][1] else grown
                into[(*begun, *tokens)] = into.get((*begun, *tokens), 0.0) + mass * p
        open_ = grown
    return finished


def best_among(masses, rewards, n) -> dict:
    """Probability that each is the best of n draws with these (possibly unnormalised) probabilities."""
    chosen, below = {}, 0.0
    for one in sorted(masses, key=rewards.__getitem__):
        chosen[one] = (below + masses[one]) ** n - below**n
        below += masses[one]
    return chosen


def accepted_among(masses, rewards, thresholds, beta, retries) -> dict:
    """Drawn until one is accepted with min(1, exp(β(r − τ))); the best of all when the retries are used up."""
    accept = {t: min(1.0, math.exp(beta * (rewards[t] - thresholds[t]))) for t in masses}
    refused = sum(p * (1 - accept[t]) for t, p in masses.items())
    tries = sum(refused**i for i in range(retries + 1))
    fallback = best_among({t: p * (1 - accept[t]) for t, p in masses.items()}, rewards, retries + 1)
    return {t: p * accept[t] * tries + fallback[t] for t, p in masses.items()}


def resampled_from(weights) -> dict[tuple[int, ...], float]:
    """Probability of every list of n ancestors under systematic resampling with one uniform number."""
    n, total = len(weights), sum(weights)
    below = [sum(weights[: i + 1]) / total for i in range(n)]
    # the ancestors change where a point (i + u)/n passes one of these sums
    edges = sorted({0.0, 1.0, *(u for b in below for i in range(n) if 0 < (u := n * b - i) < 1)})
    found = {}
    for low, high in itertools.pairwise(edges):
        points = [(i + (low + high) / 2) / n for i in range(n)]
        ancestors = tuple(next((j for j, b in enumerate(below) if point < b), n - 1) for point in points)
        found[ancestors] = found.get(ancestors, 0.0) + high - low
    return found


def particle_distribution(guided, prompt, length, n, *, beta, **settings) -> dict[tuple[int, ...], float]:
    """Probability of each completion that n particles give, by going through all their joint histories.

    Particles are drawn from the guided distribution; after each token they weigh π/q·exp(β·r) and are resampled where
    their effective number is below n/2. The result is one of them, drawn by the weights.
    """
    steps, scores = {}, {}

    def grown(tokens):
        """Each next token with its probability and the logarithm of π over it, π being cut to the candidates."""
        if tokens not in steps:
            text = [*prompt, *tokens]
            guiding = step_distribution(guided, text, beta=beta, **settings)
            plain = step_distribution(guided, text, beta=0.0, **(settings | {"temperature": 1.0}))
            steps[tokens] = [(v, math.exp(q), plain[v] - q) for v, q in guiding.items()]
        return steps[tokens]

    def score_of(tokens):
        if tokens not in scores:
            scores[tokens] = beta * score(guided, guided.scorer, [*prompt, *tokens]) if tokens else 0.0
        return scores[tokens]

    states, done = {tuple(((), 0.0) for _ in range(n)): 1.0}, {}
    for step in range(length):
        after = {}
        for particles, mass in states.items():
            # 1. every way in which the particles grow; (tokens, log of what resamplings and π/q made of their weight)
            ways = []
            for tokens, held in particles:
                ended = bool(tokens) and tokens[-1] == EOS
                more = [(tokens, held, 1.0)] if ended else [((*tokens, v), held + w, p) for v, p, w in grown(tokens)]
                ways.append(more)
            for way in itertools.product(*ways):
                p = mass * math.prod(q for *_, q in way)
                now = [(tokens, held) for tokens, held, _ in way]
                weights = [math.exp(held + score_of(tokens)) for tokens, held in now]
                ended = all(tokens[-1] == EOS for tokens, _ in now) or step + 1 == length
                if ended or sum(weights) ** 2 / sum(w * w for w in weights) >= n / 2:
                    after[tuple(now)] = after.get(tuple(now), 0.0) + p
                    continue
                # 2. every outcome of a resampling; the survivors weigh the same
                for ancestors, q in resampled_from(weights).items():
                    mean = math.log(sum(weights) / n)
                    kept = tuple((now[j][0], mean - score_of(now[j][0])) for j in ancestors)
                    after[kept] = after.get(kept, 0.0) + p * q
        states = after
    # 3. one of them, by the weights
    for particles, mass in states.items():
        weights = [math.exp(held + score_of(tokens)) for tokens, held in particles]
        for (tokens, _), w in zip(particles, weights, strict=True):
            done[tokens] = done.get(tokens, 0.0) + mass * w / sum(weights)
    return done


def beam_search(guided, prompt, length, n, *, beta, every=1, temperature=0.0, **settings):
    """The text of highest log π + β·r that n beams find, and that value; scores are read every so many tokens."""
    ended, open_ = [], [((), 0.0, 0.0)]  # tokens, log π, β·r as it was last read
    for step in range(1, length + 1):
        options = [(log_prob + r, tokens, log_prob, r, True) for tokens, log_prob, r in ended]
        grown = {}
        for tokens, log_prob, r in open_:
            whole = step_distribution(guided, [*prompt, *tokens], beta=0.0, temperature=1.0, **settings)
            unnormalised = processed_log_probs(guided, [*prompt, *tokens], settings.get("logit_bias"))
            grown[tokens] = [(v, log_prob + float(unnormalised[v]), r) for v in whole]
        reads = step % every == 0 or step == length or any(v == EOS for mine in grown.values() for v, *_ in mine)
        for tokens, mine in grown.items():
            for v, log_prob, r in mine:
                read = beta * score(guided, guided.scorer, [*prompt, *tokens, v]) if reads else r
                options.append((log_prob + read, (*tokens, v), log_prob, read, v == EOS))
        kept = sorted(options, key=lambda one: -one[0])[:n]
        ended = [(tokens, log_prob, r) for _, tokens, log_prob, r, end in kept if end]
        open_ = [(tokens, log_prob, r) for _, tokens, log_prob, r, end in kept if not end]
        if not open_:
            break
    best = max(ended + open_, key=lambda one: one[1] + one[2])
    return best[0], best[1] + best[2]


def processed_log_probs(guided, ids, logit_bias=None):
    """The policy's log-probabilities (V,) with a bias on its logits."""
    plain = next_log_probs(guided.policy.model, ids)
    return torch.log_softmax(plain + torch.tensor([(logit_bias or {}).get(t, 0.0) for t in range(len(plain))]), -1)
