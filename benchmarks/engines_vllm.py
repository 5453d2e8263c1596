"""vLLM's part of `engines.py`, run by the interpreter of an environment with vLLM and rgtg's plug-in.

Arguments: folder of the policy, folder of the head, prompts at once, candidates, clock. Reads one line of JSON for each
measurement (prompts, tokens, guided) and answers with one line, which begins with ``rgtg:``.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path


def main():
    policy, head, at_once, top_k, clock = sys.argv[1:]
    now = time.process_time if clock == "cpu" else time.perf_counter
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, as the other engines are in theirs
    scorers = Path(tempfile.mkdtemp()) / "scorers.json"
    scorers.write_text(json.dumps({"head": head}))
    os.environ["RGTG_VLLM_SCORERS"] = str(scorers)
    from vllm import LLM, SamplingParams

    from rgtg.engines.vllm import guided_params

    llm = LLM(
        policy, dtype="bfloat16", max_model_len=1024, max_num_seqs=int(at_once), enable_prefix_caching=False,
        gpu_memory_utilization=0.2,
        logits_processors=["rgtg.engines.vllm:Guidance"],
    )  # fmt: skip
    print("rgtg:" + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        times = []
        for n in (2, asked["tokens"] + 2):  # without the time of the prompt
            common = {"min_tokens": n, "max_tokens": n, "ignore_eos": True, "temperature": 1.0}
            if asked["guided"]:
                params = guided_params("head", 1.0, top_k=int(top_k), **common)
            else:
                params = SamplingParams(top_k=int(top_k), **common)
            start = now()
            llm.generate(prompts, params, use_tqdm=False)
            times.append(now() - start)
        print("rgtg:" + json.dumps({"seconds": (times[1] - times[0]) / asked["tokens"]}), flush=True)


if __name__ == "__main__":
    main()
