"""Any causal decoder of transformers with a factorized token embedding and head.

The decoder is built by transformers; of its modules, the embedding and the head alone are replaced. Shapes in
comments: B batch, T tokens, V vocabulary, d width of the embedding, k `n_embd_wte`.
"""

import copy
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .blockwise_loss import RowLoss, causal_lm_loss, sum_row_loss
from .coded_vocabulary import CodedEmbedding, CodedHead
from .configuration_factorized_causal_lm import FactorizedCausalLMConfig
from .decoder_slots import EmbeddingSlot, HeadSlot, Slot, vocabulary_of
from .head import FactorizedHead, bare, share_matrix
from .stored_vocabulary import StoresVocabulary


class FactorizedCausalLM(FactorizedHead, StoresVocabulary, PreTrainedModel, GenerationMixin):
    """A causal language model: `wte` (V, k), `scale_up` (k, d), a decoder, `scale_down` (d, k) and `lm_head` (k, V).

    `model` is the decoder as transformers builds it, without its vocabulary's matrices: what it does before its head
    or after (a scale of embeddings or logits, a cap) it does here too. Where the head is tied, `lm_head` shares the
    matrix of `wte`, and follows adapters on it, as in `FactorizedGPT2`.
    """

    config: FactorizedCausalLMConfig
    config_class = FactorizedCausalLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True  # `model` decides
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}

    if TYPE_CHECKING:
        to = nn.Module.to  # type: ignore[assignment]  # transformers wraps it in a wrong signature

    loss_backend = "blockwise"  # of `blockwise_loss.sum_cross_entropy`

    def __init__(self, config: FactorizedCausalLMConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        base = config.get_text_config()
        base.tie_word_embeddings = False  # it has nothing to tie
        self.model = AutoModelForCausalLM.from_config(base)
        self.model.loss_type = getattr(self.model, "loss_type", None) or "ForCausalLM"
        embedding, _, self.embed_scale = vocabulary_of(self.model)
        (vocab_size, width), rank = embedding.weight.shape, config.n_embd_wte
        self.model.set_input_embeddings(EmbeddingSlot(self))
        self.model.set_output_embeddings(HeadSlot(self))
        self._take_slots_from_plans()
        self.wte = (CodedEmbedding if config.is_coded else nn.Embedding)(vocab_size, rank)
        self.scale_up = nn.Linear(rank, width, bias=config.scale_up_bias)
        self.scale_down = nn.Linear(width, rank, bias=False)
        if config.is_coded:
            self._tied_weights_keys = {f"lm_head.{name}": f"wte.{name}" for name in ("codes", "steps")}
            self.lm_head = CodedHead(vocab_size, rank, config.lm_head_bias)
        else:
            self.lm_head = nn.Linear(rank, vocab_size, bias=config.lm_head_bias)
        # Whether the decoder divides its loss by what `Trainer` counts.
        takes = inspect.signature(self.model.forward).parameters.values()
        self.accepts_loss_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)
        self.post_init()

    def _take_slots_from_plans(self) -> None:
        """Have the decoder neither tie nor shard what it has no longer: every device holds the vocabulary whole."""
        slots = {name for name, module in self.model.named_modules() if isinstance(module, Slot)}
        self.model._tied_weights_keys = None
        plan = getattr(self.model, "_tp_plan", None) or {}
        self.model._tp_plan = {name: way for name, way in plan.items() if name not in slots}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, CodedEmbedding):
            module.start_at_random(std)
        elif isinstance(module, nn.Embedding | nn.Linear):
            scales = module in (self.scale_up, self.scale_down)
            init.normal_(module.weight, mean=0.0, std=self.config.n_embd_wte**-0.5 if scales else std)
            bias = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what is put in the place of `wte`, as PEFT does, gives its matrix to a tied head."""
        super().__setattr__(name, value)
        head = self._modules.get("lm_head") if name == "wte" else None
        if head is not None and self.config.tie_word_embeddings and isinstance(value, nn.Embedding):
            share_matrix(value, head)

    def _vocabulary_shape(self) -> tuple[int, int, int]:
        vocab_size, rank = cast(CodedEmbedding, self.wte).codes.shape
        return vocab_size, rank, self.scale_up.out_features

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        """Return what makes final hidden states (B, T, d) of token ids (B, T), or of `inputs_embeds` of width d."""
        return cast(PreTrainedModel, self.model).get_decoder()

    def to_hidden_width(self, embeds: torch.Tensor) -> torch.Tensor:
        """Lead (..., k) from `wte` to what the decoder takes for embeddings, (..., d)."""
        embeds = self.scale_up(embeds)
        return embeds if self.embed_scale == 1 else embeds * torch.tensor(self.embed_scale, dtype=embeds.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> "FactorizedCausalLM":
        """Return the same network with a vocabulary of floats, which can be adapted, trained and resized.

        Args:
            dtype: Of all weights; `None`: as they are.

        Returns:
            A new model in evaluation mode; this one is not changed.

        Raises:
            ValueError: The vocabulary already consists of floats.
        """
        if not self.config.is_coded:
            raise ValueError("The vocabulary already consists of floats.")
        model, config = copy.deepcopy(self), copy.deepcopy(self.config)
        config.vocabulary_dtype = None
        state = {
            name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".codes", ".steps"))
        }
        state["wte.weight"] = state["lm_head.weight"] = cast(CodedEmbedding, self.wte).dense()
        made = type(self).from_pretrained(None, config=config, state_dict=state, dtype=dtype or self.dtype)
        made.generation_config = copy.deepcopy(self.generation_config)
        return made.to(self.device).eval()

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        skip_logits: bool | None = None,
        row_loss: RowLoss | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits or, given labels, the loss, or both. Arguments not listed are those of the decoder.

        Args:
            inputs_embeds: (B, T, k) floats, what `get_input_embeddings()` yields.
            labels: (B, T) int64, shifted inside the model. -100 is ignored.
            use_cache: Whether to return `past_key_values`; by default what `config` says.
            skip_logits: Whether to compute the loss alone, a block of rows at a time, and return no logits. By
                default so in training mode with labels, unless the decoder has another loss or `loss_backend` is
                "logits". Where the decoder scales or caps its logits, they are there as a whole all the same.
            row_loss: As `FactorizedGPT2` takes it; implies `skip_logits`.

        Returns:
            `loss` (scalar, float32, in nats) when labels are given, `logits` (B, T, V) unless skipped, and what was
            asked for.

        Raises:
            ValueError: `skip_logits` without anything to compute a loss of.
        """
        head = self._claim_slots()
        if inputs_embeds is not None:
            inputs_embeds = self.to_hidden_width(inputs_embeds)
        use_cache = getattr(self.config, "use_cache", None) if use_cache is None else use_cache
        named: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        named |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        named |= {"logits_to_keep": logits_to_keep, "return_dict": True}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        if skip_logits is None:
            own_loss = self.model.loss_function is not ForCausalLMLoss or getattr(
                self.config, "output_router_logits", False
            )
            skip_logits = self.training and labels is not None and self.loss_backend != "logits" and not own_loss
        if row_loss is None and not skip_logits:
            return self.model(**kwargs) if labels is None else self.model(labels=labels, **kwargs)
        if labels is None and row_loss is None:
            raise ValueError("skip_logits leaves nothing to return without labels or row_loss.")
        of_loss = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs, inputs, matrix = self._before_head(head, kwargs)
        if row_loss is not None:
            loss = sum_row_loss(inputs.flatten(0, -2), matrix, row_loss)
        else:
            loss = causal_lm_loss(inputs, matrix, labels, backend=self.loss_backend, **of_loss)
        rest = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, **rest)

    def _claim_slots(self) -> HeadSlot:
        """Have the decoder's slots ask this model, which `nn.DataParallel` may have copied."""
        head = self.model.get_output_embeddings()
        for slot in (self.model.get_input_embeddings(), head):
            if slot.owner[0] is not self:
                slot.owner = (self,)
        return head

    def _before_head(self, head: HeadSlot, kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor, Any]:
        """Run the decoder: its outputs, and inputs and head of which the product is its logits."""
        if head.is_last is not False:
            head.states = []
            try:
                outputs = self.model(**kwargs)
                head.is_last = outputs.logits is head.states[0]
            finally:
                head.states = None
            if head.is_last:
                return outputs, outputs.logits, bare(self.head_or_matrix())
        outputs = self.model(**kwargs)
        return outputs, outputs.logits, nn.Identity()


__all__ = ["FactorizedCausalLM"]
