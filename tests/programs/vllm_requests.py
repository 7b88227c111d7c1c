"""Converted models in vLLM: real engines and a real server, every request compared with transformers. make test-serving.

    python vllm_requests.py [WORDS OF A CASE ...]

Random models, s and b of each head between 0.1 and 0.9, so that plain softmax gives other tokens. Five prompts of 3 to 700 tokens,
two of which begin alike, and 16 greedy tokens each: all at once in chunks of 64 tokens, then again from the cached prefix. Then the
log-probability of each token of the prompts, also in chunks.

All are compared with transformers in float32; of quantised checkpoints, with the same quantised matrices. Engines in half precision
are judged by the log-probabilities: vLLM may err twice as much as transformers in half precision.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
WINDOWS = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 40}
ALL, B, EAGER = {"layers": [0, 1, 2, 3]}, {"bias": True}, {"enforce_eager": True}
# Family, changes of its config, options of convert, options of vLLM.
CASES = {
    "Llama with b": ("llama", {}, B, EAGER),
    "Llama, compiled": ("llama", {}, {}, {}),
    "Llama of the law yarn": ("llama", {}, {"law": "yarn", "law_parameters": {"factor": 40.0}}, EAGER),
    "Qwen 3 with b, compiled": ("qwen3", {}, B, {}),
    "Qwen 3 MoE": ("qwen3_moe", EXPERTS, {}, EAGER),
    "OLMo 3 with windows": ("olmo3", WINDOWS, ALL, EAGER),
    "Gemma 3 with windows and b, compiled": ("gemma3_text", WINDOWS, ALL | B, {}),
    "Llama with b, tensor parallel 2": ("llama", {}, B, EAGER | {"tensor_parallel_size": 2}),
    "Llama with b, its own code": ("llama", {}, B, EAGER | {"trust_remote_code": True}),
    "OLMo 3 with windows and b, its own code, compiled": ("olmo3", WINDOWS, ALL | B, {"trust_remote_code": True}),
    "Llama with b, bfloat16": ("llama", {}, B, EAGER | {"dtype": "bfloat16"}),
    "Llama with b, float16": ("llama", {}, B, EAGER | {"dtype": "float16"}),
    "Llama with b, its own code, float16": (
        "llama",
        {},
        B,
        EAGER | {"dtype": "float16", "trust_remote_code": True},
    ),
    "Llama with b, int8 by torchao": ("llama", {}, B, EAGER),
    "Llama with b, int4 of compressed-tensors, float16": ("llama", {}, B, EAGER | {"dtype": "float16"}),
    "Llama with b, int4 by GPTQ, float16": ("llama", {}, B, EAGER | {"dtype": "float16"}),
    "Llama with b, int4 by AWQ, float16": ("llama", {}, B, EAGER | {"dtype": "float16"}),
}
SERVED = "Llama with b"  # over HTTP as well
# How quantized.py quantises; vLLM multiplies int4 in half precision only on a CPU.
QUANTISED = {
    "Llama with b, int8 by torchao": "torchao int8 weights",
    "Llama with b, int4 of compressed-tensors, float16": "compressed-tensors int4 in groups of 32",
    "Llama with b, int4 by GPTQ, float16": "GPTQ, int4 in groups of 32",
    "Llama with b, int4 by AWQ, float16": "AWQ, int4 in groups of 32",
}
LLM_COMPRESSOR = Path(".venvs/llm-compressor/bin/python")  # whose transformers is older than vLLM's
SIZES, SHARED, NEW = (3, 17, 130, 700, 500), 400, 16
EXACT = 1e-3  # of a log-probability in float32
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to look at the parameters in the engine's process
}


def make(family, changes, options, folder):
    """Save a random converted model; return the prompts, and what compute gives for it and for plain softmax."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import ssmax

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | changes)).eval()
    ssmax.convert(model, **options if "law" in options else {"init": 0.5, **options})
    for name, parameter in model.named_parameters():
        if ".ssmax." in name:
            parameter.data.uniform_(0.1, 0.9)
    model.save_pretrained(folder)
    prompts = [torch.randint(3, 512, (1, size)) for size in SIZES]
    prompts[4][:, :SHARED] = prompts[3][:, :SHARED]
    prompts = [prompt[0].tolist() for prompt in prompts]
    return prompts, compute(model, prompts), compute(ssmax.revert(model), prompts)


def compute(model, prompts):
    """Return greedy answers of transformers, and the log-probabilities of the prompts' tokens, from the second on."""
    import torch

    found = [model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False) for prompt in prompts]
    return [tokens[0, -NEW:].tolist() for tokens in found], scores(model, prompts)


def scores(model, prompts):
    """Return the log-probabilities of all prompts' tokens in one list."""
    import torch

    found = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, :-1].float()
        found += logits.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]].tolist()
    return found


def quantise(kind, source, folder, prompts):
    """Save a quantised checkpoint; return what compute gives for its matrices in float32, and for them with plain softmax."""
    import quantized

    import ssmax

    own = quantized.by_transformers()
    if kind in own:
        quantized.save(own[kind](source), folder)
    else:
        subprocess.run([LLM_COMPRESSOR, quantized.__file__, "llm-compressor", kind, source, folder], check=True)
    model = quantized.load(folder)
    return compute(model, prompts), compute(ssmax.revert(model), prompts)


def engine(folder, prompts, options):
    """Answer in this process: all prompts as one batch, then each again from the cached prefix; and score the prompts."""
    import vllm_requests  # its functions have a name in other processes
    from vllm import LLM, SamplingParams

    options = {
        "dtype": "float32",
        "max_model_len": 1024,
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 64,
        **options,
    }
    options |= {"enable_chunked_prefill": True, "enable_prefix_caching": True, "max_num_seqs": 8}
    llm = LLM(model=str(folder), **options)
    kept = llm.apply_model(vllm_requests.dtypes_of_scales)
    assert set().union(*kept) <= {"torch.float32"}, f"dtypes of s and b: {kept}"
    wishes = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    wanted = [{"prompt_token_ids": prompt} for prompt in prompts]
    rounds = [llm.generate(wanted, wishes, use_tqdm=False) for _ in range(2)]
    cached = [outputs[3].num_cached_tokens for outputs in rounds]
    assert cached[0] == 0 < cached[1], f"tokens of the longest prompt that came from the cache: {cached}"
    answers = [[list(output.outputs[0].token_ids) for output in outputs] for outputs in rounds]
    scored = llm.generate(wanted, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
    listed = [zip(prompt, output.prompt_logprobs, strict=True) for prompt, output in zip(prompts, scored, strict=True)]
    return *answers, [found[token].logprob for pairs in listed for token, found in pairs if found]


def dtypes_of_scales(model):
    """Return the dtypes of the parameters of the law."""
    return {str(parameter.dtype) for name, parameter in model.named_parameters() if ".ssmax." in name}


def serve(folder, prompts):
    """Answer over HTTP, all prompts at once."""
    options = ["--dtype", "float32", "--max-model-len", "1024", "--skip-tokenizer-init", "--max-num-seqs", "8"]
    options += ["--enforce-eager"]
    command = ["vllm.entrypoints.cli.main", "serve", str(folder), *options]
    with running(command, folder / "server.log", os.environ | ENVIRONMENT) as port, ThreadPoolExecutor() as pool:
        return list(pool.map(lambda prompt: _ask(port, folder, prompt), prompts))


@contextlib.contextmanager
def running(command, log, environment):
    """Run a module as a server on a free port of 127.0.0.1 while the block lasts, which is given the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield port
        finally:
            for signal in (15, 9):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(server.pid, signal)
                    server.wait(60)


def _wait(server, url, log):
    for _ in range(1800):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if server.poll() is not None:
            break
        time.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


def _ask(port, folder, prompt):
    wish = {"model": str(folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    return ask(port, {**wish, "ignore_eos": True, "return_token_ids": True})["token_ids"]


def ask(port, wish):
    """Return the answer to a wish of the completions API."""
    url, kind = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(wish).encode(), kind), timeout=300) as answer:
        return json.loads(answer.read())["choices"][0]


def run(name: str) -> bool:
    """Run a case and print how vLLM answered, beside transformers; return whether it computes the same."""
    import torch

    family, changes, options, engine_options = CASES[name]
    dtype = engine_options.get("dtype", "float32")
    if dtype == "bfloat16" and torch.cpu._is_amx_tile_supported():
        print(
            f"{name}: not run, vLLM {version('vllm-cpu')} ends with an illegal instruction where the processor has AMX"
        )
        return True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts, (wanted, exact), (plain, other) = make(family, changes, options, folder)
        if name in QUANTISED:
            source, folder = folder, folder / "quantised"
            (wanted, exact), (plain, other) = quantise(QUANTISED[name], source, folder, prompts)
        (folder / "jobs.json").write_text(json.dumps([prompts, engine_options]))
        environment = os.environ | ENVIRONMENT
        if "trust_remote_code" in engine_options:
            environment["VLLM_PLUGINS"] = ""  # as where ssmax is not installed; that its code is blocked
            environment["PYTHONPATH"] = str(blocker(folder))
        ended = subprocess.run([sys.executable, __file__, "--engine", folder], check=False, env=environment)
        if not (folder / "answers.json").exists():  # vLLM may also abort afterwards, while the process ends
            ended.check_returncode()
        first, again, got = json.loads((folder / "answers.json").read_text())
        rounds = {"batch": first, "cached prefix": again}
        if name == SERVED:
            rounds["five at once over HTTP"] = serve(folder, prompts)
        errors = {"vLLM": distance(got, exact)}
        if dtype != "float32":
            errors["transformers"] = distance(half_scores(folder, dtype, prompts), exact)
    errors["plain softmax"] = distance(other, exact)
    equal = {way: sum(a == b for a, b in zip(got, wanted, strict=True)) for way, got in rounds.items()}
    same = sum(a == b for a, b in zip(plain, wanted, strict=True))
    ways = ", ".join(f"{way} {count} of {len(wanted)}" for way, count in equal.items())
    apart = ", ".join(f"{way} {value:.1e}" for way, value in errors.items())
    print(f"{name}: answers equal: {ways}, plain softmax {same}; log-probabilities differ by {apart}", flush=True)
    if dtype == "float32":
        return same < len(wanted) == min(equal.values()) and errors["vLLM"] < EXACT < errors["plain softmax"]
    return 2 * errors["vLLM"] <= 4 * errors["transformers"] < errors["plain softmax"]


def half_scores(folder, dtype, prompts):
    """Return the log-probabilities that transformers computes in half precision."""
    import torch
    from transformers import AutoModelForCausalLM

    return scores(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval(), prompts)


def distance(some, others):
    """Return the root mean square of differences."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(some, others, strict=True)) / len(some))


def blocker(folder):
    """A folder whose sitecustomize makes ssmax unknown."""
    place = folder / "blocker"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys\n\n\nclass Blocker:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'ssmax':\n            raise ModuleNotFoundError(name, name=name)\n\n\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return place


def main() -> None:
    """Run all cases, or those whose names hold a word that was given; exit with 1 where an answer differs."""
    if len(sys.argv) > 2 and sys.argv[1] == "--engine":
        folder = Path(sys.argv[2])
        answers = engine(folder, *json.loads((folder / "jobs.json").read_text()))
        (folder / "answers.new").write_text(json.dumps(answers))
        (folder / "answers.new").rename(folder / "answers.json")
        return
    equal = [run(name) for name in CASES if any(word in name for word in sys.argv[1:] or [""])]
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
