"""Pushing a finished folder to a hub on loopback, through the hub's real client."""

import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from hub_server import READER, TOKEN, Fault
from outputs import FILES

import llmprune
from llmprune.hub.download import locate

PUBLISHED = FILES | {"report-matrices.png"}
PRUNING = {"calibration": "builtin", "samples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def finished(make_llama, tmp_path_factory):
    """A tiny model pruned and scored, from a source whose card names its licence. Treat as read-only."""
    folder = tmp_path_factory.mktemp("finished")
    source = shutil.copytree(make_llama(), folder / "source")
    (source / "README.md").write_text("---\nlicense: Apache-2.0\ntags: [llama]\n---\n# The source\n")
    return llmprune.run_model(
        source, output=folder / "out", perplexity=["builtin"], limit=2, **PRUNING
    ).output


@pytest.fixture
def out(finished, tmp_path):
    """A finished folder that a test may change."""
    return shutil.copytree(finished, tmp_path / "out")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def remote(hub, repository="me/pruned", revision="main"):
    """What the hub has of a repository, without its own file."""
    return {
        n: c
        for n, c in contents(hub.repositories["models", repository].folder(revision)).items()
        if n != ".gitattributes"
    }


def refusal(*args, **options):
    """The one line that `push` answers with."""
    with pytest.raises(ValueError) as refused:
        llmprune.push(*args, **options)
    assert "\n" not in str(refused.value)
    assert TOKEN not in str(refused.value)
    return str(refused.value)


def sent(hub):
    """Bytes of weights that arrived at the hub, by hash."""
    return {
        path.removeprefix("/lfs/"): size
        for path, size in hub.received.items()
        if path.startswith("/lfs/") and path != "/lfs/verify"
    }


def test_a_push_is_private_and_byte_for_byte(own_hub, out):
    before = contents(out)
    for stray in (
        ".env",
        "notes.txt",
        "optimizer.safetensors",
        "model.safetensors",
        "train.py",
        "README.md.bak",
    ):
        (out / stray).write_text("HF_TOKEN=hf_secret")
    (out / "checkpoints").mkdir()
    pushed = llmprune.push(out, "me/pruned")
    assert own_hub.repositories["models", "me/pruned"].private
    there = remote(own_hub)
    assert set(there) == PUBLISHED
    assert {n: c for n, c in there.items() if n != "README.md"} == {
        n: c for n, c in before.items() if n != "README.md"
    }
    assert (out / "README.md").read_bytes() == before["README.md"], "the local card stays"
    assert {f["name"]: f["bytes"] for f in pushed["files"]} == {n: len(c) for n, c in there.items()}
    assert pushed["bytes"] == sum(map(len, there.values()))
    assert (pushed["url"], pushed["created"], pushed["private"]) == (f"{own_hub.url}/me/pruned", True, True)
    assert own_hub.count("POST .*/commit/") == 1, "nobody finds half a model"


def test_the_card_says_what_it_is_and_how_to_load_it(own_hub, out):
    llmprune.push(out, "me/pruned")
    card = remote(own_hub)["README.md"].decode()
    record = json.loads((out / "llmprune.json").read_text())
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["pipeline_tag"], front["library_name"]) == (
        "apache-2.0",
        "text-generation",
        "transformers",
    )
    assert "base_model" not in front, "the source is a folder, not a hub id"
    assert {"pruned", "sparse", "llmprune"} <= set(front["tags"])
    assert 'from_pretrained("me/pruned", dtype="auto")' in card and "PATH_OR_ID" not in card
    scores = record["evaluation"]["perplexity"]["builtin"]
    change = f"{scores['pruned'] / scores['dense'] - 1:+.1%}"
    assert (
        f"| perplexity builtin | {scores['dense']:.2f} | {scores['pruned']:.2f} | {change} | 2 windows "
        "of 64 tokens" in card
    )
    assert scores["protocol"]["mean"] in card and "neither smaller on disk nor faster" in card
    recipe = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]
    assert yaml.safe_load(recipe) == record["recipe"]


def test_the_command_of_a_card_makes_the_same_model_again(own_hub, make_llama, tmp_path, typed):
    own_hub.add("owner/tiny", make_llama())
    llmprune.prune("owner/tiny", output=tmp_path / "first", sparsity=0.6, **PRUNING)
    card = (tmp_path / "first" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/tiny"
    command = re.search(r"```\n(llmprune prune owner/tiny --revision .*)\n```", card)[1]
    assert typed(*shlex.split(command)[1:])[0] == 0
    first, second = contents(tmp_path / "first"), contents(tmp_path / "again")
    assert all(first[name] == second[name] for name in first if name.endswith(".safetensors"))


def test_what_was_pushed_can_be_used_by_its_id(own_hub, out):
    llmprune.push(out, "me/pruned")
    located = locate("me/pruned")
    pages = {"report.html", "report-matrices.png"}
    assert contents(located.folder) == {n: c for n, c in remote(own_hub).items() if n not in pages}
    assert llmprune.inspect("me/pruned")["record_agrees"] is True
    mine, theirs = (llmprune.load(path).state_dict() for path in (out, "me/pruned"))
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)
    scores = llmprune.evaluate("me/pruned", perplexity=["builtin"], limit=2)["perplexity"]["builtin"]
    assert (
        scores["value"]
        == json.loads((out / "llmprune.json").read_text())["evaluation"]["perplexity"]["builtin"]["pruned"]
    )


def test_a_push_that_broke_off_sends_only_what_is_missing(own_hub, out):
    own_hub.faults = [Fault("PUT /lfs/", times=10**6, skip=2, cut=1000)]
    assert re.search(
        r"cannot push to me/pruned .*again sends only what is missing", refusal(out, "me/pruned")
    )
    assert remote(own_hub) == {}, "nothing is visible of half a push"
    arrived, own_hub.faults = dict(own_hub.objects), []
    assert len(arrived) == 2 and sent(own_hub) == {oid: len(content) for oid, content in arrived.items()}
    llmprune.push(out, "me/pruned")
    assert sent(own_hub) == {oid: len(content) for oid, content in own_hub.objects.items()}, (
        "every byte was sent once"
    )
    assert set(remote(own_hub)) == PUBLISHED


def test_an_interrupted_push_says_how_to_go_on(own_hub, out, typed, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", interrupted)
    code, _, err = typed("push", out, "me/pruned")
    assert (code, err.count("\n")) == (130, 1) and "the same push again sends only what is missing" in err


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize(
    "asked",
    [
        "GET /api/models/me/pruned$",
        "POST /api/repos/create",
        "GET .*/tree/main",
        "POST /api/validate-yaml",
        "POST .*/preupload/",
        "POST .*/objects/batch",
        "PUT /lfs/",
        "POST /lfs/verify",
        "POST .*/commit/",
        "GET .*/tree/[0-9a-f]{40}",
    ],
)
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(own_hub, out, asked, status):
    own_hub.faults = [Fault(asked, times=2, status=status)]
    llmprune.push(out, "me/pruned")
    assert own_hub.faults[0].times == 0
    assert set(remote(own_hub)) == PUBLISHED


@pytest.mark.parametrize("reset", [False, True])
def test_an_upload_cut_in_the_middle_is_sent_again(own_hub, out, reset):
    own_hub.faults = [Fault("PUT /lfs/", cut=1000, reset=reset)]
    llmprune.push(out, "me/pruned")
    assert set(remote(own_hub)) == PUBLISHED


def test_a_commit_whose_answer_is_lost_is_not_lost(own_hub, out):
    own_hub.faults = [Fault("POST .*/commit/", cut=0, after=True)]
    llmprune.push(out, "me/pruned")
    assert set(remote(own_hub)) == PUBLISHED


def test_a_hub_that_stays_down_is_given_up(own_hub, out):
    own_hub.faults = [Fault("POST .*/commit/", times=10**6, status=500)]
    assert re.search(r"cannot push to me/pruned .*500", refusal(out, "me/pruned"))
    assert own_hub.count("POST .*/commit/") == 4


def test_pushing_the_same_again_changes_nothing(own_hub, out):
    first = llmprune.push(out, "me/pruned")
    own_hub.requests.clear()
    second = llmprune.push(out, "me/pruned")
    assert (second["commit"], second["created"]) == (first["commit"], False)
    assert not own_hub.count("PUT /lfs/") and not own_hub.count("POST .*/commit/")


def test_a_later_push_replaces_an_earlier_one_whole(own_hub, out, make_llama, tmp_path):
    llmprune.push(out, "me/pruned")
    deeper = llmprune.prune(make_llama(layers=3), output=tmp_path / "deeper", **PRUNING).output
    pushed = llmprune.push(deeper, "me/pruned")
    shards = sorted(n for n in PUBLISHED if n.endswith("of-00003.safetensors"))
    assert pushed["removed"] == [*shards, "report-matrices.png"], "of which the second has none"
    assert set(remote(own_hub)) == set(contents(deeper))


def test_weights_of_others_are_never_removed_nor_mixed_with_ours(own_hub, out, make_llama):
    own_hub.add("me/dense", make_llama(), private=True)
    assert re.search(
        r"me/dense holds other weights \(model.safetensors\).*another repository", refusal(out, "me/dense")
    )
    assert not own_hub.count("POST|PUT")


def test_a_branch_leaves_the_main_one_alone(own_hub, out):
    empty = own_hub.root / "empty"
    empty.mkdir(parents=True)
    own_hub.add("me/pruned", empty, private=True)
    pushed = llmprune.push(out, "me/pruned", revision="seventy")
    assert remote(own_hub) == {} and set(remote(own_hub, revision="seventy")) == PUBLISHED
    assert pushed["url"].endswith("/me/pruned/tree/seventy")
    assert (
        'from_pretrained("me/pruned", revision="seventy", dtype="auto")'
        in remote(own_hub, revision="seventy")["README.md"].decode()
    )
    assert llmprune.inspect("me/pruned", revision="seventy")["record_agrees"] is True


def test_public_only_when_asked(own_hub, out, finished):
    assert llmprune.push(out, "me/open", private=False)["private"] is False
    assert not own_hub.repositories["models", "me/open"].private
    own_hub.requests.clear()
    assert re.search(r"me/open is there and public.*--public", refusal(out, "me/open"))
    assert not own_hub.count("POST|PUT"), "nothing was sent to a public repository"
    llmprune.push(out, "me/hidden")
    assert llmprune.push(out, "me/hidden", private=False)["private"] is True
    assert own_hub.repositories["models", "me/hidden"].private, "what is there keeps its visibility"


def lie(folder, change):
    record = json.loads((folder / "llmprune.json").read_text())
    change(record)
    (folder / "llmprune.json").write_text(json.dumps(record))


def fewer_zeros(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name][tensors[name] == 0] = 1.0
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        fewer_zeros,
        lambda folder: lie(folder, lambda r: r["matrices"][0].update(sparsity=0.9)),
        lambda folder: lie(folder, lambda r: r["matrices"].pop()),
        lambda folder: lie(folder, lambda r: r["totals"].update(zeros=1)),
        lambda folder: lie(
            folder, lambda r: r["matrices"][0].update(name="model.layers.9.self_attn.q_proj.weight")
        ),
    ],
)
def test_a_record_that_lies_is_not_published(own_hub, out, damage):
    damage(out)
    assert re.search(
        r"llmprune.json in .*out does not fit its weights, so nothing is uploaded; see llmprune inspect",
        refusal(out, "me/pruned"),
    )
    assert own_hub.requests == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "llmprune.json").unlink(), r"has no llmprune.json.*llmprune run or prune"),
        (lambda f: (f / "config.json").unlink(), r"has no config.json"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), r"has no model.safetensors.index.json"),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
            r"names model-00002-of-00003.safetensors, which is missing",
        ),
        (lambda f: (f / "llmprune.json").write_text("{}"), r"is not a record of this program"),
        (lambda f: (f / "README.md").write_bytes(b"\xff\xfe"), r"cannot read .*README.md"),
        (shutil.rmtree, r"no such folder"),
    ],
)
def test_an_unfinished_folder_is_not_published(own_hub, out, damage, said):
    damage(out)
    assert re.search(said, refusal(out, "me/pruned"))
    assert not own_hub.count("PUT|commit")


@pytest.mark.parametrize(
    "name",
    [
        "pruned",
        "me/",
        "/x",
        "me/a/b",
        "me/a b",
        "https://hub/me/x",
        "me/a--b",
        "me/.x",
        "me/x.git",
        "../x",
        "",
    ],
)
def test_a_name_that_is_no_repository_is_refused_without_the_hub(own_hub, out, name):
    assert re.search(r"cannot be a hub repository|owner/name", refusal(out, name))
    assert own_hub.requests == []


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", r"needs a token with write access.*hf auth login.*HF_TOKEN"),
        ("hf_expired", r"refuses the token for me/pruned"),
        ("hf_with space", r"holds characters no token has"),
        ("hf_\N{EURO SIGN}", r"holds characters no token has"),
        (READER, r"does not let this token write me/pruned .*write access for 'me'"),
    ],
)
def test_a_token_that_may_not_push_is_said(own_hub, out, monkeypatch, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    answer = refusal(out, "me/pruned")
    assert re.search(said, answer) and (not token or token not in answer)
    assert remote_names(own_hub) == []


def remote_names(hub):
    return [name for _, name in hub.repositories]


def test_a_token_can_be_given(own_hub, out, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert llmprune.push(out, "me/pruned", token=TOKEN)["created"]
    assert own_hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("POST /api/repos/create", status=409), r"me/pruned is taken.*another repository"),
        (Fault("POST /api/repos/create", status=404), r"has no 'me/pruned', or no owner 'me'"),
        (Fault("POST .*/objects/batch", status=413), r"no room for it"),
        (Fault("POST .*/commit/", status=403), r"does not let this token write me/pruned \(fault 403\)"),
        (Fault("POST .*/commit/", status=400), r"cannot push to me/pruned .*fault 400"),
        (
            Fault("POST .*/commit/", status=400, headers={"X-Error-Message": f"what is {TOKEN}?"}),
            r"what is \*\*\*\?",
        ),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(own_hub, out, fault, said):
    own_hub.faults = [fault]
    assert re.search(said, refusal(out, "me/pruned"))


def test_somebody_else_s_name_is_refused(own_hub, out):
    assert re.search(
        r"does not let this token write others/pruned .*namespace 'others'", refusal(out, "others/pruned")
    )


def test_offline_mode_is_named(own_hub, out, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(out, "me/pruned")


def test_a_card_the_hub_would_refuse_is_found_before_the_upload(own_hub, out):
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("license: apache-2.0", "license: none-such"))
    assert re.search(
        r'refuses the model card \(.*"license" must be one of.*README.md', refusal(out, "me/pruned")
    )
    assert not own_hub.count("PUT /lfs/")


def test_a_card_edited_by_hand_is_kept(own_hub, out):
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMade for the harbour office.\n")
    llmprune.push(out, "me/pruned")
    assert "harbour office" in remote(own_hub)["README.md"].decode()


def test_a_file_the_repository_ignores_does_not_go_missing_quietly(own_hub, out):
    llmprune.push(out, "me/pruned")
    own_hub.repositories["models", "me/pruned"].ignored = ("llmprune.json",)
    lie(out, lambda record: record.update(note="changed"))
    assert re.search(
        r"llmprune.json did not arrive whole in me/pruned.*\.gitignore", refusal(out, "me/pruned")
    )


def test_the_command_says_where_it_lies_and_what_to_do_next(own_hub, out, typed):
    code, shown, err = typed("push", out, "me/pruned", "--revision", "seventy")
    assert (code, err) == (0, "")
    for said in (
        "me/pruned (new, private)",
        f"{own_hub.url}/me/pruned/tree/seventy",
        "13, ",
        "llmprune inspect me/pruned --revision seventy",
    ):
        assert said in shown, shown
    code, shown, err = typed("push", out, "me/pruned", "--public", "--json")
    pushed = json.loads(shown)
    assert (code, pushed["private"], pushed["revision"]) == (0, True, None)
    assert "was there, stays private" in err and "--public changes no repository that is there" in err
    assert typed("push", out, "me/pruned", "--quiet") == (0, "", "")
    code, shown, err = typed("push", out / "nowhere", "me/pruned")
    assert (code, shown, err.count("\n")) == (1, "", 1)
    assert TOKEN not in shown + err


def test_a_packed_folder_is_pushed_and_loaded_from_there(own_hub, out, tmp_path):
    llmprune.convert(out, to="packed", output=tmp_path / "packed")
    llmprune.push(tmp_path / "packed", "me/packed")
    there = remote(own_hub, "me/packed")
    assert set(there) == FILES - {"masks.safetensors"}, "runs of tests draw no plots"
    card = there["README.md"].decode()
    assert "import llmprune  # which knows packed weights\nfrom transformers import" in card
    assert 'from_pretrained("me/packed", dtype="auto")' in card
    tokens = torch.arange(8, dtype=torch.int64)[None]
    logits = [llmprune.load(model)(tokens).logits for model in ("me/packed", tmp_path / "packed")]
    assert torch.equal(*logits)
    assert llmprune.inspect("me/packed")["record_agrees"]
    assert llmprune.mask_check("me/packed")["filled"] == 0


def test_a_conversion_of_what_no_run_has_made_needs_a_card(own_hub, make_llama, tmp_path):
    llmprune.convert(make_llama(), to="packed", output=tmp_path / "packed")
    assert "write README.md in it yourself, then push again" in refusal(tmp_path / "packed", "me/packed")
    assert not own_hub.repositories
    (tmp_path / "packed" / "README.md").write_text("# mine\n")
    llmprune.push(tmp_path / "packed", "me/packed")
    assert remote(own_hub, "me/packed")["README.md"] == b"# mine\n"
