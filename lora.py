"""
LoRA: fine-tuning that fits one card (Hu et al., arXiv 2106.09685). Not in the report, which trains all parameters.

    python sft.py config/qwen_sft.py --lora.rank=16 --lr=1e-4            # rl.py has the same fields
    python plan.py config/mimo_7b_sft_lora.py --gpus=1                   # a 7B on one card of 80 GB
    python hf.py import Qwen2.5-0.5B out/qwen --adapter=PEFT_FOLDER      # somebody's adapter, merged at the import

The base is frozen, in bf16 on a GPU. Beside each chosen linear layer of the trunk two narrow matrices train in fp32:

    y = x W^T + b + s (x A^T) B^T          W [out,in], A [r,in], B [out,r]; s = alpha / r

B begins at zero, so that a run begins with the base itself, bit for bit. A frozen weight has no gradient, no moments of
AdamW, and its input is not kept for the backward pass: 2 bytes a parameter instead of 16 (docs/scale.md).

The rollout engine and a checkpoint get one merged matrix (distributed.replica_state does it):

    W' = W + s B A                         computed in fp32, then cast

A checkpoint is a model like any other for sample.py, eval.py and hf.py. Its folder adapter/ has the two matrices alone,
in the format of Hugging Face's PEFT, which vLLM reads too. To resume, a run needs the checkpoint that it began with:
merging rounds, so W cannot be had back from W'.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import checkpoint
import configurator
import distributed
from checkpoint import opened, usual_mode, write_json
from configurator import UserError
from data.jsonl import read_json
from model import MiMo

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."                  # PEFT's, before the name that the layer has in the Hugging Face model
# keys of adapter_config.json with which s B A is still all that an adapter adds. A value under any other key (use_dora,
# modules_to_save, rank_pattern, ...) makes it something else, or may
HARMLESS = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "r",
            "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
            "lora_dropout", "megatron_core", "qalora_group_size", "eva_config", "velora_config", "runtime_config",
            "ensure_weight_tying"}
REQUIRED = {"peft_type": ("LORA",), "bias": ("none",),     # the other ways to begin change the base too
            "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica")}


@dataclass(frozen=True)
class LoRA:
    """The adapters of a run."""
    rank: int = 0                         # r, columns of B; 0 = no adapters, all parameters train
    alpha: float = 32.0                   # the adapters' product is scaled by alpha / rank
    rslora: bool = False                  # by alpha / sqrt(rank) instead (arXiv 2312.03732)
    targets: tuple[str, ...] = ATTENTION + MLP   # linear layers of each trunk block that get one
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"   # of the frozen base; auto: bf16 on CUDA, fp32 on a CPU

    def __post_init__(self):
        configurator.at_least(self, 0, "rank", "alpha")
        wrong = [t for t in self.targets if t not in ATTENTION + MLP]
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets = {self.targets} should be some of {', '.join(ATTENTION + MLP)}")

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Linear):
    """A frozen linear layer and its adapter. y [...,out] = x W^T + b + s (x A^T) B^T, x [...,in]."""
    def __init__(self, base: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.weight, self.bias = base.weight, base.bias
        where = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, **where))

    def forward(self, x: Tensor) -> Tensor:
        # in the dtype of x: in fp32 autograd would keep an fp32 copy of x
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scale              # [...,in] -> [...,r]
        return super().forward(x) + F.linear(low, self.lora_B.to(x.dtype))   # [...,r] -> [...,out]

    def merged(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W' = W + s B A of whole tensors, in W's dtype."""
        return (W.float() + self.scale * (B @ A)).to(W.dtype)


def attach(model: MiMo, cfg: LoRA, dtype: torch.dtype) -> None:
    """
    Freeze the whole model, in cfg.dtype or else dtype, and put adapters into its trunk blocks; the MTP layers get none.
    Before the model is sharded, on the meta device as well. restore() gives the adapters their values.
    """
    model.to(dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype)).requires_grad_(False)
    for block in model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if name in cfg.targets:
                    setattr(part, name, LoRALinear(linear, cfg.rank, cfg.scale))


def initial_adapters(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """
    (name, full tensor): A uniform in +-1/sqrt(in), which is nn.Linear's own start (kaiming_uniform, a = sqrt 5), as in
    PEFT; B zero. One generator in the order of names: the same numbers on any number of ranks.
    """
    gen = torch.Generator().manual_seed(seed)
    for name, p in sorted(distributed.adapters_of(model).items()):
        yield name, (torch.rand(p.shape, generator=gen) * 2 - 1) / math.sqrt(p.shape[1]) \
            if name.endswith("lora_A") else torch.zeros(p.shape)


def restore(model: nn.Module, ckpt: Path | None, seed: int) -> None:
    """The adapters' values: those of a checkpoint of this run, bit for bit, or fresh ones where ckpt is None."""
    if ckpt is None:
        distributed.fill(model, initial_adapters(model, seed))
        return
    with opened(ckpt / FOLDER / WEIGHTS) as f:
        distributed.fill(model, ((name, f.get_slice(peft_name(name))) for name in distributed.adapters_of(model)))


# ---- what the adapters stand beside ---------------------------------------------------------------------------------

def identity(base: Path) -> dict[str, str]:
    """Which weights a run's adapters belong to: the checkpoint folder, and a digest of its weights."""
    files = sorted(set(checkpoint.weight_files(base).values()))
    known = checkpoint.read_manifest(base)["files"] if (base / "manifest.json").is_file() else {}
    sums = [known[f.name][1] if f.name in known else checkpoint.digest(f) for f in files]
    return {"folder": str(base), "weights": " ".join(sums)}


def base_of(ckpt: Path, cfg: LoRA) -> Path:
    """
    The checkpoint that has the frozen weights of a run to be resumed from ckpt; without adapters ckpt itself. UserError
    when the weights that it began with have changed or are gone. (Other adapters: checkpoint.same_run.)
    """
    if not cfg.rank:
        return ckpt
    saved = checkpoint.read_meta(ckpt)["base"]
    base = Path(saved["folder"])
    if not base.is_dir() or identity(checkpoint.find(base)) != saved:
        raise UserError(f"{ckpt} has adapters for the weights in {base}, which are "
                        f"{'not the same any more' if base.is_dir() else 'gone'}: it cannot be resumed, but is a whole "
                        "model: --init takes it for a new run")
    return base


# ---- PEFT's format --------------------------------------------------------------------------------------------------

def peft_name(name: str) -> str:
    """layers.0.mlp.up_proj.lora_A -> base_model.model.model.layers.0.mlp.up_proj.lora_A.weight."""
    return f"{PREFIX}model.{name}.weight"


def peft_config(cfg: LoRA, base: str) -> dict:
    """The contents of adapter_config.json. base: the Hugging Face folder that the adapters belong to."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": cfg.rank,
            "lora_alpha": int(cfg.alpha) if cfg.alpha.is_integer() else cfg.alpha, "use_rslora": cfg.rslora,
            "target_modules": sorted(cfg.targets), "lora_dropout": 0.0, "bias": "none", "use_dora": False,
            "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True, "inference_mode": True}


def writer(model: nn.Module, cfg: LoRA, base: Path) -> Callable[[Path], None] | None:
    """
    -> what checkpoint.save calls with its new folder, to put the adapters into it; None for a run without. base: the
    checkpoint of the frozen weights. A collective: every rank gathers the adapters.
    """
    if not cfg.rank:
        return None
    distributed.reshard(model)
    tensors = {peft_name(name): distributed.full(p.detach()).cpu().contiguous()
               for name, p in distributed.adapters_of(model).items()}
    made = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    hub = made["imported"] if made.get("imported") and not made.get("adapter") else str(base)   # what hf.py read

    def write(folder: Path) -> None:
        (folder / FOLDER).mkdir()
        save_file(tensors, folder / FOLDER / WEIGHTS, metadata={"format": "pt"})
        usual_mode(folder / FOLDER / WEIGHTS)
        write_json(folder / FOLDER / CONFIG, peft_config(cfg, hub))
    return write


def merging(folder: Path, shapes: dict[str, list[int]]) -> Callable[[str, Tensor], Tensor]:
    """
    folder: an adapter of PEFT, of any linear layers; shapes: Hugging Face name -> shape of the base's tensors. ->
    change(name, W) -> W + s B A. UserError names what is not plain LoRA, and a matrix that does not fit.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG} is missing: {folder} is not an adapter of PEFT")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} should be a JSON object")
    for key, value in ({"peft_type": None} | config).items():
        right = REQUIRED.get(key, () if value and key not in HARMLESS else (value,))
        if value not in right:
            raise UserError(f"{folder / CONFIG}: {key} = {value!r} should be {right[0] if right else 'absent'}: only "
                            "plain LoRA on linear layers is read; PEFT's merge_and_unload() makes a whole model of it")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f"{folder / CONFIG}: r = {r!r}, lora_alpha = {alpha!r} should be a positive int and a number")
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    with opened(folder / WEIGHTS) as f:
        tensors = {name: f.get_tensor(name).float() for name in f.keys()}      # noqa: SIM118 (not a dict)
    pairs = {}
    for name, t in tensors.items():
        layer, _, which = name.removesuffix(".weight").removeprefix(PREFIX).rpartition(".lora_")
        want = shapes.get(f"{layer}.weight") if name.startswith(PREFIX) and which in ("A", "B") else None
        if want is None or len(want) != 2:
            raise UserError(f"{folder / WEIGHTS}: tensor {name} has no place in the model")
        size = [r, want[1]] if which == "A" else [want[0], r]
        other = name.replace(f".lora_{which}.", f".lora_{'BA'[which == 'B']}.")
        if list(t.shape) != size or other not in tensors:
            raise UserError(f"{folder / WEIGHTS}: tensor {name} has shape {list(t.shape)}, should be {size}"
                            if other in tensors else f"{folder / WEIGHTS}: tensor {other} is missing")
        pairs.setdefault(f"{layer}.weight", {})[which] = t
    if not pairs:
        raise UserError(f"{folder / WEIGHTS} has no tensors")
    return lambda name, W: W.float() + scale * (pairs[name]["B"] @ pairs[name]["A"]) if name in pairs else W
