"""The sparse formats of compressed-tensors against that library itself: each reads what the other writes.

Run: .venv/bin/python eval/bench/bitmask_crosscheck.py [--python PYTHON]

Without --python, compressed-tensors 0.14 (the last one with these formats) is installed into an environment
of its own in a temporary folder, which sees the torch and transformers of this one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

VERSION = "0.14.*"
SHAPES = ((64, 96), (33, 70), (1, 7), (200, 1024))
FORMATS = ("sparse-bitmask", "sparse-24-bitmask")


def environment(folder: Path) -> str:
    """Make an environment with compressed-tensors; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(
        subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    )
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "loguru", "pydantic"], check=True)
    subprocess.run([*pip, "--no-deps", f"compressed-tensors=={VERSION}"], check=True)
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


# What runs in that environment, and knows nothing of llmprune.


class Theirs:
    """Matrices compressed by the library, with what it reads back itself."""

    def __init__(self, compressor):
        self.compressor, self.written, self.read = compressor, {}, {}

    def take(self, name, weight, scales=None, zeros=None):
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        parts = self.compressor.compress({f"{name}.weight": weight})
        (_, dense), *_ = self.compressor.decompress_from_state_dict(dict(parts))
        beside = {"weight_scale": scales, "weight_zero_point": zeros}
        self.written |= parts | {f"{name}.{part}": t for part, t in beside.items() if t is not None}
        self.read[f"{name}.weight"] = dense if scales is None else dequantize(dense, scales, zeros)

    def take_all(self, where, dense, generator):
        """One matrix in every dtype, and quantised with scales of every shape."""
        import torch

        rows, columns = dense.shape
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self.take(f"{where}.{str(dtype)[6:]}", dense.to(dtype))
        for kind, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
            codes = (dense * 20).clamp(-120, 120).to(dtype)
            for scale in (torch.float32, torch.bfloat16):
                for shape in ((1,), (rows, 1), *([(rows, columns // 2)] if columns % 2 == 0 else [])):
                    scales = (torch.rand(shape, generator=generator) + 0.1).to(scale)
                    name = f"{where}.{kind}.{str(scale)[6:]}.{'x'.join(map(str, shape))}"
                    self.take(name, codes, scales)
        zeros = torch.randint(-5, 5, (rows, 1), generator=generator).to(torch.int8)
        self.take(f"{where}.zeros", (dense * 20).to(torch.int8), torch.ones(rows, 1) / 3, zeros)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        for kind, tensors in (("written", self.written), ("read", self.read)):
            (folder / kind).mkdir(parents=True)
            whole = {name: t.contiguous() for name, t in tensors.items()}
            save_file(whole, folder / kind / "model.safetensors", metadata={"format": "pt"})


def theirs_write(folder: Path) -> None:
    """Compress random matrices with the library."""
    import torch
    from compressed_tensors import __version__
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig

    generator = torch.Generator().manual_seed(0)
    for form, config in zip(FORMATS, (BitmaskConfig(), Sparse24BitMaskConfig()), strict=True):
        theirs = Theirs(BaseCompressor.load_from_registry(form, config=config))
        for rows, columns in SHAPES:
            width = columns if form == FORMATS[0] else columns // 4 * 4 + 4
            dense = torch.randn(rows, width, generator=generator)
            dense[torch.rand(dense.shape, generator=generator) < 0.6] = 0
            theirs.take_all(f"m{rows}x{columns}", dense, generator)
        if form == FORMATS[0]:
            theirs.take("vector", torch.randn(50, generator=generator))
            theirs.take("stack", torch.randn(3, 5, 9, generator=generator).relu())
        theirs.save(folder / form)
    (folder / "version").write_text(__version__)


def theirs_read(folder: Path) -> None:
    """Read a whole model that we have written with the library, once by itself and once into transformers."""
    from compressed_tensors.compressors import ModelCompressor
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    compressor = ModelCompressor.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    dense = dict(compressor.sparsity_compressor.decompress(str(folder)))
    model = AutoModelForCausalLM.from_config(config)
    compressor.decompress(str(folder), model)
    loaded = {name: t.detach() for name, t in model.state_dict().items()}
    for kind, tensors in (("dense", dense), ("loaded", loaded)):
        save_file({name: t.clone() for name, t in tensors.items()}, folder / f"{kind}.out")


# What runs here.


def ours_read(folder: Path) -> int:
    """Read what the library has written; every matrix must be what it reads itself."""
    from safetensors.torch import load_file

    from llmprune.checkpoint.bitmask import Bitmasked
    from llmprune.checkpoint.reader import Checkpoint

    count = 0
    for form in FORMATS:
        source = Bitmasked(Checkpoint(folder / form / "written"))
        wanted = load_file(folder / form / "read" / "model.safetensors")
        assert set(source.tensors) == set(wanted), set(source.tensors) ^ set(wanted)
        for name, dense in wanted.items():
            same(name, source.load(name), dense)
            count += 1
    return count


def ours_write(folder: Path) -> None:
    """Write a small pruned model in our way."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmprune.checkpoint.bitmask import sparse_bitmask_config, sparse_bitmask_tensors

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 300}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    names = [name for name in tensors if "_proj" in name]
    for name in names:
        tensors[name][torch.rand(tensors[name].shape) < 0.7] = 0
    folder.mkdir()
    save_file(tensors, folder / "wanted")
    for name in names:
        tensors |= sparse_bitmask_tensors(name, tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": sparse_bitmask_config(names, 0.7)}
    (folder / "config.json").write_text(json.dumps(config))


def theirs_agree(folder: Path) -> int:
    """What the library has read of our model must be what was written."""
    from safetensors.torch import load_file

    wanted = load_file(folder / "wanted")
    for kind in ("dense", "loaded"):
        found = load_file(folder / f"{kind}.out")
        for name in wanted if kind == "dense" else [n for n in wanted if "_proj" in n]:
            same(name, found[name], wanted[name])
    return len(wanted)


def same(name: str, found, wanted) -> None:
    import torch

    assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
    assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--python", help="an interpreter that has compressed-tensors 0.14, torch and transformers"
    )
    parser.add_argument("--work", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        {"write": theirs_write, "read": theirs_read}[given.work[0]](Path(given.work[1]))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        python = given.python or environment(folder / "environment")
        child = ["env", "TQDM_DISABLE=1", python, __file__, "--work"]
        subprocess.run([*child, "write", folder], check=True)
        read = ours_read(folder)
        ours_write(folder / "ours")
        subprocess.run([*child, "read", folder / "ours"], check=True)
        tensors = theirs_agree(folder / "ours")
        version = (folder / "version").read_text()
    print(
        f"compressed-tensors {version}: {read} matrices that it wrote are read here as it reads them itself,"
    )
    print(f"{tensors} tensors of a model written here are read there as they were, also into transformers")


if __name__ == "__main__":
    main()
