"""What tests read out of a checkpoint folder in one call; the scripts read the parts themselves."""
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

import checkpoint


def load_model(path) -> tuple[dict, dict[str, Tensor], dict]:
    """(ModelConfig fields, state dict, meta) of a checkpoint or of the newest one of a run."""
    ckpt, state = checkpoint.find(path), {}
    for file in sorted(set(checkpoint.weight_files(ckpt).values())):
        state |= load_file(file)
    return checkpoint.read_shape(ckpt), state, checkpoint.read_meta(ckpt)


def load_latest(run, model: nn.Module, optimizer) -> tuple[dict, Path] | tuple[None, None]:
    """latest + read_weights + load_optimizer. -> (state, folder), (None, None) when there is nothing to resume."""
    ckpt = checkpoint.latest(run)
    if ckpt is None:
        return None, None
    checkpoint.read_weights(ckpt, model)
    checkpoint.load_optimizer(ckpt, model, optimizer)
    return checkpoint.read_state(ckpt), ckpt
