"""MiMo-7B configuration for transformers: Qwen2's, plus the number of multi-token prediction (MTP) layers."""
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config


class MiMoConfig(Qwen2Config):
    """config.json spells out every key: Qwen2Config's own defaults (eps 1e-6, vocabulary 151,936) are not MiMo's."""
    model_type = "mimo"
    num_nextn_predict_layers: int = 0
