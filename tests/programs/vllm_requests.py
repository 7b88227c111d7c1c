"""Converted models in vLLM: real engines and a real server, every request compared with transformers. make test-serving.

    python vllm_requests.py

Random float32 models, s and b of each head between 0.1 and 0.9, so that plain softmax gives other tokens; prompts of 3 to 700 tokens,
16 greedy tokens each. Prefills are split into chunks of 64, prefixes and pages are cached.
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

CASES = {
    "llama with b, eager": ("llama", {"bias": True}, {"enforce_eager": True}),
    "llama, compiled": ("llama", {}, {}),
    "qwen3 with b, eager": ("qwen3", {"bias": True}, {"enforce_eager": True}),
    "olmo3 with windows, eager": ("olmo3", {"layers": [0, 1, 2, 3]}, {"enforce_eager": True}),
    "llama with b, tensor parallel 2": ("llama", {"bias": True}, {"enforce_eager": True, "tensor_parallel_size": 2}),
    "llama with b, its own code": ("llama", {"bias": True}, {"enforce_eager": True, "trust_remote_code": True}),
}
SIZES = (3, 17, 130, 700)
NEW = 16
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def make(family, options, folder):
    """Save a random converted model; return the prompts, its greedy answers and those of plain softmax."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import ssmax

    changes = (
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 40}
        if family == "olmo3"
        else {}
    )
    config = AutoConfig.for_model(
        family,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model = ssmax.convert(AutoModelForCausalLM.from_config(config).eval(), 0.5, **options)
    for name, parameter in model.named_parameters():
        if ".ssmax." in name:
            parameter.data.uniform_(0.1, 0.9)
    model.save_pretrained(folder)
    prompts = [torch.randint(3, 512, (1, size)) for size in SIZES]

    def answers():
        found = [model.generate(prompt, max_new_tokens=NEW, do_sample=False) for prompt in prompts]
        return [tokens[0, -NEW:].tolist() for tokens in found]

    wanted = answers()
    ssmax.revert(model)
    return [prompt[0].tolist() for prompt in prompts], wanted, answers()


def engine(folder, jobs):
    """Answer in this process: all prompts as one batch, then each again from the cached prefix."""
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "max_model_len": 1024, "skip_tokenizer_init": True, "max_num_batched_tokens": 64}
    options |= {"enable_chunked_prefill": True, "enable_prefix_caching": True, "max_num_seqs": 8, **jobs["options"]}
    llm = LLM(model=str(folder), **options)
    wishes = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in jobs["prompts"]]
    rounds = [llm.generate(prompts, wishes, use_tqdm=False) for _ in range(2)]
    (folder / "answers.json").write_text(json.dumps([[list(o.outputs[0].token_ids) for o in outs] for outs in rounds]))


def serve(folder, prompts):
    """Answer over HTTP, all prompts at once, from a server that is stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--enforce-eager",
        "--skip-tokenizer-init",
        "--max-num-seqs",
        "8",
    ]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, start_new_session=True)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", folder / "server.log")
            with ThreadPoolExecutor(len(prompts)) as pool:
                return list(pool.map(lambda prompt: _ask(port, folder, prompt), prompts))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 15)
            server.wait(60)


def _wait(server, url, log):
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if server.poll() is not None:
            break
        time.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


def _ask(port, folder, prompt):
    wish = {
        "model": str(folder),
        "prompt": prompt,
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(wish).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["choices"][0]["token_ids"]


def main() -> None:
    """Run all cases, or those whose names hold a word that was given; exit with 1 where an answer differs."""
    if len(sys.argv) > 2 and sys.argv[1] == "--engine":
        folder = Path(sys.argv[2])
        engine(folder, json.loads((folder / "jobs.json").read_text()))
        return
    failed = False
    for name, (family, options, engine_options) in CASES.items():
        if not any(word in name for word in sys.argv[1:] or [""]):
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            prompts, wanted, plain = make(family, options, folder)
            (folder / "jobs.json").write_text(json.dumps({"prompts": prompts, "options": engine_options}))
            environment = os.environ | ENVIRONMENT
            if "trust_remote_code" in engine_options:
                environment["VLLM_PLUGINS"] = ""  # as where ssmax is not installed; that its code is blocked
                environment["PYTHONPATH"] = str(_blocker(folder))
            subprocess.run([sys.executable, __file__, "--engine", folder], check=True, env=environment)
            first, again = json.loads((folder / "answers.json").read_text())
            rounds = {"batch": first, "cached prefix": again}
            if name.startswith("llama with b, eager"):
                rounds["five at once over HTTP"] = serve(folder, [*prompts, prompts[0]])[:-1]
            assert plain != wanted, "softmax gives the same answers: this shows nothing"
            for way, got in rounds.items():
                equal = sum(a == b for a, b in zip(got, wanted, strict=True))
                failed |= equal < len(wanted)
                print(f"{name}, {way}: {equal} of {len(wanted)} requests equal", flush=True)
    sys.exit(failed)


def _blocker(folder):
    """A folder whose sitecustomize makes ssmax unknown."""
    place = folder / "blocker"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys\n\n\nclass Blocker:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'ssmax':\n            raise ModuleNotFoundError(name, name=name)\n\n\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return place


if __name__ == "__main__":
    main()
