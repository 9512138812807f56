"""The sparse formats of compressed-tensors against that library itself: each reads what the other writes,
matrices and whole folders, and what `llmprune convert` makes of folders that the library has written.

Run: .venv/bin/python eval/bench/bitmask_crosscheck.py [--python PYTHON]

Without --python, compressed-tensors 0.14 (the last one with these formats) is installed into an environment
of its own in a temporary folder, which sees the torch and transformers of this one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

VERSION = "0.14.*"
SHAPES = ((64, 96), (33, 70), (1, 7), (200, 1024))
FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
BESIDE = ("_scale", "_zero_point")  # of quantised layers, and nothing of a dense model
# Whole folders: format, and the type of quantised values or none.
FOLDERS = (
    ("sparse-bitmask", None),
    ("sparse-24-bitmask", None),
    ("sparse-24-bitmask", "float"),
    ("sparse-24-bitmask", "int"),
)


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
    for form, kind in FOLDERS:
        theirs_folder(folder / f"{form}-{kind}", form, kind)
    (folder / "version").write_text(__version__)


def small_model(dtype):
    """A small random model whose linear layers are 70 % zeros, and the names of those."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 300}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(dtype)
    names = [name for name, _ in model.named_parameters() if "_proj" in name]
    for name in names:
        weight = model.get_parameter(name).data
        weight[torch.rand(weight.shape) < 0.7] = 0
    return model, names


def theirs_folder(folder: Path, form: str, kind: str | None) -> None:
    """Have the library compress a whole model and write its folder; and what it reads of it, in `wanted`."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from safetensors.torch import save_file

    model, names = small_model(torch.bfloat16)
    for name in names if form == FORMATS[1] else ():
        weight = model.get_parameter(name).data
        groups = torch.randn(weight.shape).to(weight.dtype).view(-1, 4)
        weight.copy_(groups.scatter(1, torch.rand(groups.shape).argsort(1)[:, :2], 0).view(weight.shape))
    quantised = None
    if kind is not None:
        values = QuantizationArgs(num_bits=8, type=kind, strategy="channel", symmetric=True)
        scheme = QuantizationScheme(targets=["Linear"], weights=values)
        quantised = QuantizationConfig(
            config_groups={"all": scheme}, format=f"{kind}-quantized", ignore=["lm_head"]
        )
        apply_quantization_config(model, quantised)
        for name in names:
            layer = model.get_submodule(name.removesuffix(".weight"))
            most = {"float": 448.0, "int": 127.0}[kind]
            layer.weight_scale.data.copy_(layer.weight.data.abs().amax(dim=1, keepdim=True) / most)
    chosen = BitmaskConfig if form == FORMATS[0] else Sparse24BitMaskConfig
    sparse = chosen(targets=[name.removesuffix(".weight") for name in names], ignore=["lm_head"])
    compressor = ModelCompressor(sparsity_config=sparse, quantization_config=quantised)
    compressor.compress_model(model)
    stored = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    model.config.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(folder)
    compressor.decompress_model(model)
    dense = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    save_file({n: t for n, t in dense.items() if not n.endswith(BESIDE)}, folder / "wanted")


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
    """Write a small pruned model with `llmprune convert`, what its tensors are in `wanted`."""
    import torch
    from safetensors.torch import save_file

    model, _ = small_model(torch.bfloat16)
    model.save_pretrained(folder.with_name("dense"))
    converted(folder.with_name("dense"), "sparse-bitmask", folder)
    save_file({name: t.detach().clone() for name, t in model.state_dict().items()}, folder / "wanted")


def converted(folder: Path, to: str, output: Path) -> Path:
    """What `llmprune convert` makes of a folder."""
    command = [sys.executable, "-m", "llmprune", "convert", folder, "--to", to, "--output", output]
    subprocess.run([*command, "--quiet"], check=True)
    return output


def ours_rescue(folder: Path) -> int:
    """Make folders of the library dense, and packed: every tensor must be what the library reads itself."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import llmprune

    count = 0
    for form, kind in FOLDERS:
        old = folder / f"{form}-{kind}"
        wanted = load_file(old / "wanted")
        (old / "wanted").unlink()
        dense = converted(old, "dense", folder / f"dense-{form}-{kind}")
        packed = converted(old, "packed", folder / f"packed-{form}-{kind}")
        plain = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").state_dict()
        unpacked = llmprune.load(packed, dequantize=True).state_dict()
        for name, tensor in wanted.items():
            for found in (plain, unpacked):
                same(name, found[name], tensor)
            count += 1
    return count


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
        read, rescued = ours_read(folder), ours_rescue(folder)
        ours_write(folder / "ours")
        subprocess.run([*child, "read", folder / "ours"], check=True)
        tensors = theirs_agree(folder / "ours")
        version = (folder / "version").read_text()
    print(
        f"compressed-tensors {version}: {read} matrices that it wrote are read here as it reads them itself,"
    )
    print(f"{rescued} tensors of {len(FOLDERS)} folders of it are made dense, and packed, as it reads them,")
    print(f"{tensors} tensors of a folder converted here are read there as they were, also into transformers")


if __name__ == "__main__":
    main()
