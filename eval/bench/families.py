"""Prunes a tiny random model of every family that transformers knows, and checks what came out:
`families.py [--only NAME...] [--json FILE] [--markdown docs/families.md]`.

Each family is built, saved, pruned to 50 % (Wanda) and to 2:4 (SparseGPT), and loaded again by plain
transformers, in a process of its own. With `--only`, the results of the others stay in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
import transformers
from family_report import markdown, summary
from safetensors import safe_open
from tiny_models import TOKENS, pairs, tiny_config

import llmprune
from llmprune.model.activations import BlockInputs
from llmprune.model.opening import OpenOptions, open_model
from llmprune.model.targets import all_targets
from llmprune.record import report

SECONDS = 120  # a family gets no more
CLOSE = 1e-4  # logits of block by block against the whole model
RUNS = {
    "wanda 50%": {"recipe": "wanda", "sparsity": 0.5},
    "sparsegpt 2:4": {"recipe": "sparsegpt", "pattern": "2:4"},
}


class Wrong(Exception):
    """A check found something."""


def tokens(rows, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(TOKENS.start, TOKENS.stop, (rows, length), generator=generator)


def survey(model_type, class_name, folder, found):
    """Put what was found out about a family into `found`; raises at the first thing that is wrong."""
    config = tiny_config(model_type, class_name)
    if config.model_type != model_type and (config.model_type, class_name) in pairs():
        found["result"] = f"same as {config.model_type}"
        return
    torch.manual_seed(0)
    model_class, dense = getattr(transformers, class_name), folder / "dense"
    made = model_class(config).eval()
    fill(made)
    made.save_pretrained(dense)
    found["step"] = "dense model"
    model, known = loaded(model_class, dense)
    if known["missing_keys"] or known["mismatched_keys"]:
        raise Wrong(f"saved and loaded by transformers alone, it lacks {known['missing_keys'][:1]}")
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens(2, 16), use_cache=False).logits
    except Exception:  # tokens alone are not enough for it: what is its user told?
        found["told"] = told(dense, folder / "told")
        raise
    if not torch.isfinite(logits).all():
        raise Wrong("logits of the dense model are not finite")
    del model
    found["built"] = True
    streamed(dense, logits, found)
    for name, options in RUNS.items():
        found["step"], output = name, folder / name.replace(" ", "-")
        result = llmprune.prune(dense, **options, **options_of(output))
        found["step"] = f"checks of {name}"
        check_load(model_class, output, known)
        check_sparsity(output, result.record)
        check_tensors(dense, output, result.record)
    found["result"] = "works"


@torch.no_grad()
def fill(model):
    """Random numbers in place of matrices of one value, and of vectors of zeros: they would hide mistakes."""
    for parameter in model.parameters():
        first = parameter.flatten()[0]
        if bool((parameter == first).all()) and (parameter.ndim > 1 or first == 0):
            parameter.normal_(0.0, 0.02)


def told(dense, output):
    """What `prune` says of a model that transformers itself cannot run."""
    try:
        llmprune.prune(dense, **RUNS["wanda 50%"], **options_of(output))
    except Exception as error:
        return described(error, {"built": True})
    return "works"


def options_of(output):
    return {"calibration": tokens(8, 32), "dtype": "float32", "device": "cpu", "output": output}


def loaded(model_class, folder):
    """A model, and the names that transformers missed or did not expect."""
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), {key: sorted(map(str, info.get(key) or ())) for key in keys}


def streamed(folder, expected, found):
    """What of the model is pruned, and how far logits block by block are from those of the whole model."""
    found["step"] = "opening"
    model = open_model(str(folder), OpenOptions(device="cpu", dtype="float32"))
    skeleton = model.skeleton
    found["step"] = "targets"
    targets = all_targets(skeleton)
    names = {target.tensor for target in targets}
    stored = model.source.tensors
    in_blocks = {name for block in skeleton.block_tensors() for name in block}
    found["matrices"] = len(targets)
    found["share"] = sum(t.shape[0] * t.shape[1] for t in targets) / sum(t.elements for t in stored.values())
    wide = {name for name, t in stored.items() if len(t.shape) > 1 and min(t.shape[-2:]) > 1}
    found["dense_in_blocks"] = sorted(wide & in_blocks - names)
    found["dense_outside"] = sorted(wide - in_blocks)
    found["step"] = "streaming"
    with torch.no_grad():
        inputs = BlockInputs(skeleton, tokens(2, 16), skeleton.device)
        for number, block in enumerate(skeleton.blocks):
            parameters = skeleton.parameters_of(block)
            skeleton.load(parameters)
            inputs.forward(number)
            skeleton.free(parameters)
        logits = torch.cat([part for _, part in inputs.logits()])
    if logits.shape != expected.shape:
        raise Wrong(f"logits {tuple(logits.shape)} block by block, {tuple(expected.shape)} as a whole")
    found["difference"] = (logits - expected).abs().max().item()
    if not found["difference"] <= CLOSE:
        raise Wrong(f"logits block by block differ by {found['difference']:.2g}")


def check_load(model_class, output, known):
    _, names = loaded(model_class, output)
    for key, found in names.items():
        if more := sorted(set(found) - set(known[key])):
            raise Wrong(f"{len(more)} {key} in the output, the first is {more[0]}")


def check_sparsity(output, record):
    counted = llmprune.inspect(output)
    if counted["record_agrees"] is not True:
        raise Wrong("the recount disagrees with the record")
    by_name = {m["name"]: m for m in counted["matrices"]}
    for matrix in record["matrices"]:
        size = matrix["shape"][0] * matrix["shape"][1]
        if abs(by_name[matrix["name"]]["zeros"] - size / 2) > matrix["shape"][0] / 2:
            raise Wrong(f"{matrix['name']} has sparsity {by_name[matrix['name']]['sparsity']:.3f}")
    if left := sorted(set(by_name) - {m["name"] for m in record["matrices"]}):
        raise Wrong(f"{len(left)} matrices are not in the record, the first is {left[0]}")


def check_tensors(dense, output, record):
    """The same tensors, and the same bytes where nothing was pruned."""
    before, after = contents(dense), contents(output)
    if set(before) != set(after):
        differing = sorted(set(before) ^ set(after))
        raise Wrong(f"{len(differing)} tensors in only one of input and output, the first is {differing[0]}")
    pruned = {m["name"] for m in record["matrices"]}
    touched = pruned | {name.rpartition(".")[0] for name in pruned}
    for name, tensor in before.items():
        other = after[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise Wrong(f"{name} became {tuple(other.shape)} {other.dtype}")
        if name not in touched and not torch.equal(tensor.view(-1), other.view(-1)):
            raise Wrong(f"{name} is no pruned matrix and has changed")


def contents(folder):
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    return found


def described(error, found):
    """How a family ended that did not get through."""
    said = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = "/llmprune/" in frames[-1].filename and not found.get("step", "").startswith("checks")
    refused = isinstance(error, ValueError) and own and "\n" not in said
    line = " ".join(said.split())[:300]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    if isinstance(error, Wrong):
        return f"fails: {line}" if found.get("built") else f"not built: {line}"
    if not found.get("built"):
        return f"not built: {type(error).__name__}: {line} ({where})"
    return f"refused: {line}" if refused else f"fails: {type(error).__name__}: {line} ({where})"


def alone(model_type, class_name):
    """Survey one family in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        result, started = Path(folder) / "found.json", time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(model_type, class_name, Path(folder), result)
        status = os.waitpid(child, 0)[1]
        found = json.loads(result.read_text()) if result.exists() else {}
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            late = (
                f"takes longer than {SECONDS} s" if number == signal.SIGALRM else f"killed by signal {number}"
            )
            found["result"] = f"fails: {late}"
        return {"model_type": model_type, "class": class_name, **found, "seconds": _since(started)}


def warm_up():
    """Import here whatever every family needs, so that the processes forked from this one need not."""
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        survey("llama", "LlamaForCausalLM", Path(folder), {})


def _since(started):
    return round(time.perf_counter() - started, 1)


def _child(model_type, class_name, folder, result):
    signal.alarm(SECONDS)  # its default action ends the process
    os.environ["LLMPRUNE_CACHE"] = str(folder / "cache")
    found = {}
    try:
        survey(model_type, class_name, folder, found)
    except BaseException as error:
        found["result"] = described(error, found)
        found["trace"] = "".join(traceback.format_exception(error))[-4000:]
    result.write_text(json.dumps(found))
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types or classes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    report._plot = lambda matrices: ""  # it takes longer than all the rest of a run this small
    warm_up()
    results = {}
    if arguments.json and arguments.json.exists() and arguments.only:
        results = {(r["model_type"], r["class"]): r for r in json.loads(arguments.json.read_text())}
    for pair in pairs():
        if arguments.only and not set(arguments.only) & set(pair):
            continue
        results[pair] = found = alone(*pair)
        print(f"{found['seconds']:6.1f} s  {' '.join(pair)}: {found['result']}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(list(results.values()), indent=1))
    ordered = [results[pair] for pair in pairs() if pair in results]
    print(summary(ordered))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(ordered))


if __name__ == "__main__":
    main()
