"""Speed, load time and memory of a whole model with packed weights beside the dense one in bfloat16:
`whole_model.py [--sparsities 0.7] [--values same,int8,int4] [--batches 1,8]`.

The model has the shape of Llama 3.2 1B (16 blocks, 2048 wide) with a vocabulary of 32000, and random weights
and masks, the same in each block: speed does not depend on them. Each contestant is a process of its own, and
all take turns; figures are medians. The embedding and the head, an eighth of the weights, stay dense.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmprune.kernels.library import status

HERE = Path(__file__).resolve().parent
SHAPE = [
    "--blocks=1",
    "--width=2048",
    "--intermediate=8192",
    "--heads=32",
    "--kv-heads=8",
    "--vocabulary=32000",
]
PROMPT, PREFILL = 8, 512  # tokens


def make(folder, arguments):
    """The dense folder and the packed ones, by the name of the contestant."""
    one, found = folder / "one", {"bf16": folder / "bf16"}
    subprocess.run([sys.executable, str(HERE / "make_model.py"), str(one), *SHAPE], check=True)
    repeat(one, found["bf16"], arguments.blocks)
    for sparsity in arguments.sparsities.split(","):
        sparse, made = folder / "sparse", folder / "packed"
        shutil.copytree(one, sparse)
        prune(sparse, float(sparsity))
        for values in arguments.values.split(","):
            if not float(sparsity) and values == "same":
                continue  # a full matrix in bfloat16 stays dense
            name = f"{float(sparsity):.0%}, {'bf16' if values == 'same' else values}"
            command = ["convert", str(sparse), "--to", "packed", "--values", values, "--output", str(made)]
            subprocess.run([sys.executable, "-m", "llmprune", *command, "--quiet"], check=True)
            found[name] = folder / name
            repeat(made, found[name], arguments.blocks)
            shutil.rmtree(made)
        shutil.rmtree(sparse)
    return found


def prune(folder, sparsity):
    """Zeroes weights by chance."""
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors, generator = load_file(file), torch.Generator().manual_seed(number)
        for name, tensor in tensors.items():
            if name.startswith("model.layers.") and tensor.ndim == 2 and sparsity:
                tensor[torch.rand(tensor.shape, generator=generator) < sparsity] = 0
        save_file(tensors, file, metadata={"format": "pt"})


def repeat(one, folder, blocks):
    """A model whose block, in the files of `one`, stands there so many times, each in a file of its own."""
    folder.mkdir()
    config = json.loads((one / "config.json").read_text()) | {"num_hidden_layers": blocks}
    packed = config.get("quantization_config", {"matrices": {}})
    names = [(f".layers.{number}.", name) for number in range(blocks) for name in packed["matrices"]]
    packed["matrices"] = {n.replace(".layers.0.", at): packed["matrices"][n] for at, n in names}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t for file in sorted(one.glob("*.safetensors")) for n, t in load_file(file).items()}
    rest = {n: t for n, t in tensors.items() if ".layers.0." not in n}
    files = {"rest.safetensors": rest}
    for number in range(blocks):
        files[f"block-{number}.safetensors"] = {
            n.replace(".layers.0.", f".layers.{number}."): t for n, t in tensors.items() if n not in rest
        }
    for file, its in files.items():
        save_file(its, folder / file, metadata={"format": "pt"})
    where = {name: file for file, its in files.items() for name in its}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- one contestant -------------------------------------------------------------------------------------


def memory(*keys):
    """Entries of this process's memory in bytes."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return [int(lines[key].split()[0]) << 10 for key in keys]


class Peaks:
    """The most private memory (RssAnon) while something runs; looked at every few milliseconds."""

    def __enter__(self):
        self.private, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        while not self._over.wait(0.004):
            self.private = max(self.private, *memory("RssAnon"))

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()


class Worker:
    """A loaded model that does what its parent writes to it."""

    def __init__(self, folder, one_thread):
        if one_thread:
            torch.set_num_threads(1)
        self.clock = time.thread_time if one_thread else time.perf_counter
        import transformers  # noqa: F401  its import is not the model's loading

        import llmprune

        self.before = memory("RssAnon")[0]
        with Peaks() as peaks:
            started = time.perf_counter()
            self.model = llmprune.load(folder).eval()
            self.load_seconds = time.perf_counter() - started
        self.loading = peaks.private - self.before
        self.model.generation_config.eos_token_id = None
        self.words = torch.Generator().manual_seed(0)

    def ids(self, batch, length):
        return torch.randint(1, 32000, (batch, length), generator=self.words)

    def generate(self, batch, tokens):
        """Tokens per second after the first one, of all rows of the batch."""
        times, prompt = [], self.ids(batch, PROMPT)

        def note(*_, **__):
            times.append(self.clock())
            return torch.zeros(batch, dtype=torch.bool)

        options = {"do_sample": False, "max_new_tokens": tokens, "stopping_criteria": [note]}
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
        assert len(times) == tokens
        return batch * (tokens - 1) / (times[-1] - times[0])

    def prefill(self):
        """Seconds."""
        prompt = self.ids(1, PREFILL)
        started = self.clock()
        with torch.no_grad():
            self.model(prompt, use_cache=True, logits_to_keep=1)
        return self.clock() - started

    def used(self):
        """Bytes: private ones while loading and generating, and of mapped files, beyond the imports."""
        with Peaks() as peaks:
            self.generate(1, 8)
            self.prefill()
        files, high = memory("RssFile", "VmHWM")
        return {
            "load_seconds": self.load_seconds,
            "private_loading": self.loading,
            "private_working": peaks.private - self.before,
            "of_files": files,
            "peak": high,
        }


def work(folder, one_thread):
    worker = Worker(folder, one_thread)
    for line in sys.stdin:
        name, *rest = json.loads(line)
        print(json.dumps(getattr(worker, name)(*rest)), flush=True)


class Contestant:
    """A worker in a process of its own."""

    def __init__(self, folder, one_thread):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder)]
        command += ["--one-thread"] if one_thread else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.file_bytes = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))

    def ask(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contestant ended with status {self.process.wait()}")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


# ---- all of them ----------------------------------------------------------------------------------------


def measure(folders, arguments):
    """name -> figures."""
    running, figures = {}, {}
    for name, folder in folders.items():
        running[name] = Contestant(folder, arguments.one_thread)
        figures[name] = {"file_bytes": running[name].file_bytes} | running[name].ask("used")
    tasks = {
        f"tokens/s, batch {b}": ("generate", int(b), arguments.tokens) for b in arguments.batches.split(",")
    }
    tasks[f"prefill of {PREFILL}, s"] = ("prefill",)
    for task, request in tasks.items():
        found = {name: [] for name in running}
        for _ in range(arguments.repeats):
            for name, contestant in running.items():
                found[name].append(contestant.ask(*request))
        for name, each in found.items():
            figures[name][task] = statistics.median(each)
    for contestant in running.values():
        contestant.end()
    return figures


def show(figures, one_thread):
    dense = figures["bf16"]
    speeds = [key for key in dense if key.startswith(("tokens", "prefill"))]
    if one_thread:
        torch.set_num_threads(1)
    print(f"\n{status()}{', processor time' * one_thread}\n")
    print("| | file GB | load s | private GB loading | working | of files GB |", end="")
    print("".join(f" {key} | x |" for key in speeds))
    print("|" + "---|" * (6 + 2 * len(speeds)))
    for name, found in figures.items():
        sizes = (found[key] / 1e9 for key in ("private_loading", "private_working", "of_files"))
        cells = [name, f"{found['file_bytes'] / 1e9:.2f}", f"{found['load_seconds']:.1f}"]
        cells += [f"{size:.2f}" for size in sizes]
        for key in speeds:
            ratio = found[key] / dense[key] if key.startswith("tokens") else dense[key] / found[key]
            cells += [f"{found[key]:.2f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", default="0.7", help="0 measures full matrices in int8 and int4")
    parser.add_argument("--values", default="same,int8,int4")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the folders here, and take them from here")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--one-thread", action="store_true", help="one thread each, processor time")
    parser.add_argument(
        "--only", default="", help="of the folders kept, those whose names hold this, and bf16"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.one_thread)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        known = folder / "folders.json"
        if known.exists():
            folders = json.loads(known.read_text())
        else:
            folder.mkdir(exist_ok=True)
            folders = {name: str(path) for name, path in make(folder, arguments).items()}
            known.write_text(json.dumps(folders))
        folders = {name: path for name, path in folders.items() if name == "bf16" or arguments.only in name}
        figures = measure(folders, arguments)
    show(figures, arguments.one_thread)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
