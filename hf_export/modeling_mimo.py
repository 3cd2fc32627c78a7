"""
MiMo-7B for transformers (>= 4.48): Qwen2's trunk with QKV bias, and MTP layers that can be called.

generate() uses the trunk alone; vLLM and SGLang load the same weights and draft with the MTP layer. Here it can be
called, for reference and research:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.mtp_logits(ids)         # the MTP layer's prediction two tokens ahead
    model.mtp_acceptance(ids, prompt_length)     # share of drafts that an engine would accept, in its own greedy answer
"""
import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
)

from .configuration_mimo import MiMoConfig


class MiMoMTPLayer(Qwen2DecoderLayer):
    """
    One MTP layer; hidden state first, embedding second:

        z = block(input_proj([hidden_layernorm(h) ; token_layernorm(embedding)]))
        draft logits = lm_head(final_layernorm(z))

    The trunk's final norm is not applied anywhere here.
    """
    def __init__(self, config: MiMoConfig):
        super().__init__(config, layer_idx=0)        # never gets a KV cache, so it cannot overwrite the trunk's layer 0
        D, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = Qwen2RMSNorm(D, eps=eps)
        self.hidden_layernorm = Qwen2RMSNorm(D, eps=eps)
        self.input_proj = nn.Linear(2 * D, D, bias=False)
        self.final_layernorm = Qwen2RMSNorm(D, eps=eps)

    def forward(self, hidden_states: Tensor, token_embeds: Tensor, **kwargs) -> Tensor:
        """h [B,n,D] before the final norm, embeddings of the next tokens [B,n,D] -> z [B,n,D]."""
        z = torch.cat([self.hidden_layernorm(hidden_states), self.token_layernorm(token_embeds)], -1)
        z = super().forward(self.input_proj(z), **kwargs)
        return z[0] if isinstance(z, tuple) else z   # a tuple before transformers 4.54


class MiMoModel(Qwen2Model):
    """Qwen2's trunk; the MTP layers are stored here and not called by its forward."""
    config_class = MiMoConfig

    def __init__(self, config: MiMoConfig):
        super().__init__(config)
        self.mtp_layers = nn.ModuleList(MiMoMTPLayer(config) for _ in range(config.num_nextn_predict_layers))
        self.post_init()


class MiMoForCausalLM(Qwen2ForCausalLM):
    """Qwen2ForCausalLM with MTP layers beside the trunk."""
    config_class = MiMoConfig

    def __init__(self, config: MiMoConfig):
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = MiMoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def trunk_state(self, input_ids: Tensor) -> Tensor:
        """input_ids [B,T] -> h [B,T,D], the last block's output BEFORE the final norm: the input of the MTP layers."""
        seen = []
        hook = self.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.model(input_ids=input_ids, use_cache=False)
        finally:
            hook.remove()
        return seen[0]

    def mtp_logits(self, input_ids: Tensor, k: int = 0) -> Tensor:
        """MTP layer k on whole sequences. input_ids [B,T] -> logits [B,T-1-k,V]; entry i predicts token i + k + 2."""
        layer, n = self.model.mtp_layers[k], input_ids.shape[1] - 1 - k
        h = self.trunk_state(input_ids)[:, :n]
        token_embeds = self.model.embed_tokens(input_ids[:, k + 1:])
        position_ids = torch.arange(n, device=input_ids.device)[None]
        mask = None
        if self.config._attn_implementation != "flash_attention_2":          # which is causal without a mask
            mask = torch.full((1, 1, n, n), torch.finfo(h.dtype).min, dtype=h.dtype, device=h.device).triu(1)
        z = layer(h, token_embeds, attention_mask=mask, position_ids=position_ids,
                  position_embeddings=self.model.rotary_emb(h, position_ids))
        return self.lm_head(layer.final_layernorm(z))

    @torch.no_grad()
    def mtp_acceptance(self, input_ids: Tensor, prompt_length: int = 1) -> float:
        """
        input_ids [B,T], a prompt of prompt_length tokens and the answer that this model wrote greedily. -> accepted /
        verified drafts of layer 0 with one draft a step, as vLLM and SGLang count them: only tokens of the answer, and
        walked as an engine goes, two tokens on after an accepted draft and one after a wrong one.
        """
        right = (self.mtp_logits(input_ids).argmax(-1)[:, :-1] == input_ids[:, 2:]).tolist()     # [B][T-2], of i + 2
        accepted = verified = 0
        for row in right:
            i = prompt_length - 1                # the trunk's state here gives the answer's first token
            while i < len(row):
                verified += 1
                accepted += row[i]
                i += 1 + row[i]
        return accepted / max(1, verified)


# save_pretrained copies this file too: transformers before 5 left it out
MiMoModel.register_for_auto_class("AutoModel")
MiMoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
