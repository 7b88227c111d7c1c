"""Converted models in vLLM: real engines and a real server, every request compared with transformers. make test-serving.

    python vllm_requests.py [WORDS OF A CASE ...]

Random float32 models, s and b of each head between 0.1 and 0.9, so that plain softmax gives other tokens. Five prompts of 3 to 700 tokens,
two of which begin alike, and 16 greedy tokens each: all at once in chunks of 64 tokens, then again from the cached prefix.

Quantised checkpoints are compared with transformers' float32 model of the same quantised matrices.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
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
    "Llama with b, its own code, bfloat16": (
        "llama",
        {},
        B,
        EAGER | {"dtype": "bfloat16", "trust_remote_code": True},
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
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to look at the parameters in the engine's process
}


def make(family, changes, options, folder):
    """Save a random converted model; return the prompts, its greedy answers and those of plain softmax."""
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
    wanted = answer(model, prompts)
    ssmax.revert(model)
    return prompts, wanted, answer(model, prompts)


def answer(model, prompts):
    """Answer greedily in transformers."""
    import torch

    found = [model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False) for prompt in prompts]
    return [tokens[0, -NEW:].tolist() for tokens in found]


def quantise(kind, source, folder, prompts, dtype):
    """Save a quantised checkpoint; return what rounded returns of its answers in float32."""
    import quantized

    own = quantized.by_transformers()
    if kind in own:
        quantized.save(own[kind](source), folder)
    else:
        subprocess.run([LLM_COMPRESSOR, quantized.__file__, "llm-compressor", kind, source, folder], check=True)
    return rounded(folder, answer(quantized.load(folder), prompts), prompts, dtype)


def rounded(folder, wanted, prompts, dtype):
    """Return the answers wanted, each up to the first token about which rounding to dtype decides, and softmax's in dtype.

    None is an answer whose first token it decides. Rounding decides if the two largest logits are nearer to each other than
    four times the largest error of a logit in transformers: another engine may err twice as much, in both logits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import ssmax

    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).eval() for kind in ("float32", dtype)
    ]
    kept = []
    for prompt, tokens in zip(prompts, wanted, strict=True):
        with torch.no_grad():
            logits = [model(torch.tensor([prompt + tokens[:-1]])).logits[0, -NEW:].float() for model in models]
        first, second = logits[0].topk(2).values.T
        decided = (first - second < 4 * (logits[1] - logits[0]).abs().amax(-1)).tolist()
        kept.append(tokens[: [*decided, True].index(True)] or None)
    ssmax.revert(models[1])
    return kept, answer(models[1], prompts)


def engine(folder, prompts, options):
    """Answer in this process: all prompts as one batch, then each again from the cached prefix."""
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
    return [[list(output.outputs[0].token_ids) for output in outputs] for outputs in rounds]


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
    """Run a case and print how many requests were answered as transformers answers them; return whether all were."""
    family, changes, options, engine_options = CASES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts, wanted, plain = make(family, changes, options, folder)
        dtype = engine_options.get("dtype", "float32")
        if name in QUANTISED:
            source, folder = folder, folder / "quantised"
            wanted, plain = quantise(QUANTISED[name], source, folder, prompts, dtype)
        elif dtype != "float32":
            wanted, plain = rounded(folder, wanted, prompts, dtype)
        (folder / "jobs.json").write_text(json.dumps([prompts, engine_options]))
        environment = os.environ | ENVIRONMENT
        if "trust_remote_code" in engine_options:
            environment["VLLM_PLUGINS"] = ""  # as where ssmax is not installed; that its code is blocked
            environment["PYTHONPATH"] = str(blocker(folder))
        subprocess.run([sys.executable, __file__, "--engine", folder], check=True, env=environment)
        first, again = json.loads((folder / "answers.json").read_text())
        rounds = {"batch": first, "cached prefix": again}
        if name == SERVED:
            rounds["five at once over HTTP"] = serve(folder, prompts)
        rounds["plain softmax in transformers"] = plain
    pairs = {way: [(a, b) for a, b in zip(got, wanted, strict=True) if b] for way, got in rounds.items()}
    equal = {way: sum(a[: len(b)] == b for a, b in found) for way, found in pairs.items()}
    judged, tokens = len(wanted) - wanted.count(None), sum(len(answer or []) for answer in wanted)
    shown = ", ".join(f"{way} {count} of {judged} equal" for way, count in equal.items())
    print(f"{name}, {tokens} of {NEW * len(wanted)} tokens judged: {shown}", flush=True)
    other = equal.pop("plain softmax in transformers")
    return other < judged == min(equal.values()) and judged > 1


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
        (folder / "answers.json").write_text(json.dumps(answers))
        return
    equal = [run(name) for name in CASES if any(word in name for word in sys.argv[1:] or [""])]
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
