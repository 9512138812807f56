"""Recovery as a whole: exact results, resumed after being cut off, in blocks, in soups, with bad input."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from other_models import make
from safetensors.torch import load_file

import llmprune
from llmprune.api import recovery_start
from llmprune.checkpoint.masks import read_masks
from llmprune.recipe import recovery as recipes
from llmprune.run import production, training
from llmprune.run import recovery as recovering


@pytest.fixture(scope="module")
def starts(tiny_llama, calibration_tokens, tmp_path_factory):
    """Pruned starts by name."""
    folder = tmp_path_factory.mktemp("starts")
    for name, options in (("half", {"sparsity": 0.5}), ("pairs", {"pattern": "2:4"})):
        llmprune.prune(
            tiny_llama, recipe="wanda", calibration=calibration_tokens, output=folder / name, **options
        )
    return folder


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 100, (24, 32), generator=generator)


def recover(start, text, output, recipe="masked-finetuning", steps=10, settings=None, **options):
    given = {"rate.rate": 1e-3, "rates": [], "batch": 4, "held_out": 0.2} | (settings or {})
    done = llmprune.recover(
        start,
        text=text,
        tokens=steps * 4 * 32,
        output=output,
        recipe=recipe,
        settings=given,
        score=False,
        **{"dtype": "float32", "epochs": 3, **options},
    )
    return done.plan if options.get("dry_run") else done.record


def weights(folder):
    found = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        found |= load_file(file)
    return found


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("start", ["half", "pairs"])
def test_a_fixed_mask_stays_and_the_kept_weights_move(starts, text, tmp_path, start, tiny_llama):
    record = recover(starts / start, text, tmp_path / "out")
    before, after = (
        read_masks(folder / "masks.safetensors") for folder in (starts / start, tmp_path / "out")
    )
    old, new = weights(starts / start), weights(tmp_path / "out")
    for name, keep in after.items():
        assert torch.equal(keep, before[name])
        assert not bool((new[name].view(torch.int32)[~keep] != 0).any())  # +0.0, not -0.0
        assert not torch.equal(new[name], old[name])
    norms = [name for name in new if name.endswith("norm.weight")]
    assert norms and any(not torch.equal(new[name], old[name]) for name in norms)
    assert torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    recovery = record["recovery"]
    assert recovery["held_out"]["best"] < recovery["held_out"]["start"] and recovery["steps"] == 10
    assert [row["step"] for row in recovery["curve"]] == list(range(1, 11))
    counted = llmprune.inspect(tmp_path / "out")
    assert counted["record_agrees"] and counted["sparsity"] == pytest.approx(record["totals"]["sparsity"])


def test_the_start_is_saved_where_no_step_is_better(starts, text, tmp_path, monkeypatch):
    losses = iter(range(5, 100))  # whatever a processor makes of a rate that is too high
    monkeypatch.setattr(training.Loop, "error", lambda loop, terms: float(next(losses)))
    record = recover(starts / "half", text, tmp_path / "out")
    assert record["recovery"]["best_step"] == 0
    assert weights(tmp_path / "out").keys() == weights(starts / "half").keys()
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, weights(starts / "half")[name]), name


CUT = {
    "masked-finetuning": ("half", {}),
    "masklora": ("half", {}),
    "rigl": ("half", {"schedule.moves": 4}),
    "grow-momentum": ("pairs", {"schedule.moves": 4}),
    "soup": ("half", {"soup.copies": 2}),
    "ast": ("half", {}),
    "jackpots": ("pairs", {}),
    "maskllm": ("pairs", {}),
    "recover-best": ("half", {"rates": [1e-3, 1e-4]}),
}


@pytest.mark.parametrize("recipe", CUT)
def test_a_recovery_that_was_cut_off_goes_on_to_the_same_bytes(
    starts, tiny_llama, text, tmp_path, monkeypatch, recipe
):
    start, settings = CUT[recipe]
    options = {"recipe": recipe, "settings": settings, "teacher": tiny_llama}
    whole = recover(starts / start, text, tmp_path / "whole", **options)
    real = training.Training._advance
    monkeypatch.setattr(training, "_SAVE_EVERY", -1.0)
    monkeypatch.setattr(training.Training, "_advance", cut_after(7))
    with pytest.raises(KeyboardInterrupt):
        recover(starts / start, text, tmp_path / "cut", **options)
    monkeypatch.setattr(training.Training, "_advance", real)
    with pytest.raises(ValueError, match=r"a training that has begun; continue it with --resume"):
        recover(starts / start, text, tmp_path / "cut", **options)
    with pytest.raises(ValueError, match=r"is another one: recovery.recipe.seed was 0 and is 3"):
        recover(starts / start, text, tmp_path / "cut", resume=True, seed=3, **options)
    resumed = recover(starts / start, text, tmp_path / "cut", resume=True, **options)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert whole["recovery"]["curve"] == resumed["recovery"]["curve"]
    assert not list(tmp_path.glob(".*"))


def test_a_recovery_cut_off_while_it_writes_trains_no_second_time(starts, text, tmp_path, monkeypatch):
    from runs import cut_off

    recover(starts / "half", text, tmp_path / "whole")
    with cut_off(2):
        recover(starts / "half", text, tmp_path / "cut")
    monkeypatch.setattr(training.Training, "run", None)
    record = recover(starts / "half", text, tmp_path / "cut", resume=True)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    seconds = record["totals"]["seconds"]
    assert seconds["train"] == pytest.approx(record["recovery"]["seconds"], abs=0.01) and seconds["train"] > 0
    assert seconds["total"] >= seconds["train"]


@pytest.mark.parametrize("recipe", ["masked-finetuning", "ebft"])
def test_a_recovery_cut_off_after_its_last_weight_goes_on(
    starts, tiny_llama, text, tmp_path, monkeypatch, recipe
):
    def stop(*arguments):
        raise KeyboardInterrupt

    changes = {"others": "none"} if recipe == "ebft" else {}
    options = {"recipe": recipe, "settings": changes, "teacher": tiny_llama}
    recover(starts / "half", text, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(recovering.speed, "measured", stop)
        with pytest.raises(KeyboardInterrupt):
            recover(starts / "half", text, tmp_path / "cut", **options)
    assert not (tmp_path / ".cut.partial/best-step.safetensors").exists()
    monkeypatch.setattr(training.Training, "run", None)
    recover(starts / "half", text, tmp_path / "cut", resume=True, **options)
    assert files(tmp_path / "whole") == files(tmp_path / "cut") and not list(tmp_path.glob(".*"))


def test_block_by_block_resumes_to_the_same_bytes(starts, tiny_llama, text, tmp_path):
    from runs import cut_off

    options = {"recipe": "ebft", "settings": {"rate.rate": 0.01}, "teacher": tiny_llama}
    record = recover(starts / "half", text, tmp_path / "whole", **options)
    held = [row["training"]["held_out"] for row in record["matrices"]]
    assert all(entry["best"] < entry["start"] for entry in held)
    with cut_off(2):
        recover(starts / "half", text, tmp_path / "cut", **options)
    recover(starts / "half", text, tmp_path / "cut", resume=True, **options)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_a_finished_recovery_is_left_alone_and_another_is_refused(starts, text, tmp_path):
    recover(starts / "half", text, tmp_path / "out")
    before = files(tmp_path / "out")
    recover(starts / "half", text, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == before
    with pytest.raises(ValueError, match="holds another finished run"):
        recover(starts / "half", text, tmp_path / "out", resume=True, settings={"rate.rate": 1e-4})


def test_packed_in_and_out(starts, text, tmp_path):
    llmprune.convert(starts / "half", to="packed", output=tmp_path / "packed")
    recover(starts / "half", text, tmp_path / "dense")
    recover(tmp_path / "packed", text, tmp_path / "from-packed")
    assert files(tmp_path / "dense") == files(tmp_path / "from-packed")
    recover(starts / "half", text, tmp_path / "as-packed", format="packed")
    dense, packed = llmprune.load(tmp_path / "dense"), llmprune.load(tmp_path / "as-packed", dequantize=True)
    for (name, one), (_, other) in zip(dense.named_parameters(), packed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("recipe", ["gmp", "sdgf", "losa", "powerprop", "dpf", "acdc", "sr-ste"])
@pytest.mark.parametrize("aim", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_a_dense_model_is_pruned_as_it_trains(tiny_llama, text, tmp_path, recipe, aim):
    record = recover(tiny_llama, text, tmp_path / "out", recipe=recipe, **aim)
    wanted = aim.get("sparsity", 0.5)
    for name, keep in read_masks(tmp_path / "out" / "masks.safetensors").items():
        pruned = (~keep).sum(1)
        assert bool((pruned == int(wanted * keep.shape[1])).all()), name
        if "pattern" in aim:
            assert bool((keep.view(len(keep), -1, 4).sum(2) == 2).all()), name
        assert not bool((weights(tmp_path / "out")[name][~keep] != 0).any())
    assert record["recovery"]["best_step"] > 0


def test_a_soup_prunes_a_dense_model_in_phases(tiny_llama, text, tmp_path):
    settings = {"soup.copies": 2, "soup.phases": 2, "rates": [1e-3, 1e-4]}
    record = recover(tiny_llama, text, tmp_path / "out", "soup", 12, settings, sparsity=0.75)
    for keep in read_masks(tmp_path / "out" / "masks.safetensors").values():
        assert bool(((~keep).sum(1) == int(0.75 * keep.shape[1])).all())
    curve = record["recovery"]["curve"]
    assert {round(row["sparsity"], 1) for row in curve[:6]} == {0.5}
    assert {round(row["sparsity"], 2) for row in curve[6:]} == {0.75} and record["recovery"]["best_step"] > 6


def test_a_dense_control_trains_without_masks(tiny_llama, text, tmp_path):
    record = recover(tiny_llama, text, tmp_path / "out", sparsity=0)
    assert record["totals"]["sparsity"] < 0.01 and record["recovery"]["best_step"] > 0


def test_mixed_formats_and_wrong_starts_are_refused(starts, tiny_llama, text, tmp_path):
    def refused(said, start=starts / "half", **options):
        with pytest.raises(ValueError, match=said) as error:
            recover(start, options.pop("given", text), tmp_path / "no", **options)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())

    refused("has no masks, so it is dense; give --sparsity", tiny_llama)
    refused("moves no mask, got sparsity 0.5, pattern unstructured; first prune", tiny_llama, sparsity=0.5)
    refused("moves no mask, got sparsity 0.9", sparsity=0.9)
    refused("and sparsity 0.3 is less", recipe="gmp", sparsity=0.3)
    refused("exchanges weights of a pruned model", tiny_llama, recipe="rigl", sparsity=0.5)
    refused("unknown recipe of recovery 'mask-finetuning': did you mean", recipe="mask-finetuning")
    refused("name it with --teacher", recipe="squarehead")
    refused("one is held out; give more", given=text[:1])
    refused("no such folder", start=tmp_path / "nothing")
    refused("dense itself; first prune it", tiny_llama, recipe="ebft", sparsity=0)
    refused("prunes, and sparsity 0 prunes nothing", tiny_llama, recipe="gmp", sparsity=0)
    refused("text is sequences of 32 tokens, got seqlen 16; leave it out", seqlen=16)
    refused(
        r"19 sequences of 32 tokens, in epochs 2, are 1,216 tokens, got tokens 1,280; .* epochs 3", epochs=2
    )
    soup = {"soup.copies": 3, "soup.phases": 2}
    refused("are 5 steps of 128; give at least tokens 768", recipe="soup", settings=soup, steps=5)


def test_a_teacher_that_the_record_names_must_be_the_very_model(
    starts, tiny_llama, text, tmp_path, monkeypatch
):
    options = {"recipe": "squarehead", "steps": 2}
    monkeypatch.setattr(recovery_start, "_recorded", lambda model: (str(tiny_llama), None))
    recover(starts / "half", text, tmp_path / "right", **options)
    monkeypatch.setattr(recovery_start, "_recorded", lambda model: (str(starts / "pairs"), None))
    with pytest.raises(
        ValueError, match="has other weights than the one that was pruned; name the right one"
    ):
        recover(starts / "half", text, tmp_path / "wrong", **options)
    with pytest.warns(UserWarning, match="the teacher pairs is pruned itself"):
        recover(starts / "half", text, tmp_path / "named", teacher=starts / "pairs", **options)
    assert not (tmp_path / "wrong").exists()


def recorded(starts, folder, source):
    """A start whose record names this dense model in revision v1."""
    shutil.copytree(starts / "half", folder)
    record = json.loads((folder / "llmprune.json").read_text())
    record["model"] |= {"source": source, "revision": "v1"}
    (folder / "llmprune.json").write_text(json.dumps(record))
    return SimpleNamespace(folder=folder)


def test_the_revision_in_the_record_is_the_one_that_is_opened(starts, tmp_path):
    start = recorded(starts, tmp_path / "start", "org/model")
    assert recovery_start._recorded(start) == ("org/model", "v1")


def test_a_dense_start_is_the_model_of_its_record(tiny_llama, text, tmp_path):
    found = recover(tiny_llama, text, tmp_path / "out", recipe="gmp", sparsity=0.5)
    pruned = llmprune.prune(tiny_llama, recipe="magnitude", sparsity=0.5, output=tmp_path / "pruned").record
    assert found["model"]["digest"] == pruned["model"]["digest"]


def test_rows_have_the_sparsity_that_was_asked_for_last(starts, text, tmp_path):
    found = recover(starts / "half", text, tmp_path / "out", recipe="gmp", sparsity=0.7)
    assert {row["target_sparsity"] for row in found["matrices"]} == {0.7}


def test_what_grows_from_a_dense_start_may_begin_at_its_weights(tiny_llama, text, tmp_path):
    changes = {"trainable.grown": "dense"}
    recover(tiny_llama, text, tmp_path / "out", recipe="acdc", settings=changes, sparsity=0.5)


def test_phases_end_with_the_pattern_whatever_the_start_has(starts, text, tmp_path):
    changes = {"soup.phases": 2, "soup.copies": 1}
    found = recover(
        starts / "half", text, tmp_path / "out", steps=4, settings=changes, pattern="2:4", epochs=1
    )
    assert {row["pattern"] for row in found["matrices"]} == {"2:4"}
    with pytest.raises(ValueError, match=r"schedule cubic moves them; set soup.copies and soup.phases to 1"):
        recover(starts / "half", text, tmp_path / "no", recipe="gmp", settings=changes, sparsity=0.7)


def test_another_teacher_is_refused(starts, make_llama, text, tmp_path):
    for config, said in (
        ({"vocab_size": 1024}, "has vocabulary 1024"),
        ({"hidden_size": 32}, "has width 32"),
        ({"layers": 3}, "has number of blocks 3"),
    ):
        other = make_llama(**config)
        with pytest.raises(ValueError, match=said):
            recover(starts / "half", text, tmp_path / "no", recipe="squarehead", teacher=other)


def test_a_loss_of_nan_stops_with_the_last_good_state_kept(starts, text, tmp_path, monkeypatch):
    from llmprune.recovery.loop import Diverged, Loop

    real = Loop.advance

    def diverging(self):
        if self.step == 6:
            raise Diverged("the loss became nan at step 7 of 10")
        return real(self)

    monkeypatch.setattr(training, "_SAVE_EVERY", -1.0)
    monkeypatch.setattr(Loop, "advance", diverging)
    with pytest.raises(
        RuntimeError, match=r"nan at step 7 of 10; lower its rate, 0.001, with --set"
    ) as error:
        recover(starts / "half", text, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert (tmp_path / ".out.partial" / "training.safetensors").is_file() and not (tmp_path / "out").exists()
    monkeypatch.setattr(Loop, "advance", real)
    recover(starts / "half", text, tmp_path / "out", resume=True)
    recover(starts / "half", text, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_memory_that_does_not_suffice_is_refused_by_the_plan(starts, text, tmp_path, monkeypatch):
    from llmprune.machine import device

    monkeypatch.setattr(device, "available_memory", lambda: 1_000_000)
    with pytest.raises(ValueError, match=r"training needs about .* and 1.0 MB are free; take a recipe"):
        recover(starts / "half", text, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_lack_of_memory_in_a_step_halves_the_sequences(starts, text, tmp_path, monkeypatch):
    from llmprune.model.student import Student

    real, sizes = Student.__call__, []

    def narrow(self, weights, tokens, hidden=False):
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return real(self, weights, tokens, hidden)

    whole = recover(starts / "half", text, tmp_path / "whole")
    monkeypatch.setattr(Student, "__call__", narrow)
    with pytest.raises(RuntimeError):  # the held-out loss is measured with as many at once as before
        recover(starts / "half", text, tmp_path / "out")
    assert max(sizes) > 2 and whole


def test_the_dry_run_plans_and_writes_nothing(starts, text, tmp_path):
    given = {"text": text, "tokens": 700, "output": tmp_path / "out", "score": False, "dry_run": True}
    plans = {
        recipe: llmprune.recover(starts / "half", recipe=recipe, **given).plan
        for recipe in ("masked-finetuning", "masklora", "perp")
    }
    per_weight = {recipe: plan.parts["trained"] for recipe, plan in plans.items()}
    assert per_weight["masked-finetuning"] > per_weight["masklora"] > per_weight["perp"]
    assert not list(tmp_path.iterdir())


def test_the_record_is_json(starts, text, tmp_path):
    recover(starts / "half", text, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["recipe"]["name"] == "wanda" and record["recovery"]["recipe"]["name"] == "masked-finetuning"
    assert record["matrices"][0]["steps"] == ["masked-finetuning"]


def test_pruning_and_recovery_as_one_job(tiny_llama, calibration_tokens, text, tmp_path):
    options = {"recipe": "wanda", "sparsity": 0.5, "calibration": calibration_tokens, "dtype": "float32"}
    scoring = {"perplexity": ["builtin"], "eval_seqlen": 32, "limit": 4}
    result = llmprune.run_model(
        tiny_llama,
        output=tmp_path / "out",
        recover="masked-finetuning",
        text=text,
        tokens=1280,
        epochs=2,
        **options,
        **scoring,
    )
    scores = result.record["evaluation"]["perplexity"]["builtin"]
    assert set(scores) == {"dense", "start", "pruned", "protocol"} and scores["dense"] is not None
    before, after = (read_masks(tmp_path / name / "masks.safetensors") for name in ("out-pruned", "out"))
    assert all(torch.equal(keep, after[name]) for name, keep in before.items())
    again = llmprune.run_model(
        tiny_llama,
        output=tmp_path / "out",
        recover="masked-finetuning",
        text=text,
        tokens=1280,
        epochs=2,
        resume=True,
        **options,
        **scoring,
    )
    assert again.record["evaluation"] == result.record["evaluation"]


def cut_after(steps):
    """`Training._advance` that is cut off after so many steps."""
    real, count = training.Training._advance, iter(range(1000))

    def cut(self, loop):
        if next(count) == steps:
            raise KeyboardInterrupt
        return real(self, loop)

    return cut


def test_a_run_with_a_training_that_was_cut_off_says_how_to_go_on(
    tiny_llama, calibration_tokens, text, tmp_path, monkeypatch
):
    given = {"recipe": "magnitude", "calibration": calibration_tokens, "dtype": "float32"}
    given |= {"recover": "masked-finetuning", "text": text, "tokens": 1280, "epochs": 2}
    given |= {"perplexity": ["builtin"], "eval_seqlen": 32, "limit": 4, "output": tmp_path / "out"}

    def cut_off(steps, **how):
        with monkeypatch.context() as patch:
            patch.setattr(training, "_SAVE_EVERY", -1.0)
            patch.setattr(training.Training, "_advance", cut_after(steps))
            with pytest.raises(KeyboardInterrupt):
                llmprune.run_model(tiny_llama, **given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(recovering.Recovery, "_learn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llmprune.run_model(tiny_llama, **given)
    pruned = files(tmp_path / "out-pruned")
    with pytest.raises(ValueError, match=r"out-pruned holds the pruned model of an earlier run; .*--resume"):
        llmprune.run_model(tiny_llama, **given)
    cut_off(2, resume=True)
    for how in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match="holds a training that has begun; continue it with --resume"):
            llmprune.run_model(tiny_llama, **given, **how)
    assert files(tmp_path / "out-pruned") == pruned
    record = llmprune.run_model(tiny_llama, **given, restart=True).record
    assert record["evaluation"]["perplexity"]["builtin"]["pruned"]
    assert files(tmp_path / "out-pruned") == pruned


def test_a_resumed_recovery_scores_what_is_not_scored_and_nothing_else(
    starts, tiny_llama, text, tmp_path, monkeypatch
):
    scored = []
    real = production.score
    for module in (production, recovering):
        monkeypatch.setattr(module, "score", lambda *a: scored.append(a[2]) or real(*a))

    def run(**more):
        settings = {"rates": [], "rate.rate": more.pop("rate", 1e-3), "batch": 4}
        options = {"eval_seqlen": 32, "limit": 4, "resume": True, "settings": settings, "epochs": 3}
        options |= {"perplexity": ["builtin"], "teacher": tiny_llama, "dtype": "float32"} | more
        llmprune.recover(
            starts / "half", recipe="squarehead", text=text, tokens=1280, output=tmp_path / "out", **options
        )

    with monkeypatch.context() as patch:
        patch.setattr(training, "_SAVE_EVERY", -1.0)
        patch.setattr(training.Training, "_advance", cut_after(2))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert scored == ["start", "dense"]
    with pytest.raises(ValueError, match="is another one"):
        run(rate=1e-4)
    run()
    run()
    assert scored == ["start", "dense", "recovered"]
    file = tmp_path / "words.txt"
    file.write_text("other words than those " * 400)
    run(perplexity=[str(file)])
    assert scored == ["start", "dense", "recovered"] * 2


def test_a_kill_while_the_state_is_written_leaves_nothing_in_the_result(starts, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "_SAVE_EVERY", -1.0)
        patch.setattr(training.Training, "_advance", cut_after(2))
        with pytest.raises(KeyboardInterrupt):
            recover(starts / "half", text, tmp_path / "out")
    for name in ("training", "best-step"):
        (tmp_path / ".out.partial" / f"{name}.safetensors.tmp").write_bytes(b"half of it")
    recover(starts / "half", text, tmp_path / "out", resume=True)
    assert not list((tmp_path / "out").glob("*.tmp"))
    recover(starts / "half", text, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("recipe", ["masked-finetuning", "gmp", "rigl", "elsa", "soup", "losa", "maskllm"])
def test_the_disk_that_is_asked_for_holds_the_state(starts, text, tmp_path, monkeypatch, recipe, tiny_llama):
    start = starts / ("pairs" if recipe == "maskllm" else "half")
    plan = recover(start, text, tmp_path / "out", recipe, dry_run=True, teacher=tiny_llama)
    monkeypatch.setattr(training, "_SAVE_EVERY", -1.0)
    sizes = {}
    real = training.save_tensors

    def save(path, tensors):
        real(path, tensors)
        sizes["state"] = max(sizes.get("state", 0), path.stat().st_size)
        sizes["result"] = path.with_name("best-step.safetensors").stat().st_size

    monkeypatch.setattr(training, "save_tensors", save)
    recover(start, text, tmp_path / "out", recipe, teacher=tiny_llama)
    headers = 50_000
    assert sizes["state"] <= plan.state + headers and sizes["result"] <= plan.result + headers
    assert plan.state <= 2 * sizes["state"] + headers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"perplexity": "nowhere.txt"}, "nowhere.txt"),
        ({"tasks": "nosuchtask"}, "nosuchtask"),
        ({"eval_seqlen": 4096}, "4096"),
        ({"perplexity": "words.txt", "text": "words.txt", "tokens": 640}, "that is scored"),
        ({}, "which llmprune has not written"),
    ],
)
def test_what_a_training_cannot_end_with_is_refused_before_anything_is_pruned(
    tiny_llama, text, tmp_path, tmp_path_factory, monkeypatch, options, said
):
    monkeypatch.chdir(tmp_path_factory.mktemp("texts"))
    Path("words.txt").write_text(" ".join(f"number {n} of the things that are counted" for n in range(400)))
    (tmp_path / "out").mkdir()
    if not options:
        (tmp_path / "out" / "mine.txt").write_text("mine")
    given = {"recover": "perp", "text": text, "tokens": 1280, "epochs": 2, "perplexity": ["builtin"]}
    with pytest.raises(ValueError, match=said):
        llmprune.run_model(tiny_llama, output=tmp_path / "out", recipe="magnitude", **{**given, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_recovery_within_a_run_must_be_told_its_text(tiny_llama, tmp_path):
    for options, said in (
        ({"recover": "perp"}, "give --text SOURCE and --tokens N, got no text"),
        ({"recover": "perp", "text": "builtin"}, "got no tokens"),
        ({"recover": "prep", "text": "builtin", "tokens": 5}, "unknown recipe of recovery 'prep'"),
        ({"text": "builtin"}, "text is for training after pruning"),
        ({"epochs": 2}, "epochs is for training after pruning"),
        (
            {"recover": "perp", "text": ["short"], "tokens": 5000},
            "in memory holds .* tokens, and .* more --epochs",
        ),
        (
            {"recover": "perp", "text": torch.zeros(9, 8).long(), "tokens": 100},
            "give fewer tokens, or epochs 2",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            llmprune.run_model(tiny_llama, output=tmp_path / "out", sparsity=0.5, **options)
    assert not list(tmp_path.iterdir())


def test_the_texts_of_an_iterator_are_pruned_and_trained_with(tiny_llama, calibration_tokens, tmp_path):
    """An iterator gives its texts once, and a run with a recovery looks at them twice."""
    words = (f"number {n} of the things that are counted " for n in range(400))
    result = llmprune.run_model(
        tiny_llama,
        output=tmp_path / "out",
        recipe="wanda",
        sparsity=0.5,
        calibration=calibration_tokens,
        recover="masked-finetuning",
        text=words,
        tokens=600,
        perplexity="builtin",
        eval_seqlen=32,
        limit=2,
        samples_text=0,
    )
    assert result.record["recovery"]["steps"] >= 1


def test_text_that_is_scored_is_not_trained_on(starts, tmp_path):
    from llmprune.demo.text import held_out_documents

    scored = list(held_out_documents())[:20]
    with pytest.raises(ValueError, match=r"holds .*% of the text 'builtin' that is scored"):
        llmprune.recover(
            starts / "half",
            text=scored,
            tokens=4000,
            seqlen=64,
            output=tmp_path / "out",
            recipe="perp",
            perplexity=["builtin"],
            eval_seqlen=64,
            limit=60,
        )


def test_without_a_recipe_the_best_is_taken_that_fits(starts, tiny_llama, text, tmp_path, monkeypatch):
    from llmprune.machine import device

    given = {"text": text, "tokens": 700, "output": tmp_path / "out", "score": False, "dry_run": True}

    def chosen(**options):
        return llmprune.recover(starts / "half", **given, **options).recipe

    assert chosen(teacher=tiny_llama).name == "recover-best"
    alone = chosen()  # the record names a folder of this machine, which is no teacher for others
    assert alone.name == "masked-finetuning" and "name it with --teacher" in alone.chosen
    needed = llmprune.recover(starts / "half", recipe="masked-finetuning", **given).plan.memory
    monkeypatch.setattr(device, "available_memory", lambda: needed + 1000)
    fitting = chosen(teacher=tiny_llama)
    assert fitting.name == "masked-finetuning" and "needs" in fitting.chosen
    assert chosen(teacher=tiny_llama, time_limit=60).name == "masked-finetuning"
    with pytest.raises(
        ValueError, match=r"within time limit 1e-06 here: perp, the quickest, would take about"
    ):
        chosen(time_limit=1e-6)
    with pytest.raises(ValueError, match="minutes from 0, got -1"):
        chosen(time_limit=-1)
    monkeypatch.setattr(device, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="training needs about"):
        chosen()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoe", "llama4_text"])
@pytest.mark.parametrize("recipe", ["recover-best", "masked-finetuning", "gmp", "masklora"])
def test_mixtures_of_experts_are_trained(kind, recipe, text, tmp_path):
    made = make(kind, tmp_path / "dense")
    start, more = tmp_path / "dense", {"sparsity": 0.5}
    if recipe != "gmp":
        options = {"recipe": "magnitude", "sparsity": 0.5, "output": tmp_path / "start"}
        start, more = llmprune.prune(made, calibration=text, **options).output, {}
    record = recover(start, text, tmp_path / "out", recipe=recipe, teacher=tmp_path / "dense", **more)
    assert record["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert (
        record["recovery"]["held_out"]["best"] <= record["recovery"]["held_out"]["start"] or recipe == "gmp"
    )
    assert torch.isfinite(llmprune.load(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_rule_that_looks_at_inputs_is_refused_for_stacked_experts_before_any_work(text, tmp_path):
    make("mixtral", tmp_path / "dense")
    with pytest.raises(ValueError, match=r"rule wanda looks at the inputs of layers, and .* is stacked with"):
        recover(tmp_path / "dense", text, tmp_path / "out", recipe="sparse-llama", sparsity=0.5, dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["1:2", "8:32"])
@pytest.mark.parametrize("recipe", ["masked-finetuning", "iss-p"])
def test_the_pattern_of_the_start_is_that_of_the_end(tiny_llama, text, tmp_path, pattern, recipe):
    options = {"recipe": "magnitude", "pattern": pattern, "output": tmp_path / "start"}
    made = llmprune.prune(tiny_llama, calibration=text, **options).output
    record = recover(made, text, tmp_path / "out", recipe=recipe, teacher=tiny_llama)
    assert {row["pattern"] for row in record["matrices"]} == {pattern}
    n, m = map(int, pattern.split(":"))
    for name, keep in read_masks(tmp_path / "out" / "masks.safetensors").items():
        assert (keep.reshape(-1, m).sum(1) == n).all(), name


def test_a_start_with_a_dense_matrix_is_kept_where_no_step_is_better(tiny_llama, text, tmp_path):
    rules = [{"match": "*q_proj", "sparsity": 0.0}]
    recipe = {"name": "some", "pruner": "magnitude", "sparsity": 0.5, "rules": rules}
    start = llmprune.prune(tiny_llama, recipe=recipe, calibration=text, output=tmp_path / "start").output
    record = recover(start, text, tmp_path / "out", settings={"rate.rate": 10.0})
    assert record["recovery"]["best_step"] == 0


def test_a_rate_that_is_named_is_taken():
    assert recipes.load("masked-finetuning").rates
    assert recipes.load("masked-finetuning", {"rate.rate": 1e-7}).rates == ()
    assert recipes.load("masked-finetuning", {"rate": 1e-7}).rates == ()
    both = {"rate.rate": 1e-7, "rates": [1e-4, 1e-5]}
    assert recipes.load("masked-finetuning", both).rates == (1e-4, 1e-5)
    assert recipes.load("masked-finetuning", {"rate.decay": "linear"}).rates


def test_a_teacher_that_the_record_names_is_opened_in_its_revision(starts, tmp_path):
    start = recorded(starts, tmp_path / "start", "huggyllama/llama-7b")
    for named in ("huggyllama/llama-7b", "llama-7b"):
        assert recovery_start.is_recorded(start, named)
    assert not recovery_start.is_recorded(start, "huggyllama/llama-13b")


def test_masks_that_are_not_those_of_the_weights_are_refused(starts, tiny_llama, text, tmp_path):
    with pytest.raises(ValueError, match=r"has masks of its own, and those of .* are others; leave them out"):
        recover(starts / "half", text, tmp_path / "out", masks=starts / "pairs")
    with pytest.raises(ValueError, match=r"prunes are not zero in .*; prune them first: llmprune mask apply"):
        recover(tiny_llama, text, tmp_path / "out", masks=starts / "half" / "masks.safetensors")


def test_a_dry_run_refuses_what_the_run_refuses(starts, text, tmp_path):
    with pytest.raises(ValueError, match="resume continues an unfinished run and restart throws it away"):
        recover(starts / "half", text, tmp_path / "out", resume=True, restart=True, dry_run=True)


def test_a_pattern_that_does_not_fit_is_refused_before_any_work(tiny_llama, text, tmp_path):
    with pytest.raises(ValueError, match=r"in_features 64, not divisible by 7 as pattern 2:7 requires"):
        recover(tiny_llama, text, tmp_path / "out", recipe="gmp", pattern="2:7", dry_run=True)


def test_what_is_not_scored_has_no_texts_to_score(starts, text, tmp_path):
    with pytest.raises(ValueError, match="limit is for scoring, and nothing is to be scored"):
        recover(starts / "half", text, tmp_path / "out", limit=2)


def test_fewer_tokens_than_a_step_are_refused(starts, text, tmp_path):
    with pytest.raises(ValueError, match=r"tokens 100 are less than one step, of 4 sequences of 32; give at"):
        llmprune.recover(
            starts / "half",
            text=text,
            tokens=100,
            recipe="masked-finetuning",
            settings={"batch": 4},
            output=tmp_path / "out",
            score=False,
        )


def test_text_from_the_model_and_sequences_over_its_limit_are_refused(starts, tmp_path):
    given = {"tokens": 5000, "output": tmp_path / "out", "score": False}
    with pytest.raises(ValueError, match="asks for text sampled from the model, with which only calibration"):
        llmprune.recover(starts / "half", text="builtin=0.5+self=0.5", **given)
    with pytest.raises(ValueError, match=r"sequence length 1000 is over the model's limit of 64; use"):
        llmprune.recover(starts / "half", text="builtin", seqlen=1000, **given)


@pytest.mark.parametrize("recipe", ["masked-finetuning", "ebft"])
def test_what_is_measured_is_rounded_as_it_is_stored(make_llama, calibration_tokens, text, tmp_path, recipe):
    """Steps so small that nothing is left of them in bfloat16 are no better than the start."""
    model = make_llama(dtype=torch.bfloat16)
    llmprune.prune(model, recipe="wanda", calibration=calibration_tokens, output=tmp_path / "in")
    settings = {"rate.rate": 1e-6}
    record = recover(tmp_path / "in", text, tmp_path / "out", recipe, settings=settings, teacher=model)
    new, old = weights(tmp_path / "out"), weights(tmp_path / "in")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    if recipe != "ebft":  # which tells its errors block by block
        recovery = record["recovery"]
        assert recovery["best_step"] == 0 and recovery["curve"]
        assert {row["held_out_loss"] for row in recovery["curve"]} == {recovery["held_out"]["start"]}


def test_masks_in_another_format_are_not_taken_for_a_dense_model(starts, text, tmp_path):
    llmprune.convert(starts / "half", to="sparse-bitmask", output=tmp_path / "bits")
    with pytest.raises(
        ValueError, match=r"holds its masks as sparse-bitmask.*llmprune convert .* --to packed"
    ):
        recover(tmp_path / "bits", text, tmp_path / "out")
    llmprune.convert(tmp_path / "bits", to="packed", output=tmp_path / "packed")
    assert recover(tmp_path / "packed", text, tmp_path / "out", dry_run=True).trained
