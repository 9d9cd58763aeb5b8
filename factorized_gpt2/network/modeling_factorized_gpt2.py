"""GPT-2 with a factorized token embedding and head.

Shapes in comments: B batch, T tokens, V vocabulary, d `n_embd`, k `n_embd_wte`, H heads, D = d / H.
"""

import copy
import math
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import GenerationMixin, GPT2PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .blockwise_loss import RowLoss, causal_lm_loss, sum_row_loss
from .coded_vocabulary import CodedEmbedding, CodedHead
from .configuration_factorized_gpt2 import FactorizedGPT2Config
from .head import FactorizedHead, bare, share_matrix
from .stored_vocabulary import StoresVocabulary


def residual_init_std(config: FactorizedGPT2Config) -> float:
    """Spread of a projection into the residual stream, to which each block adds two terms (Radford et al., 2019)."""
    return config.initializer_range / math.sqrt(2 * config.n_layer)


def scale_init_std(config: FactorizedGPT2Config) -> float:
    """Spread of a scale matrix: `wte @ scale_up` and `scale_down @ lm_head` then start as GPT-2's matrices do."""
    return config.embedding_size**-0.5


def _start_at(linear: nn.Linear, std: float) -> None:
    """Say how spread a weight starts, on its own module: for one without weights transformers initializes nothing."""
    linear.init_std = std  # type: ignore[assignment]  # torch's stub knows tensors and modules as attributes alone


class FactorizedGPT2Attention(nn.Module):
    """Causal self-attention with one projection per role, so that adapters can target each."""

    def __init__(self, config: FactorizedGPT2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.is_causal = True
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        _start_at(self.c_proj, residual_init_std(config))
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        per_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(per_head).transpose(1, 2)  # [B, H, T, D]
        key = self.k_proj(hidden_states).view(per_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        settings = dict(scaling=self.scaling, dropout=self.config.attn_pdrop if self.training else 0.0, **kwargs)
        if self.config.reorder_and_upcast_attn:
            with maybe_autocast(query.device.type, enabled=False):
                context, weights = attend(self, query.float(), key.float(), value.float(), attention_mask, **settings)
            context = context.to(value.dtype)
        else:
            context, weights = attend(self, query, key, value, attention_mask, **settings)  # [B, T, H, D]

        context = context.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.resid_dropout(self.c_proj(context)), weights


class FactorizedGPT2MLP(nn.Module):
    """Two-layer feed-forward network, `n_inner` (by default 4 d) wide."""

    def __init__(self, config: FactorizedGPT2Config):
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.mlp_up = nn.Linear(config.n_embd, inner)
        self.mlp_down = nn.Linear(inner, config.n_embd)
        _start_at(self.mlp_down, residual_init_std(config))
        # One kernel for the function that transformers spells out under the name of gelu_new.
        fused = {"gelu_new": "gelu_pytorch_tanh"}
        self.act = ACT2FN[fused.get(config.activation_function, config.activation_function)]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.mlp_down(self.act(self.mlp_up(hidden_states))))


class FactorizedGPT2Block(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: FactorizedGPT2Config, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = FactorizedGPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = FactorizedGPT2MLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class FactorizedGPT2PreTrainedModel(StoresVocabulary, GPT2PreTrainedModel):
    """Weight initialisation and the loading interface, shared by the trunk and the language model."""

    if TYPE_CHECKING:
        to = nn.Module.to  # type: ignore[assignment]  # transformers wraps it in a wrong signature

    config: FactorizedGPT2Config
    config_class = FactorizedGPT2Config
    _no_split_modules = ["FactorizedGPT2Block"]
    _keys_to_ignore_on_load_unexpected: list[str] | None = None
    _can_record_outputs = {
        "hidden_states": FactorizedGPT2Block,
        "attentions": OutputRecorder(FactorizedGPT2Attention, layer_name=".attn", index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CodedEmbedding):
            module.start_at_random(self.config.initializer_range)
        std = getattr(module, "init_std", None)
        if std is not None:
            init.normal_(getattr(module, "weight", None), mean=0.0, std=std)

    def _vocabulary_shape(self) -> tuple[int, int, int]:
        return self.config.vocab_size, self.config.embedding_size, self.config.n_embd


class FactorizedGPT2Model(FactorizedGPT2PreTrainedModel):
    """The trunk: token ids (B, T) to final hidden states (B, T, d).

    `wte` looks up k numbers a token, `scale_up` leads them to width d, learned positions are added, `n_layer` blocks
    and a final LayerNorm follow.
    """

    # Heads of a language model that share the matrix of `wte`. In a tuple they are no modules of the trunk.
    tied_heads: tuple[nn.Module, ...] = ()

    def __init__(self, config: FactorizedGPT2Config):
        super().__init__(config)
        embedding = CodedEmbedding if config.is_coded else nn.Embedding
        self.wte = embedding(config.vocab_size, config.embedding_size)
        self.scale_up = None
        if config.is_factorized:
            self.scale_up = nn.Linear(config.embedding_size, config.n_embd, bias=config.scale_up_bias)
            _start_at(self.scale_up, scale_init_std(config))
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(FactorizedGPT2Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.wte = cast(nn.Embedding, new_embeddings)

    def __setattr__(self, name: str, value) -> None:
        """Set an attribute; what is put in the place of `wte` gives its matrix to the head that is tied to it.

        PEFT merges a trained copy of an embedding by such an assignment, and takes a model whose head has another
        matrix then for untied.
        """
        super().__setattr__(name, value)
        if name != "wte" or not self.config.tie_word_embeddings or not isinstance(value, nn.Embedding):
            return
        for head in self.tied_heads:
            share_matrix(value, head)

    def _to_hidden_width(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds if self.scale_up is None else self.scale_up(embeds)  # [B, T, k] -> [B, T, d]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Compute the final hidden states.

        Args:
            input_ids: (B, T) int64 token ids; either these or `inputs_embeds`.
            past_key_values: Cache of the keys and values of earlier tokens.
            attention_mask: (B, T_past + T), 0 where padding; or a ready 4-dimensional mask. Leave it out where there
                is no padding: attention then takes its fast causal path.
            token_type_ids: (B, T) int64; as in GPT-2, looked up in `wte` and added.
            position_ids: (B, T) int64; by default counted on from the cache.
            inputs_embeds: (B, T, k) floats, what `get_input_embeddings()` yields; `scale_up` comes after (the
                convention of ALBERT).
            use_cache: Whether to return `past_key_values`.
            **kwargs: `output_attentions`, `output_hidden_states`, `return_dict` and the attention functions' own.

        Returns:
            `last_hidden_state` (B, T, d), and what was asked for beside it.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; states of an encoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You have to specify either input_ids or inputs_embeds, and not both.")
        if kwargs.get("encoder_hidden_states") is not None:
            raise ValueError("encoder_hidden_states were passed, but FactorizedGPT2 has no cross-attention.")
        past_key_values = kwargs.pop("cache", past_key_values)  # as transformers calls it from 5.24 on
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)

        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = cast(torch.LongTensor, positions.unsqueeze(0))

        hidden_states = self._to_hidden_width(inputs_embeds)
        hidden_states = hidden_states + self.wpe(position_ids).to(hidden_states.device)
        if token_type_ids is not None:
            hidden_states = hidden_states + self._to_hidden_width(self.wte(token_type_ids))
        hidden_states = self.drop(hidden_states)

        causal_mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values, position_ids)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class FactorizedGPT2(FactorizedHead, FactorizedGPT2PreTrainedModel, GenerationMixin):
    """Causal language model: the trunk, then `scale_down` (d, k) and `lm_head` (k, V).

    As in GPT-2 the head shares its matrix with `wte` (`tie_word_embeddings`, the default). The tie holds for adapters
    too: when one is attached to `wte` (LoRA, DoRA, a trained copy, ...), the tied head multiplies by the adapted
    matrix, so that merging the adapter changes nothing and costs nothing. Untied, an adapter on `wte` acts on the
    input alone.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    loss_backend = "blockwise"  # of `blockwise_loss.sum_cross_entropy`

    def __init__(self, config: FactorizedGPT2Config):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.transformer = FactorizedGPT2Model(config)
        self.scale_down = nn.Linear(config.n_embd, config.embedding_size, bias=False) if config.is_factorized else None
        if config.is_factorized:
            _start_at(self.scale_down, scale_init_std(config))
        if config.is_coded:
            self._tied_weights_keys = {f"lm_head.{name}": f"transformer.wte.{name}" for name in ("codes", "steps")}
            self.lm_head = CodedHead(config.vocab_size, config.embedding_size, config.lm_head_bias)
        else:
            self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def tie_weights(self, *args, **kwargs) -> None:
        """Tie the head to `wte` where the config says so, and to what is put in the place of `wte` from then on."""
        super().tie_weights(*args, **kwargs)
        self.transformer.tied_heads = (self.lm_head,)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> "FactorizedGPT2":
        """Return the same network with a vocabulary of floats, which can be adapted, trained and resized.

        Where k is smaller than d it has a `wte` of k columns. Else it is unfactorized, with a head of its own.

        Args:
            dtype: Of all weights; `None`: as they are.

        Returns:
            A new model in evaluation mode; this one is not changed.

        Raises:
            ValueError: The vocabulary already consists of floats.
        """
        if not self.config.is_coded:
            raise ValueError("The vocabulary already consists of floats.")
        config, state = copy.deepcopy(self.config), dict(self.state_dict())
        config.vocabulary_dtype = None
        wte = head = cast(CodedEmbedding, self.transformer.wte).dense()
        for name in ("transformer.wte.codes", "transformer.wte.steps", "lm_head.codes", "lm_head.steps"):
            del state[name]
        if config.n_embd_wte >= config.n_embd:
            config.n_embd_wte, config.tie_word_embeddings = None, False
            head = wte @ state.pop("scale_down.weight")
            wte = wte @ state.pop("transformer.scale_up.weight").T + state.pop("transformer.scale_up.bias")
        state |= {"transformer.wte.weight": wte, "lm_head.weight": head}
        with torch.device("meta"):
            model = type(self)(config)
        model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in state.items()}, assign=True)
        model.tie_weights()
        model.generation_config = copy.deepcopy(self.generation_config)
        return model.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        row_loss: RowLoss | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute logits or, given labels, the loss, or both. Arguments not listed are those of the trunk.

        Args:
            labels: (B, T) int64, shifted inside the model: `labels=input_ids` trains next-token prediction. -100 is
                ignored.
            logits_to_keep: 0 for all positions, n for the last n, or a tensor of positions.
            skip_logits: Whether to compute the loss alone, a block of rows at a time, and return no logits. By
                default so in training mode with labels, unless `loss_function` was replaced or `loss_backend` is
                "logits".
            row_loss: A loss of logits instead of the labels' cross-entropy, summed over all rows, neither shifted nor
                divided; implies `skip_logits`.
            **kwargs: `num_items_in_batch` divides the summed loss (instead of the batch's own count); `shift_labels`
                are labels that are shifted already; the rest goes to the trunk.

        Returns:
            `loss` (scalar, float32, in nats) when labels are given, `logits` (B, T, V) unless skipped, and what was
            asked for.

        Raises:
            ValueError: `skip_logits` without anything to compute a loss of.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if skip_logits is None:
            has_logits = self.loss_backend == "logits" or self.loss_function is not ForCausalLMLoss
            skip_logits = self.training and labels is not None and not has_logits
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept, :]
        loss = logits = None
        if skip_logits or row_loss is not None:
            if labels is None and row_loss is None:
                raise ValueError("skip_logits leaves nothing to return without labels or row_loss.")
            inputs, head = self.to_head_width(hidden_states), bare(self.head_or_matrix())
            if row_loss is not None:
                loss = sum_row_loss(inputs.flatten(0, -2), head, row_loss)
            else:
                loss = causal_lm_loss(inputs, head, labels, backend=self.loss_backend, **kwargs)
        else:
            logits = self.compute_logits(hidden_states)
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["FactorizedGPT2", "FactorizedGPT2Model", "FactorizedGPT2PreTrainedModel"]
