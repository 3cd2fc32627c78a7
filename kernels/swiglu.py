"""SwiGLU: silu(gate) * up."""
import torch.nn.functional as F


def swiglu(gate, up):
    """gate, up [..., F] -> [..., F]."""
    return F.silu(gate) * up
