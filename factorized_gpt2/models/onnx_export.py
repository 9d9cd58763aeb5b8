"""A language model as an ONNX graph with its cache, for runtimes without PyTorch."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Of every layer, each (B, heads, P, d / heads): what a cache holds of P tokens."""


class _Step(nn.Module):
    """What the graph computes: one step of generation, from tensors to tensors."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: KeysAndValues
    ) -> tuple[torch.Tensor, KeysAndValues]:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        return outputs.logits, _keys_and_values(outputs.past_key_values)


def export_onnx(model: PreTrainedModel, path: Path | str) -> None:
    """Write a causal language model as an ONNX graph, by torch's exporter (it needs onnx and onnxscript).

    One graph reads a prompt and then goes on token by token, for any batch B, T new tokens and P >= 0 tokens before:

    | input | shape | what |
    | --- | --- | --- |
    | `input_ids` | (B, T) int64 | the new tokens |
    | `attention_mask` | (B, P + T) int64 | 0 where padding, of which positions count nothing, as in `generate` |
    | `past_key_values.{layer}.key`, `.value` | (B, heads, P, d / heads) | what came out before; P = 0 at first |

    | output | shape | what |
    | --- | --- | --- |
    | `logits` | (B, T, V) | of the token after each |
    | `present.{layer}.key`, `.value` | (B, heads, P + T, d / heads) | goes in at the next step |

    Args:
        model: A `FactorizedGPT2`, or any decoder whose cache is a plain `DynamicCache`; adapters are merged before.
            Its dtype is the graph's. Its mode is restored.
        path: Such as `model.onnx`; the weights go beside it, as `model.onnx.data`.
    """
    mask = torch.ones(2, 6, dtype=torch.long, device=model.device)  # sizes of 0 and 1 would be taken for fixed
    input_ids, seen = torch.zeros_like(mask)[:, 3:], mask[:, :3]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            past = _keys_and_values(model(input_ids, attention_mask=seen, use_cache=True).past_key_values)
            names = [f"{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]
            batch = Dim("batch")
            of_past = {0: batch, 2: Dim("past")}
            torch.onnx.export(
                _Step(model).eval(),
                (input_ids, mask, past),
                path,
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
                output_names=["logits", *(f"present.{name}" for name in names)],
                dynamic_shapes={
                    "input_ids": {0: batch, 1: Dim("length")},
                    "attention_mask": {0: batch, 1: Dim.DYNAMIC},
                    "past": [(of_past, of_past)] * len(past),
                },
            )
    finally:
        model.train(was_training)


def _keys_and_values(cache: DynamicCache) -> KeysAndValues:
    layers: list[Any] = cache.layers  # plain ones, as `export_onnx` asks for
    return [(layer.keys, layer.values) for layer in layers]
