"""The native kernels under AddressSanitizer and the sanitizer of undefined behaviour, on random matrices in
buffers of exactly their size.

`kernels_asan.py [--cases 300]`. For another processor, where an emulator runs its programs and the compiler
has no sanitizers for it:
`--compiler 'python -m ziglang cc -target aarch64-linux-musl' --plain --runner qemu-aarch64`.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--compiler", default="cc")
    parser.add_argument("--runner", default="")
    parser.add_argument("--plain", action="store_true", help="without the sanitizers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "driver"
        flags = ["-O2", "-g", "-std=gnu11", *([] if arguments.plain else SANITIZERS)]
        sources = [f"-I{HERE.parents[1] / 'llmprune' / 'kernels'}", str(HERE / "kernels_driver.c"), "-lm"]
        subprocess.run([*shlex.split(arguments.compiler), *flags, "-o", program, *sources], check=True)
        command = [*shlex.split(arguments.runner), program, str(arguments.cases)]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
