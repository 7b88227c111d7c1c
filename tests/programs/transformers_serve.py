"""Converted models in transformers serve: real servers, five requests at once, compared with transformers. make test-serving.

With ssmax and with the checkpoint's own code, one by one and with continuous batching.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm_requests import NEW, SHAPE, ask, blocker, make, running

BATCHES = ["--continuous-batching", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "256"]
MODES = {
    "with ssmax": [],
    "with ssmax, continuous batching": BATCHES,
    "its own code": [],
    "its own code, continuous batching": BATCHES,
}


def main() -> None:
    """Run all modes; exit with 1 where an answer differs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts, wanted, plain = make("llama", {}, {"bias": True}, folder)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        texts, wanted, plain = ([" ".join(f"w{i}" for i in ids) for ids in lists] for lists in (prompts, wanted, plain))
        assert plain != wanted, "softmax gives the same answers: this shows nothing"
        failed, without = False, str(blocker(folder))
        for mode, options in MODES.items():
            environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": without} if "own" in mode else {})
            command = [
                "transformers.cli.transformers",
                "serve",
                place,
                "--trust-remote-code",
                "--device",
                "cpu",
                *options,
            ]
            with running(command, folder / "server.log", environment) as port, ThreadPoolExecutor() as pool:
                got = list(pool.map(lambda text, port=port: _answer(port, place, text), texts))
            equal = sum(a == b for a, b in zip(got, wanted, strict=True))
            failed |= equal < len(wanted)
            print(f"transformers serve, {mode}: {equal} of {len(wanted)} requests equal", flush=True)
    sys.exit(failed)


def _answer(port, place, text):
    settings = json.dumps({"do_sample": False, "max_new_tokens": NEW})
    return ask(port, {"model": place, "prompt": text, "max_tokens": NEW, "generation_config": settings})["text"].strip()


if __name__ == "__main__":
    main()
