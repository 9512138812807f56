"""Allocation in the whole run: the total it meets, the measuring pass, trials, mixed N:M."""

import dataclasses

import numpy as np
import oracles
import pytest
import torch
from jobs import array

import llmprune
from llmprune import registry
from llmprune.machine.processes import Team
from llmprune.model.opening import OpenOptions, open_model
from llmprune.recipe import loading as recipes
from llmprune.run.measures import measure
from runs import ready


def build(name, **options):
    return registry.build("allocators", name, options)


def zeros(record):
    return sum(round(m["sparsity"] * m["shape"][0] * m["shape"][1]) for m in record["matrices"])


@pytest.mark.parametrize("name", ["erk", "owl", "dlp", "atp", "fisher"])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_a_run_meets_the_total(name, scope, tiny_llama, calibration_tokens, tmp_path):
    result = llmprune.prune(
        tiny_llama,
        recipe="wanda",
        allocator=name,
        sparsity=0.6,
        calibration=calibration_tokens,
        output=tmp_path / "out",
        settings={"scope": scope} | ({"allocator.slopes": [0.2, 0.6]} if name == "atp" else {}),
    )
    totals, matrices = result.record["totals"], result.record["matrices"]
    assert len({round(m["sparsity"], 3) for m in matrices}) > 1
    if scope == "matrix":
        assert totals["zeros"] == int(0.6 * totals["weights"]) == zeros(result.record)
    else:
        assert abs(totals["sparsity"] - 0.6) < 0.005
    assert llmprune.inspect(tmp_path / "out")


def test_groups_may_keep_another_number_in_every_block(tiny_llama, calibration_tokens, tmp_path):
    options = {"recipe": "wanda", "allocator": "dlp", "pattern": "4:8", "calibration": calibration_tokens}
    dry = llmprune.prune(tiny_llama, dry_run=True, output=tmp_path / "out", **options)
    patterns = {str(m.pattern) for m in dry.plan.matrices.values()}
    assert len(patterns) > 1 and all(p.endswith(":8") for p in patterns)
    record = llmprune.prune(tiny_llama, output=tmp_path / "out", **options).record
    assert {m["pattern"] for m in record["matrices"]} == patterns
    for counted, row in zip(llmprune.inspect(tmp_path / "out")["matrices"], record["matrices"], strict=True):
        assert (row["pattern"] in counted["patterns"]) == (row["pattern"] != "7:8"), counted
    assert record["totals"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert llmprune.inspect(tmp_path / "out")


def test_measuring_needs_no_whole_model_and_equals_the_oracle(tiny_llama, calibration_tokens, tmp_path):
    dry = llmprune.prune(
        tiny_llama,
        recipe="wanda",
        allocator="dlp",
        sparsity=0.6,
        calibration=calibration_tokens,
        dry_run=True,
        output=tmp_path / "out",
        dtype="float32",
    )
    model, given, hooks = llmprune.load(tiny_llama).float(), [], []
    for block in model.model.layers:
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        given.append(pairs)
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):

                def see(m, args, pairs=pairs):
                    pairs.append(
                        (
                            array(m.weight.detach()),
                            array(args[0]).reshape(-1, m.in_features).__pow__(2).mean(axis=0),
                        )
                    )

                hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        model(calibration_tokens)
    wanted = oracles.dlp(given, 0.6)
    for number, share in enumerate(wanted):
        here = [m for n, m in dry.plan.matrices.items() if f".layers.{number}." in n]
        mean = sum(m.sparsity * m.shape[0] * m.shape[1] for m in here) / sum(
            m.shape[0] * m.shape[1] for m in here
        )
        assert mean == pytest.approx(share, abs=0.02) and {m.reason for m in here} == {"dlp"}


def test_a_limit_of_owl_is_chosen_by_trial(tiny_llama, calibration_tokens, tmp_path):
    options = {
        "recipe": "wanda",
        "allocator": "owl",
        "sparsity": 0.6,
        "calibration": calibration_tokens,
        "output": tmp_path / "out",
    }
    options["settings"] = {"allocator.limit": [0.0, 0.1, 0.3], "allocator.trial": "magnitude"}
    record = llmprune.prune(tiny_llama, **options).record
    losses, measures = record["allocation"]["held-out loss"], record["allocation"]["measure"]
    assert list(losses) == ["limit 0", "limit 0.1", "limit 0.3"] and list(measures) == ["block 1", "block 2"]
    limit = float(min(losses, key=losses.get).split()[1])
    shares = build("owl", limit=limit).allocate(
        {m["name"]: tuple(m["shape"]) for m in record["matrices"]},
        {m["name"]: int(m["name"].split(".")[2]) for m in record["matrices"]},
        dict(enumerate(measures.values())),
        0.6,
    )
    for m in record["matrices"]:
        assert m["target_sparsity"] == pytest.approx(shares[m["name"]], abs=0.02)
    assert (
        record["totals"]["sparsity"] == pytest.approx(0.6, abs=0.005)
        and record["totals"]["seconds"]["allocate"] > 0
    )
    with pytest.raises(ValueError, match=r"limit must be in \[0, 0.5\)"):
        build("owl", limit=0.6)


def test_a_trial_s_loss_is_that_of_the_model_pruned_so(tiny_llama, calibration_tokens, tmp_path):
    held, training = calibration_tokens[7::8], [i for i in range(len(calibration_tokens)) if i % 8 != 7]
    options = {"recipe": "wanda", "allocator": "atp", "sparsity": 0.6, "dtype": "float32"}
    options["settings"] = {"allocator.slopes": [0.0, 0.5]}
    record = llmprune.prune(
        tiny_llama, calibration=calibration_tokens, output=tmp_path / "all", **options
    ).record
    losses = record["allocation"]["held-out loss"]
    for slope in (0.0, 0.5):
        options["settings"] = {"allocator.slopes": slope}
        alone = llmprune.prune(
            tiny_llama, calibration=calibration_tokens[training], output=tmp_path / f"{slope}", **options
        )
        assert "allocation" not in alone.record
        with torch.no_grad():
            loss = llmprune.load(tmp_path / f"{slope}").float()(held, labels=held).loss
        assert losses[f"slope {slope:g}"] == pytest.approx(loss.item(), rel=1e-5)
    best = min(losses, key=losses.get)
    chosen = [m["target_sparsity"] for m in record["matrices"]]
    assert (len(set(chosen)) > 1) == (best == "slope 0.5")


def test_trials_may_use_a_cheaper_pruner_and_need_rows_to_hold_out(tiny_llama, calibration_tokens, tmp_path):
    options = {"recipe": "sparsegpt", "allocator": "atp", "sparsity": 0.6, "dtype": "float32"}
    runs = [
        llmprune.prune(
            tiny_llama,
            calibration=calibration_tokens,
            output=tmp_path / (trial or "own"),
            settings={"allocator.slopes": [0.1, 0.5], "allocator.trial": trial},
            **options,
        ).record["allocation"]["held-out loss"]
        for trial in ("", "magnitude")
    ]
    assert runs[0].keys() == runs[1].keys() and runs[0] != runs[1]
    with pytest.raises(ValueError, match="holds out 1 of 1 calibration samples"):
        llmprune.prune(tiny_llama, calibration=calibration_tokens[:1], output=tmp_path / "few", **options)


def test_a_trial_pruner_that_does_not_exist_is_told_at_once():
    from llmprune.recipe import loading as recipes

    with pytest.raises(ValueError, match="unknown pruner 'sparsgpt'"):
        recipes.load(
            "wanda", {"allocator.name": "owl", "allocator.limit": [0, 0.04], "allocator.trial": "sparsgpt"}
        )
    with pytest.raises(ValueError, match="compares several limits, and there is one"):
        recipes.load("wanda", {"allocator.name": "owl", "allocator.trial": "sparsegpt"})


def test_a_finished_run_and_a_changed_one_try_nothing_again(
    tiny_llama, calibration_tokens, tmp_path, monkeypatch
):
    from llmprune.run import preparation

    options = {
        "recipe": "wanda",
        "allocator": "atp",
        "sparsity": 0.6,
        "calibration": calibration_tokens,
        "output": tmp_path / "out",
    }
    options |= {"settings": {"allocator.slopes": [0.2, 0.6]}}
    whole = llmprune.prune(tiny_llama, **options).record
    monkeypatch.setattr(preparation, "search", None)
    assert llmprune.prune(tiny_llama, resume=True, **options).record["allocation"] == whole["allocation"]


def test_a_trial_without_a_finite_loss_is_never_taken(tiny_llama, calibration_tokens, tmp_path, monkeypatch):
    from llmprune.run import trials as searching

    losses = iter([float("nan"), 5.0, float("nan"), float("nan")])
    monkeypatch.setattr(searching, "_loss", lambda *args: next(losses))
    options = {"recipe": "wanda", "allocator": "atp", "sparsity": 0.6, "calibration": calibration_tokens}
    options |= {"settings": {"allocator.slopes": [0.9, 0.0]}}
    record = llmprune.prune(tiny_llama, output=tmp_path / "out", **options).record
    assert len({m["target_sparsity"] for m in record["matrices"]}) == 1
    with pytest.raises(ValueError, match="no trial of allocator 'atp' ends with a finite loss"):
        llmprune.prune(tiny_llama, output=tmp_path / "none", **options)


def test_a_resumed_run_goes_on_with_what_it_measured(tiny_llama, calibration_tokens, tmp_path, monkeypatch):
    from llmprune.run import preparation
    from llmprune.run import production as pipeline
    from llmprune.run.corridor import prune_blocks

    options = {
        "recipe": "wanda",
        "allocator": "atp",
        "sparsity": 0.6,
        "calibration": calibration_tokens,
        "output": tmp_path / "out",
    }
    options |= {"settings": {"allocator.slopes": [0.2, 0.6]}}

    def stops(run, source, finished, clock, block_done):
        def one_block(block):
            block_done(block)
            raise KeyboardInterrupt

        prune_blocks(run, source, finished, clock, one_block)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.corridor, "prune_blocks", stops)
        llmprune.prune(tiny_llama, **options)
    monkeypatch.setattr(preparation, "search", None)  # must not be asked again
    resumed = llmprune.prune(tiny_llama, resume=True, **options).record
    monkeypatch.undo()
    whole = llmprune.prune(tiny_llama, **options | {"output": tmp_path / "whole"}).record
    assert resumed["allocation"] == whole["allocation"] and resumed["matrices"] != []
    assert [m["target_sparsity"] for m in resumed["matrices"]] == [
        m["target_sparsity"] for m in whole["matrices"]
    ]


def test_fisher_measures_the_dense_model_and_says_so(tiny_llama, calibration_tokens, tmp_path):
    options = {"recipe": "wanda", "allocator": "fisher", "sparsity": 0.6, "calibration": calibration_tokens}
    options["settings"] = {"allocator.samples": 3, "allocator.tokens": 16, "allocator.strength": 1}
    options["dtype"] = "float32"
    record = llmprune.prune(tiny_llama, output=tmp_path / "out", **options).record
    model, given = llmprune.load(tiny_llama).float(), {}
    model.requires_grad_()
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in calibration_tokens[:3, :16]:
        model.zero_grad()
        logits = model(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad**2
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            given[name.removesuffix(".weight")] = array(parameter.detach()), array(squares[name])
    wanted = oracles.fisher(given, 0.6)
    got = {m["name"].removesuffix(".weight"): m["sparsity"] for m in record["matrices"]}
    assert got == pytest.approx(wanted, abs=0.02)
    assert list(record["allocation"]) == ["measure"]
    assert [len(block) for block in record["allocation"]["measure"].values()] == [7, 7]
    assert record["totals"]["zeros"] == int(0.6 * record["totals"]["weights"])
    again = llmprune.prune(tiny_llama, output=tmp_path / "out", resume=True, **options).record
    assert again["allocation"] == record["allocation"]


def test_where_gradients_have_no_way_back_every_matrix_gets_the_same(
    tiny_llama, calibration_tokens, tmp_path, monkeypatch
):
    from llmprune.model.activations import BlockInputs

    monkeypatch.setattr(BlockInputs, "stateless", property(lambda self: False))
    options = {"recipe": "wanda", "allocator": "fisher", "sparsity": 0.6, "calibration": calibration_tokens}
    with pytest.warns(UserWarning, match="no gradients for allocator fisher: every matrix gets the same"):
        record = llmprune.prune(tiny_llama, output=tmp_path / "out", **options).record
    assert {m["target_sparsity"] for m in record["matrices"]} == {0.6} and "allocation" not in record


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_without_a_row_is_refused_like_the_others(
    tiny_llama, calibration_tokens, monkeypatch, rank
):
    from llmprune.model.activations import BlockInputs

    monkeypatch.setattr(BlockInputs, "stateless", property(lambda self: False))
    model = open_model(tiny_llama, OpenOptions(device="cpu", dtype="float32"))
    recipe = recipes.load("wanda", {"allocator": {"name": "fisher", "samples": 1}})
    run = dataclasses.replace(ready(model, recipe, calibration_tokens), team=Team(rank, 2))
    assert measure(run) == {}  # without a word to the other, which would wait for ever
