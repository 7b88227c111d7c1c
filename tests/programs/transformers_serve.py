"""Converted models in transformers serve: real servers, five requests at once, compared with transformers. make test-serving.

With ssmax and with the checkpoint's own code, one by one and with continuous batching; then with matrices that quantized.py quantises.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm_requests import NEW, SHAPE, ask, blocker, make, quantise, running

BATCHES = ["--continuous-batching", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "256"]
MODES = {
    "with ssmax": [],
    "with ssmax, continuous batching": BATCHES,
    "its own code": [],
    "its own code, continuous batching": BATCHES,
    "torchao int8 weights": [],
    "torchao int8 weights, its own code": [],
    "bitsandbytes int8": [],
    "bitsandbytes int8, its own code": [],
}


def main() -> None:
    """Run all modes; exit with 1 where an answer differs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "float32")
        prompts, *computed = make("llama", {}, {"bias": True}, folder)
        found = {folder: [answers for answers, _ in computed]}
        for kind in ("torchao int8 weights", "bitsandbytes int8"):
            computed = quantise(kind, folder, Path(place, kind), prompts)
            found[Path(place, kind)] = [answers for answers, _ in computed]
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        for one in found:
            PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(one)
        failed, without = False, str(blocker(folder))
        for mode, options in MODES.items():
            served = next((one for one in found if one.name in mode), folder)
            environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": without} if "own" in mode else {})
            failed |= not run(
                mode, served, options, environment, [_texts(lists) for lists in (prompts, *found[served])]
            )
    sys.exit(failed)


def run(mode, folder, options, environment, texts) -> bool:
    """Serve a folder, ask all prompts at once and print how many answers are equal; return whether all are."""
    prompts, wanted, plain = texts
    assert plain != wanted, "softmax gives the same answers: this shows nothing"
    command = ["transformers.cli.transformers", "serve", str(folder), "--trust-remote-code", "--device", "cpu"]
    with running([*command, *options], folder / "server.log", environment) as port, ThreadPoolExecutor() as pool:
        got = list(pool.map(lambda text: _answer(port, str(folder), text), prompts))
    equal = sum(a == b for a, b in zip(got, wanted, strict=True))
    print(f"transformers serve, {mode}: {equal} of {len(wanted)} requests equal", flush=True)
    return equal == len(wanted)


def _texts(lists):
    return [" ".join(f"w{i}" for i in ids) for ids in lists]


def _answer(port, place, text):
    settings = json.dumps({"do_sample": False, "max_new_tokens": NEW})
    return ask(port, {"model": place, "prompt": text, "max_tokens": NEW, "generation_config": settings})["text"].strip()


if __name__ == "__main__":
    main()
