"""Tiny decoders of several architectures with random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE, WIDTH = 99, 32
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "tie_word_embeddings": True},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 48, "dropout": 0.0},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def tiny_decoder(kind: str, seed: int = 3, **changes) -> PreTrainedModel:
    """Make a model in evaluation mode, whose weights are far from where initialisation puts them."""
    fields = {name: value for name, value in (SIZES | ARCHITECTURES[kind] | changes).items() if value is not None}
    config = AutoConfig.for_model(kind, **fields, eos_token_id=None)  # it always runs to its length
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.15 if parameter.ndim == 2 else 0.05) * torch.randn(parameter.shape)
    return model.eval()
