"""The Trainer: how a step's loss and an evaluation's loss are computed."""

import copy
import logging
import math
import time
from functools import cached_property
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, Dataset
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..common.errors import UserError
from ..network.modeling_factorized_causal_lm import FactorizedCausalLM
from ..network.modeling_factorized_gpt2 import FactorizedGPT2
from ..text.blocks import some_of
from ..text.loss import LossSum, perplexity, sum_loss
from .checkpoints import CheckpointingTrainer
from .distillation import Distillation
from .health import TrainingHealth

logger = logging.getLogger(__name__)


class FactorizedTrainer(CheckpointingTrainer):
    """`Trainer` whose evaluation loss is the mean over all tokens of the split, whatever batch or world size.

    Args:
        distillation: A teacher that gives a part of the training loss, moved to the device in float32; it computes in
            the precision that the model trains in. `None` trains on the text alone.
            `evaluation_seconds` sums the wall-clock time of evaluations.
        **kwargs: What `Trainer` takes.

    Raises:
        UserError: Distillation in one process with several GPUs; later, training that goes wrong (`TrainingHealth`).
    """

    def __init__(self, distillation: Distillation | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if distillation is not None and self.args.n_gpu > 1:
            # DataParallel would split the student's batch, not the teacher's.
            raise UserError("Distillation on several GPUs needs a process for each: accelerate launch.")
        # Sharding replaces a model's parameters for good; this one stays as it was built.
        self._whole: Any = copy.deepcopy(self.model).cpu() if self.is_fsdp_enabled else None
        self._compile_blocks()
        self._health = TrainingHealth(self.args.output_dir, self.model.config.vocab_size)
        self.add_callback(self._health)
        self.evaluation_seconds = 0.0
        self.distillation = distillation
        if distillation is not None:
            nn.Module.to(distillation.teacher, self.args.device, torch.float32)

    def _compile_blocks(self) -> None:
        """Compile block by block, in place, instead of the model as a whole.

        Compiled as a whole, attention gets a mask and loses its fast causal path; and every block compiles the same.
        """
        args = self.args
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        if args.torch_compile and args.n_gpu > 1:
            # DataParallel copies a block to every GPU, and what was compiled stays with the first one's weights.
            logger.warning(
                "One process with %d GPUs cannot compile, and trains more slowly: accelerate launch starts a process "
                "for each.",
                args.n_gpu,
            )
        elif args.torch_compile:
            for block in self._blocks():
                block.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)

    def _blocks(self) -> list[GradientCheckpointingLayer]:
        """List the layers of the decoder, which transformers makes of this class whatever the architecture."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def trained_model(self) -> FactorizedGPT2 | FactorizedCausalLM | PeftModel:
        """Take the trained model out of what trains it: whole, in float32, on every process. All must call it."""
        if self._whole is None:
            for block in self._blocks():  # whoever uses the model may have other shapes, and compile it for them
                block._compiled_call_impl = None
            # Under mixed precision the forward pass is wrapped in autocast.
            return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self._whole.load_state_dict(get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True)))
        return self._whole

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Mix the divergence from the teacher into the loss, each a mean over the tokens of the whole batch."""
        if self.distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():  # which the model's own forward pass enters by itself
            row_loss = self.distillation.row_loss(inputs["input_ids"], inputs["labels"])
        outputs = model(input_ids=inputs["input_ids"], row_loss=row_loss)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = outputs["loss"] * processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does; of a checkpoint, pickles that hold more than plain values are refused.

        Raises:
            UserError: The checkpoint is not one that a run has written.
        """
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except (UnpicklingError, RecursionError) as error:
            if resume_from_checkpoint is None:
                raise
            raise UserError(
                f"{resume_from_checkpoint} holds what no run has written and what could do anything; it was not "
                "loaded. Remove that folder, and the run goes on from the checkpoint before."
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Leave out of what a checkpoint lacks the weights that are tied to others, and so were not saved."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *args: Any, **kwargs: Any
    ) -> None:
        """See that a step went well before it is logged, evaluated or saved."""
        self._health.check_step(self, tr_loss, grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    @cached_property
    def _parameters_but_embeddings(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Estimate as `Trainer` does, with the parameters counted once and not in every step."""
        return 6 * inputs["input_ids"].numel() * self._parameters_but_embeddings

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Hand over the blocks as they are: `evaluation_loop` shares and batches them itself.

        What an accelerator prepares, a loader for every evaluation, it keeps until the end.
        """
        chosen: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(self.eval_dataset[chosen] if isinstance(chosen, str) else chosen)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ) -> EvalLoopOutput:
        """Sum each process's share of the blocks, then add the shares.

        Processes among which the model is sharded compute together, so all shares are made equally long.
        """
        began = time.perf_counter()
        blocks: Any = dataloader.dataset  # as `get_eval_dataloader` handed them over
        rank, world_size = self.args.process_index, self.args.world_size
        own = range(rank, len(blocks), world_size)
        missing = math.ceil(len(blocks) / world_size) - len(own)
        local = sum_loss(
            self.model,
            some_of(blocks, [*own, *[0] * missing]),
            self.args.eval_batch_size,
            device=self.args.device,
            context=self.compute_loss_context_manager,
            desc=None if self.args.disable_tqdm or not self.is_local_process_zero() else description,
            counted=len(own),
        )
        # MPS has no float64, and no second process to add to.
        at = "cpu" if self.args.device.type == "mps" else self.args.device
        totals = torch.tensor([local.nats, local.tokens], dtype=torch.float64, device=at)
        nats, tokens = self.accelerator.reduce(totals, "sum").tolist()
        self.evaluation_seconds += time.perf_counter() - began
        total = LossSum(nats, int(tokens))
        self._health.check_evaluation(total.loss, self.state.global_step)
        metrics = {f"{metric_key_prefix}_loss": total.loss, f"{metric_key_prefix}_perplexity": perplexity(total.loss)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(blocks))
