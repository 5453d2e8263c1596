"""What is kept of an output, and where two of them differ."""

import hashlib
import json
import math

# Kept as they are, a value for each row; those that are nothing in every row are left out.
COLUMNS = (
    "token_ids", "text", "finish_reason", "policy_log_prob", "guided_log_prob", "candidates_log_prob",
    "selection_nats", "score", "policy_calls", "scorer_calls", "drafted", "accepted", "candidates", "retokenised",
    "unscored",
)  # fmt: skip
REST = ("version", "prompt", "method", "seed")
STEP = ("token_id", "candidate_ids", "policy_log_probs", "scores", "scores_of_each", "guided_log_probs")
# What differs from run to run by its nature, at any depth.
PASSING = {
    "provenance", "seconds", "tokens_per_second", "pairs_per_second", "states_seconds", "created", "request_id",
    "git_commit",
}  # fmt: skip


def digest(value):
    """Of a JSON value (floats by their repr) or of bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def completions(done):
    """Of ``Completion``s, or of the lines of a file of them."""
    rows = [each if isinstance(each, dict) else json.loads(each.model_dump_json()) for each in done]
    record = {name: [row[name] for row in rows] for name in COLUMNS}
    record = {name: values for name, values in record.items() if any(value not in (0, None) for value in values)}
    record["rest"] = digest([[row[name] for name in REST] for row in rows])
    if any(row["trace"] is not None for row in rows):
        record["trace"] = [digest([[step[name] for name in STEP] for step in row["trace"]]) for row in rows]
    return record


def lasting(value):
    """A JSON value without what passes; NaN and infinities, which JSON has not, as texts.

    Of a verdict in words the first ones are kept: advice behind the colon may be put better.
    """
    if isinstance(value, dict):
        kept = {name: lasting(inner) for name, inner in value.items() if name not in PASSING}
        return kept | ({"verdict": kept["verdict"].partition(":")[0]} if isinstance(kept.get("verdict"), str) else {})
    if isinstance(value, list):
        return [lasting(inner) for inner in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def differences(before, now, tolerance=None, where=""):
    """(field, before, now) of everything that differs; with a tolerance, floats nearly agree and digests pass."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for name in [*before, *(name for name in now if name not in before)]:
            if name not in before or name not in now:
                found.append((f"{where}.{name}", before.get(name, "absent"), now.get(name, "absent")))
            elif tolerance is None or name not in ("trace", "digest"):
                found += differences(before[name], now[name], tolerance, f"{where}.{name}")
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        both = enumerate(zip(before, now, strict=True))
        return [each for i, (a, b) in both for each in differences(a, b, tolerance, f"{where}[{i}]")]
    if tolerance is not None and isinstance(before, float) and isinstance(now, (int, float)):
        alike = math.isclose(before, now, rel_tol=tolerance, abs_tol=tolerance)
    else:
        alike = type(before) is type(now) and before == now
    return [] if alike else [(where, before, now)]
