"""Load saved models with the code of their cards, and leave what they compute.

    python as_the_card_says.py with|without JOBS.pt OUT.pt

JOBS holds folders with the inputs of each model. "without": ssmax cannot be imported.
"""

import re
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModel, logging

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()


def main():
    if sys.argv[1] == "without":
        sys.modules["ssmax"] = None
    found = {}
    for folder, inputs in torch.load(sys.argv[2]).items():
        (code,) = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)
        names = {"path": folder}
        exec(code, names)
        with torch.no_grad():
            outputs = [names["model"].eval()(**inputs)[0]]
            if "pixel_values" in inputs and "Backbone" not in folder:  # the encoder below a head
                encoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
                outputs.append(encoder(**inputs).last_hidden_state)
        found[folder] = [type(names["model"]).__name__, *outputs]
    torch.save(found, sys.argv[3])


if __name__ == "__main__":
    main()
