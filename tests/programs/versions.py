"""make versions: the oldest and the newest supported torch and transformers side by side, each in a venv of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VENVS = {
    "oldest": ["torch==2.7.0", "transformers==5.10.1"],
    "newest": ["torch", "transformers>=5.10,<6"],
}
TESTS = ["scaling", "functional", "sharp", "chunks", "nn", "laws", "hf", "damage", "versions"]


def main():
    """Install, test, and print a table; return 1 where a version failed."""
    failed, lines = False, []
    for name, pins in VENVS.items():
        python = ROOT / ".venvs" / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        more = ["pytest>=8", "hypothesis>=6.100", "packaging"]
        install = [python, "-m", "pip", "install", "--quiet", "--upgrade", *pins, *more, "--editable", f"{ROOT}[lab]"]
        subprocess.run(install, check=True)
        show = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
        versions = subprocess.run(
            [python, "-W", "ignore", "-c", show], capture_output=True, text=True, check=True
        ).stdout
        # A library's own deprecations are warnings of that version, not faults of ours.
        tests = [f"tests/test_{test}.py" for test in TESTS]
        done = subprocess.run(
            [python, "-m", "pytest", "-W", "default", *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout, flush=True)
        failed |= done.returncode != 0
        lines.append(f"{name}: {versions.strip()}: {done.stdout.strip().splitlines()[-1]}")
    print("\n".join(lines))
    return failed


if __name__ == "__main__":
    sys.exit(main())
