"""Short names of models on the hub, with the transformers class that each is opened as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """What a short name stands for.

    Attributes:
        repository: the hub id.
        model_class: the class that `AutoModelForCausalLM` of transformers makes of it.
        note: what stands in the way of pruning it as it is; empty for nothing.
    """

    repository: str
    model_class: str
    note: str = ""


_GATED = "gated: accept its licence on the hub"
_FP8 = "float8 only: add --dequantize"
_MXFP4 = "mxfp4 only: add --dequantize"
_TIMM = f"{_GATED}; needs the package timm"

_NOTES = {
    "meta-llama/": _GATED,
    "google/gemma-2-": _GATED,
    "google/gemma-3-": _GATED,
    "google/gemma-3n-": _TIMM,
    "openai/gpt-oss-": _MXFP4,
    "deepseek-ai/DeepSeek-V3": _FP8,
    "deepseek-ai/DeepSeek-R1": _FP8,
    "deepseek-ai/DeepSeek-R1-Distill-": "",
    "MiniMaxAI/MiniMax-M2": _FP8,
    "facebook/opt-": "no safetensors on its main branch: convert it first",
}  # beginning of a hub id -> note; the longest that fits holds

_BY_CLASS = {
    "LlamaForCausalLM": {
        "llama-7b": "huggyllama/llama-7b",
        "llama-13b": "huggyllama/llama-13b",
        "llama-2-7b": "meta-llama/Llama-2-7b-hf",
        "llama-2-13b": "meta-llama/Llama-2-13b-hf",
        "llama-2-70b": "meta-llama/Llama-2-70b-hf",
        "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
        "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
        "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
        "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
        "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
        "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
        "deepseek-r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
        "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
        "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    },
    "Llama4ForCausalLM": {"llama-4-scout": "meta-llama/Llama-4-Scout-17B-16E"},
    "MistralForCausalLM": {
        "mistral-7b": "mistralai/Mistral-7B-v0.1",
        "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
        "mistral-nemo-12b": "mistralai/Mistral-Nemo-Base-2407",
        "mistral-small-3-24b": "mistralai/Mistral-Small-24B-Base-2501",
    },
    "Mistral3ForConditionalGeneration": {
        "mistral-small-3.1-24b": "mistralai/Mistral-Small-3.1-24B-Base-2503",
        "ministral-3-3b": "mistralai/Ministral-3-3B-Base-2512",
        "ministral-3-8b": "mistralai/Ministral-3-8B-Base-2512",
        "ministral-3-14b": "mistralai/Ministral-3-14B-Base-2512",
    },
    "MixtralForCausalLM": {
        "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
        "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    },
    "Qwen2ForCausalLM": {
        "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
        "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
        "qwen2.5-3b": "Qwen/Qwen2.5-3B",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B",
        "qwen2.5-14b": "Qwen/Qwen2.5-14B",
        "qwen2.5-32b": "Qwen/Qwen2.5-32B",
        "qwen2.5-72b": "Qwen/Qwen2.5-72B",
        "deepseek-r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    },
    "Qwen3ForCausalLM": {
        "qwen3-0.6b": "Qwen/Qwen3-0.6B",
        "qwen3-1.7b": "Qwen/Qwen3-1.7B",
        "qwen3-4b": "Qwen/Qwen3-4B",
        "qwen3-8b": "Qwen/Qwen3-8B",
        "qwen3-14b": "Qwen/Qwen3-14B",
        "qwen3-32b": "Qwen/Qwen3-32B",
    },
    "Qwen3MoeForCausalLM": {
        "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
        "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    },
    "Qwen3NextForCausalLM": {"qwen3-next-80b-a3b": "Qwen/Qwen3-Next-80B-A3B-Instruct"},
    "Qwen3_5ForCausalLM": {
        "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
        "qwen3.5-2b": "Qwen/Qwen3.5-2B",
        "qwen3.5-4b": "Qwen/Qwen3.5-4B",
        "qwen3.5-9b": "Qwen/Qwen3.5-9B",
        "qwen3.5-27b": "Qwen/Qwen3.5-27B",
    },
    "Qwen3_5MoeForCausalLM": {"qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B"},
    "Gemma2ForCausalLM": {
        "gemma-2-2b": "google/gemma-2-2b",
        "gemma-2-9b": "google/gemma-2-9b",
        "gemma-2-27b": "google/gemma-2-27b",
    },
    "Gemma3ForCausalLM": {
        "gemma-3-270m": "google/gemma-3-270m",
        "gemma-3-1b": "google/gemma-3-1b-pt",
    },
    "Gemma3ForConditionalGeneration": {
        "gemma-3-4b": "google/gemma-3-4b-pt",
        "gemma-3-12b": "google/gemma-3-12b-pt",
        "gemma-3-27b": "google/gemma-3-27b-pt",
    },
    "Gemma3nForConditionalGeneration": {
        "gemma-3n-e2b": "google/gemma-3n-E2B",
        "gemma-3n-e4b": "google/gemma-3n-E4B",
    },
    "Gemma4ForConditionalGeneration": {
        "gemma-4-e2b": "google/gemma-4-E2B-it",
        "gemma-4-e4b": "google/gemma-4-E4B",
        "gemma-4-26b-a4b": "google/gemma-4-26B-A4B-it",
        "gemma-4-31b": "google/gemma-4-31B",
    },
    "Phi3ForCausalLM": {
        "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
        "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
        "phi-4": "microsoft/phi-4",
        "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    },
    "PhimoeForCausalLM": {"phi-3.5-moe": "microsoft/Phi-3.5-MoE-instruct"},
    "Olmo2ForCausalLM": {
        "olmo-2-1b": "allenai/OLMo-2-0425-1B",
        "olmo-2-7b": "allenai/OLMo-2-1124-7B",
        "olmo-2-13b": "allenai/OLMo-2-1124-13B",
    },
    "Olmo3ForCausalLM": {
        "olmo-3-7b": "allenai/Olmo-3-1025-7B",
        "olmo-3-32b": "allenai/Olmo-3-1125-32B",
    },
    "OlmoeForCausalLM": {"olmoe-1b-7b": "allenai/OLMoE-1B-7B-0924"},
    "GptOssForCausalLM": {
        "gpt-oss-20b": "openai/gpt-oss-20b",
        "gpt-oss-120b": "openai/gpt-oss-120b",
    },
    "DeepseekV2ForCausalLM": {"deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite"},
    "DeepseekV3ForCausalLM": {
        "deepseek-v3": "deepseek-ai/DeepSeek-V3",
        "deepseek-r1": "deepseek-ai/DeepSeek-R1",
    },
    "Glm4MoeForCausalLM": {
        "glm-4.5": "zai-org/GLM-4.5",
        "glm-4.5-air": "zai-org/GLM-4.5-Air",
    },
    "GraniteForCausalLM": {
        "granite-3.3-2b": "ibm-granite/granite-3.3-2b-base",
        "granite-3.3-8b": "ibm-granite/granite-3.3-8b-base",
    },
    "GraniteMoeHybridForCausalLM": {
        "granite-4-micro": "ibm-granite/granite-4.0-micro",
        "granite-4-h-tiny": "ibm-granite/granite-4.0-h-tiny",
        "granite-4-h-small": "ibm-granite/granite-4.0-h-small",
    },
    "FalconH1ForCausalLM": {
        "falcon-h1-0.5b": "tiiuae/Falcon-H1-0.5B-Base",
        "falcon-h1-1.5b": "tiiuae/Falcon-H1-1.5B-Base",
        "falcon-h1-7b": "tiiuae/Falcon-H1-7B-Base",
    },
    "Lfm2ForCausalLM": {
        "lfm2-350m": "LiquidAI/LFM2-350M",
        "lfm2-1.2b": "LiquidAI/LFM2-1.2B",
    },
    "Lfm2MoeForCausalLM": {"lfm2-8b-a1b": "LiquidAI/LFM2-8B-A1B"},
    "NemotronHForCausalLM": {
        "nemotron-nano-9b-v2": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
        "nemotron-3-nano": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    },
    "SmolLM3ForCausalLM": {"smollm3-3b": "HuggingFaceTB/SmolLM3-3B-Base"},
    "ApertusForCausalLM": {"apertus-8b": "swiss-ai/Apertus-8B-2509"},
    "SeedOssForCausalLM": {"seed-oss-36b": "ByteDance-Seed/Seed-OSS-36B-Base"},
    "MiniMaxM2ForCausalLM": {"minimax-m2": "MiniMaxAI/MiniMax-M2"},
    "GPTNeoXForCausalLM": {
        "pythia-70m": "EleutherAI/pythia-70m",
        "pythia-160m": "EleutherAI/pythia-160m",
        "pythia-410m": "EleutherAI/pythia-410m",
        "pythia-1b": "EleutherAI/pythia-1b",
        "pythia-1.4b": "EleutherAI/pythia-1.4b",
        "pythia-2.8b": "EleutherAI/pythia-2.8b",
        "pythia-6.9b": "EleutherAI/pythia-6.9b",
        "pythia-12b": "EleutherAI/pythia-12b",
    },
    "OPTForCausalLM": {
        "opt-125m": "facebook/opt-125m",
        "opt-1.3b": "facebook/opt-1.3b",
        "opt-6.7b": "facebook/opt-6.7b",
    },
    "GPT2LMHeadModel": {
        "gpt2": "openai-community/gpt2",
        "gpt2-medium": "openai-community/gpt2-medium",
        "gpt2-large": "openai-community/gpt2-large",
        "gpt2-xl": "openai-community/gpt2-xl",
    },
}


def _note(repository: str) -> str:
    fitting = [begin for begin in _NOTES if repository.startswith(begin)]
    return _NOTES[max(fitting, key=len)] if fitting else ""


ALIASES: Mapping[str, Alias] = {
    name: Alias(repository, model_class, _note(repository))
    for model_class, named in _BY_CLASS.items()
    for name, repository in named.items()
}
