"""A class that nobody has seen: its blocks and matrices are found by structure."""

import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import llmprune
from llmprune.model import activations
from llmprune.model.opening import OpenOptions, open_model
from llmprune.model.targets import all_targets
from runs import logits_by_block

TOKENS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))
CODE = '''
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, hidden_size=32, vocab_size=64, layers=3, between=False, other=False, **kwargs):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.layers, self.between, self.other = layers, between, other
        super().__init__(**kwargs)


class OddExpert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class OddBlock(nn.Module):
    """Two experts in a list; takes a vector per token and what the block before it returned beside."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.mix = nn.Linear(width, width)
        self.router = nn.Linear(width, 2)
        self.experts = nn.ModuleList([OddExpert(width), OddExpert(width)])

    def forward(self, hidden, side, before=None, memory=None):
        mixed = torch.tanh(self.mix(hidden + side))
        if before is not None:
            mixed = mixed + 0.1 * before
        if memory:
            mixed = mixed + 0.1 * memory["mixed"]
        memory["mixed"] = mixed
        flat = mixed.reshape(-1, mixed.shape[-1])
        chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out[rows] = expert(flat[rows])
        return hidden + out.view_as(hidden), mixed


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix = OddConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.side = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([OddBlock(config) for _ in range(config.layers)])
        if config.other:  # heavier than the blocks, and not run one after the other
            self.other = nn.ModuleList([nn.Linear(config.hidden_size, 4096) for _ in range(2)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None, **kwargs):
        hidden, before, memory = self.embed(input_ids), None, {}
        side = self.side(input_ids)
        for block in self.blocks:
            hidden, before = block(hidden, side, before=before, memory=memory)
            if self.config.between:
                hidden = hidden * 1.5
        return CausalLMOutput(logits=self.head(hidden))
'''


@pytest.fixture
def odd(tmp_path):
    """Makes the folder of such a model with random weights."""

    def make(**config):
        folder = tmp_path / "odd"
        folder.mkdir()
        (folder / "odd.py").write_text(CODE)
        spec = importlib.util.spec_from_file_location("odd", folder / "odd.py")
        code = sys.modules["odd"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        model = code.OddForCausalLM(code.OddConfig(**config))
        generator = torch.Generator().manual_seed(0)
        state = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
        model.load_state_dict(state)
        save_file(state, folder / "model.safetensors")
        auto = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
        values = {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": auto, **config}
        (folder / "config.json").write_text(json.dumps(values))
        return folder, model.eval()

    return make


def opened(folder):
    return open_model(folder, OpenOptions(trust_remote_code=True)).skeleton


def test_its_blocks_run_one_after_the_other_as_in_the_whole_model(odd):
    folder, model = odd()
    with torch.no_grad():
        wanted = model(TOKENS).logits
    found = logits_by_block(opened(folder), TOKENS)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_arguments_that_differ_only_in_later_sequences_are_kept(odd, monkeypatch):
    folder, model = odd()
    tokens = TOKENS.clone()
    tokens[:5] = tokens[0]
    monkeypatch.setitem(activations._TOKENS, "cpu", 2 * tokens.shape[1])
    with torch.no_grad():
        wanted = model(tokens).logits
    assert torch.allclose(logits_by_block(opened(folder), tokens), wanted, atol=1e-5)


@pytest.mark.parametrize("recipe", ["wanda", "best", "best-mask"])
def test_it_is_pruned_and_recounted(odd, tmp_path, recipe):
    folder, _ = odd()
    settings = {"update.steps": 4} if recipe == "best" else {}
    record = llmprune.prune(
        folder,
        recipe=recipe,
        sparsity=0.5,
        calibration=TOKENS,
        output=tmp_path / "out",
        trust_remote_code=True,
        settings=settings,
    ).record
    rows = {row["name"]: row for row in record["matrices"]}
    assert len(rows) == 3 * 5 and all(row["sparsity"] == 0.5 for row in rows.values())
    assert llmprune.inspect(tmp_path / "out", trust_remote_code=True)["record_agrees"]
    seen = [rows[f"blocks.0.experts.{expert}.up.weight"]["tokens"] for expert in range(2)]
    assert sum(seen) == TOKENS.numel() and min(seen) > 0


def test_its_routers_stay_dense(odd):
    folder, _ = odd()
    names = {target.name for target in all_targets(opened(folder))}
    assert "blocks.0.mix" in names and not any("router" in name for name in names)


def test_a_model_that_does_more_between_its_blocks_is_refused(odd, tmp_path):
    folder, _ = odd(between=True)
    with pytest.raises(ValueError, match=r"OddForCausalLM does more between its blocks .*at block 2"):
        llmprune.prune(
            folder,
            recipe="wanda",
            sparsity=0.5,
            calibration=TOKENS,
            output=tmp_path / "out",
            trust_remote_code=True,
        )
    assert not (tmp_path / "out").exists()


def test_the_user_names_the_list_of_blocks_where_another_one_is_taken(odd, tmp_path):
    folder, _ = odd(other=True)
    options = {"recipe": "wanda", "sparsity": 0.5, "calibration": TOKENS, "trust_remote_code": True}
    told = r"--blocks may name blocks \(3 of OddBlock\)$"
    with pytest.raises(
        ValueError, match=rf"blocks of OddForCausalLM cannot be run one after the other .*{told}"
    ):
        llmprune.prune(folder, output=tmp_path / "out", **options)
    with pytest.raises(
        ValueError, match=r"no list of blocks 'block'; --blocks may name other .*, blocks \(3"
    ):
        llmprune.prune(folder, output=tmp_path / "out", blocks="block", **options)
    assert not (tmp_path / "out").exists()
    record = llmprune.prune(folder, output=tmp_path / "out", blocks="blocks", **options).record
    assert len(record["matrices"]) == 15 and record["model"]["blocks"] == "blocks"
    # The folder remembers it.
    assert llmprune.inspect(tmp_path / "out", trust_remote_code=True)["record_agrees"]


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feed = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, **feed))
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration.? is an encoder with a decoder"):
        llmprune.prune(
            tmp_path / "in", recipe="wanda", sparsity=0.5, calibration=TOKENS, output=tmp_path / "out"
        )
