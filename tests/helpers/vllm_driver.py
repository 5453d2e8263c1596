"""Runs in vLLM's own environment: an engine in this process, requests that join at given steps, results as JSON.

python vllm_driver.py JOB.json RESULT.json — the job has ``model``, ``engine`` (arguments of an engine) and
``requests``, each with ``join`` (a step), ``prompt`` (token ids), ``params`` (of SamplingParams) and ``guide``
(arguments of xargs, or null). With RGTG_SECOND_RUNNER, vLLM's second model runner runs, which needs Triton and so a
GPU: here Triton's interpreter stands in for it.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if os.environ.get("RGTG_SECOND_RUNNER"):
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    import triton.backends
    import vllm.platforms

    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    vllm.platforms.vllm_version_matches_substr = lambda text: text == "cpu"
    from triton.runtime.interpreter import InterpreterBuilder

    def with_boolean_mask(call, place):
        """The compiler takes integer masks (vLLM's n-gram drafter has some), the interpreter does not."""

        def wrapped(self, *given):
            given[place].data = given[place].data.astype(bool)
            return call(self, *given)

        return wrapped

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, with_boolean_mask(getattr(InterpreterBuilder, name), place))

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from rgtg.engines.vllm import guided_params


def main(job_path, result_path):
    with open(job_path) as file:
        job = json.load(file)
    given = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False, **job["engine"]}
    engine = LLMEngine.from_engine_args(
        EngineArgs(model=job["model"], logits_processors=["rgtg.engines.vllm:Guidance"], **given)
    )
    waiting, results, step = list(enumerate(job["requests"])), {}, 0
    while waiting or engine.has_unfinished_requests():
        for number, request in [one for one in waiting if one[1]["join"] <= step]:
            guide = request["guide"]
            params = {**request["params"], "output_kind": RequestOutputKind.FINAL_ONLY}
            sampling = guided_params(**guide, **params) if guide else SamplingParams(**params)
            engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, sampling)
            waiting.remove((number, request))
        for output in engine.step():
            if output.finished:
                results[output.request_id] = [list(one.token_ids) for one in output.outputs]
        step += 1
    counters = {}
    for metric in engine.get_metrics():
        if metric.name in ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:spec_decode_num_accepted_tokens"):
            counters[metric.name.removeprefix("vllm:")] = metric.value
    with open(result_path, "w") as file:
        json.dump({"tokens": results, "counters": counters, "steps": step}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # without waiting for vLLM's threads
