"""Every benchmark on a GPU, one after the other, with one command; what they print goes to a file.

    python benchmarks/gpu.py --out gpu.md       # about half an hour
"""
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]                                   # run from a clone without installing
from nanocpo.utils.cli import Parser, command  # noqa: E402

SD = "benchmarks/sd.py step --device cuda --dtype bfloat16 --steps 6"
COMMANDS = (
    "benchmarks/step.py --device cuda", "benchmarks/step.py --device cuda --bf16",
    f"{SD} --model 1 --size 64", f"{SD} --model 1 --size 64 --checkpointing",
    f"{SD} --model xl --size 128", f"{SD} --model xl --size 128 --checkpointing",
    "benchmarks/step.py growth --device cuda",
    "train_cpo.py --device cuda --out {out}", "train_cpo.py --device cuda --bf16 --out {out}_bf16")


def main(argv=None):
    """Run the commands; one that fails does not stop the others."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="gpu.md", help="what was printed, as Markdown")
    parser.add_argument("--models", default="out_gpu", help="folder for what the main job trains")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; on a processor: python benchmarks/step.py")
    with open(args.out, "w", encoding="utf-8") as file:
        file.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
        for words in COMMANDS:
            words, start = words.format(out=args.models), time.time()
            done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            said = done.stdout + ("" if done.returncode == 0 else done.stderr[-2000:])
            text = (f"\n## python {words}\n\n{said.strip()}\n\n"
                    f"{time.time() - start:.0f} s, status {done.returncode}\n")
            print(text)
            file.write(text)
            file.flush()


if __name__ == "__main__":
    command(main)
