"""The Python API: the functions that `import llmprune` offers, and that the commands call."""

from llmprune.api.acceleration import accelerate
from llmprune.api.benching import bench
from llmprune.api.checkpoints import evaluate, inspect, load, push
from llmprune.api.comparing import Comparison, compare
from llmprune.api.conversion import convert
from llmprune.api.generation import generate
from llmprune.api.literature import published
from llmprune.api.masks import mask_apply, mask_check, mask_diff
from llmprune.api.pruning import prune, run_model
from llmprune.api.recovering import recover
from llmprune.api.result import DryRun, RecoveryDryRun, Result, plan_summary
from llmprune.api.sweep_result import SweepDryRun, SweepResult
from llmprune.api.sweeping import sweep
from llmprune.api.training import MaskKeeper, merge_adapter

__all__ = [
    "Comparison",
    "DryRun",
    "MaskKeeper",
    "RecoveryDryRun",
    "Result",
    "SweepDryRun",
    "SweepResult",
    "accelerate",
    "bench",
    "compare",
    "convert",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "mask_apply",
    "mask_check",
    "mask_diff",
    "merge_adapter",
    "plan_summary",
    "prune",
    "published",
    "push",
    "recover",
    "run_model",
    "sweep",
]
