"""The networks of nanoGPT and of its factorized descendant, written anew, with the names their checkpoints have."""

import os
from pathlib import Path

import numpy as np
import torch
from conftest import RANK, VOCAB_SIZE, WIDTH
from torch import nn

NANO = {
    **{"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "block_size": 48, "vocab_size": VOCAB_SIZE},
    **{"bias": True, "dropout": 0.1},
}
DESCENDANT = NANO | {
    **{"n_embd_wte": RANK, "n_kv_group": None, "norm_variant_attn": "layernorm", "norm_variant_output": "layernorm"},
    **{"activation_variant": "gelu", "attention_variant": "causal", "mlp_variant": "mlp", "use_pre_ln": True},
    **{"linear_variant_attn": "linear", "linear_variant_q": None, "use_abs_pos_embeddings": True, "n_lpe": 0},
    **{"use_rotary_embeddings": False, "rope_variant": "rope", "use_moe": False, "n_experts": 8, "quantize_wte": None},
    **{"quantize_wte_bits": 8, "consmax_base": 2.0, "softmax_variant_attn": "softmax", "mlp_size_layerlist": None},
}


class Norm(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_parameter("bias", nn.Parameter(torch.zeros(WIDTH)) if bias else None)

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        x = self.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x if self.bias is None else x + self.bias


class Attention(nn.Module):
    def __init__(self, options, fused: bool, mask: bool):
        super().__init__()
        self.heads, self.fused, bias, size = options["n_head"], fused, options["bias"], options["block_size"]
        if fused:
            self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        else:
            self.c_attn_q, self.c_attn_k, self.c_attn_v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        if mask:
            self.register_buffer("bias", torch.ones(size, size).tril().view(1, 1, size, size))

    def forward(self, x):
        projected = (
            self.c_attn(x).chunk(3, -1) if self.fused else (self.c_attn_q(x), self.c_attn_k(x), self.c_attn_v(x))
        )
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in projected)
        scores = torch.einsum("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.c_proj(torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, options, offsets: tuple[float, float] | None):
        super().__init__()
        inner = options.get("mlp_size") or options.get("mlp_expansion_factor", 4) * WIDTH
        up, down = (options["bias"] if (b := options.get(f"mlp_{n}_bias")) is None else b for n in ("up", "down"))
        self.c_fc, self.c_proj = nn.Linear(WIDTH, inner, bias=up), nn.Linear(inner, WIDTH, bias=down)
        if offsets is not None:
            for name, value in zip("xy", offsets, strict=True):
                self.register_buffer(f"activation_{name}_offset", torch.tensor(value))
        self.offsets, self.activation = offsets or (0.0, 0.0), options.get("activation_variant", "gelu")

    def forward(self, x):
        x = self.c_fc(x) - self.offsets[0]
        if self.activation == "squared_relu":
            x = x.relu() ** 2
        elif self.activation == "gelu":
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        else:
            x = getattr(torch.nn.functional, self.activation)(x)
        return self.c_proj(x - self.offsets[1])


class OldNet(nn.Module):
    """Either network, with the names and the layout that its checkpoints have."""

    def __init__(self, options, mask=False, offsets=None, norms=("ln_1", "ln_2")):
        super().__init__()
        torch.manual_seed(3)
        rank = options.get("n_embd_wte")
        fused, norm = "activation_variant" not in options, lambda: Norm(options["bias"])
        vocab_size, self.norms = options["vocab_size"], norms
        blocks = [
            nn.ModuleDict(
                {norms[0]: norm(), norms[1]: norm()}
                | {"attn": Attention(options, fused, mask), "mlp": FeedForward(options, offsets)}
            )
            for _ in range(options["n_layer"])
        ]
        parts = {"wte": nn.Embedding(vocab_size, rank or WIDTH), "wpe": nn.Embedding(options["block_size"], WIDTH)}
        if rank:
            parts |= {name: nn.Linear(rank, WIDTH, bias=False) for name in ("scale_up", "scale_down")}
        self.transformer = nn.ModuleDict(parts | {"h": nn.ModuleList(blocks), "ln_f": norm()})
        self.lm_head = nn.Linear(rank or WIDTH, vocab_size, bias=False)
        if rank and options.get("n_embd_wte_scale_tying", True):
            self.transformer.scale_up.weight = self.transformer.scale_down.weight
        if options.get("wte_weight_tying", True):
            self.lm_head.weight = self.transformer.wte.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.2 * torch.randn_like(parameter)

    @torch.no_grad()
    def forward(self, ids):
        trunk = self.transformer
        x = trunk.wte(ids)
        if "scale_up" in trunk:
            x = x @ trunk.scale_up.weight.T
        x = x + trunk.wpe.weight[: ids.shape[1]]
        for block in trunk.h:
            x = x + block.attn(block[self.norms[0]](x))
            x = x + block.mlp(block[self.norms[1]](x))
        x = trunk.ln_f(x)
        if "scale_down" in trunk:
            x = x @ trunk.scale_down.weight
        return self.lm_head(x)

    @torch.no_grad()
    def import_factors(self, wte_npy, scale_npz=None):
        """Read files as the descendant does: the scale matrices transposed, the head tied."""
        self.transformer.wte = nn.Embedding.from_pretrained(torch.from_numpy(np.load(wte_npy)))
        self.lm_head.weight = self.transformer.wte.weight
        if scale_npz is not None:
            arrays = np.load(scale_npz)
            for name in ("scale_up", "scale_down"):
                self.transformer[name].weight.copy_(torch.from_numpy(arrays[name]).T)


def checkpoint(net, options, path: Path, **more) -> Path:
    optimizer = torch.optim.AdamW(net.parameters()).state_dict()
    content = {"model": net.state_dict(), "model_args": options, "optimizer": optimizer, "iter_num": 7}
    torch.save(content | {"best_val_loss": torch.tensor(3.2), "config": {"dataset": "x"}} | more, path)
    return path


def assert_same_logits(model, net, ids):
    with torch.no_grad():
        logits, expected = model(ids).logits, net(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def one_line(error) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
