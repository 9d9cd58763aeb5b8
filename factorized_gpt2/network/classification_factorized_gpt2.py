"""Classification of texts on the trunk of a GPT-2 with a factorized vocabulary."""

from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

from .modeling_factorized_gpt2 import FactorizedGPT2Model, FactorizedGPT2PreTrainedModel


class FactorizedGPT2ForSequenceClassification(GenericForSequenceClassification, FactorizedGPT2PreTrainedModel):
    """The trunk, and `score` (d, `num_labels`) on the hidden state of each text's last token that is not padding.

    It loads from a language model's folder: the trunk is taken over, `scale_down` and `lm_head` stay behind, `score`
    starts at random. The number of labels and the kind of loss (`problem_type`) are the configuration's, as for every
    classifier of transformers. A batch of several texts needs `pad_token_id` in the configuration.
    """

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = [r"^scale_down\.", r"^lm_head\."]

    def __init__(self, config):
        # The generic class would look its trunk up by the configuration, among classes that are registered.
        FactorizedGPT2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = FactorizedGPT2Model(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


__all__ = ["FactorizedGPT2ForSequenceClassification"]
