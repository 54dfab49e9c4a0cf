"""A score head on a vision-language model: a number a label for each sample, for classes and for regression.

transformers has no such class for these models. Upstream has one for Idefics2, which VideoScore was trained with (He et
al. 2024, https://arxiv.org/abs/2406.15252), and one for Qwen2-VL that reads each label at a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import (
    AutoModelForSequenceClassification,
    FuyuModel,
    FuyuPreTrainedModel,
    Idefics2Model,
    Idefics2PreTrainedModel,
    Idefics3Model,
    Idefics3PreTrainedModel,
    LlavaModel,
    LlavaPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2VLModel,
    Qwen2VLPreTrainedModel,
    Qwen3VLModel,
    Qwen3VLPreTrainedModel,
    SmolVLMModel,
    SmolVLMPreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import can_return_tuple

from ..data.encode import IGNORE
from ..data.labels import Labels
from .head_config import PROBLEMS


class Classifier(PreTrainedModel):
    """What the families' classes share: the backbone at `model`, one linear layer at `score`, how it reads and learns.

    Beside transformers' own `num_labels` and `problem_type` the config may hold `score_token_ids`, the token that each
    label is read at, in place of a sample's last; and `class_weights`, for the loss.
    """

    _backbone: type[PreTrainedModel]
    # Not in 4 bits either, whatever a quantiser is told to skip.
    _keep_in_fp32_modules = ("score",)
    # A generative checkpoint's; whatever else is left over is still told.
    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.weight$",)
    accepts_loss_kwargs = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self._backbone(config)
        # Never in 16 bits: loading, too, goes by the precision that a parameter is made in.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=True, dtype=dtype)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores of each sample of a pack, or of a padded batch, and their loss where there are labels.

        input_ids (1, T) with the boundaries cu_seq_lens_q (S + 1,) of its samples, or (S, T) with an attention_mask
        (S, T) where it is padded, on either side. Logits (S, L), in the head's precision. Labels and
        num_items_in_batch as in `score_loss`. Everything else is for the backbone.
        """
        # As in data/collate.py: with either of these the samples of a pack would see each other.
        assert cu_seq_lens_q is None or attention_mask is None, "a pack with an attention_mask"
        kwargs.setdefault("use_cache", False)
        if cu_seq_lens_q is not None:
            kwargs["cu_seq_lens_q"] = cu_seq_lens_q
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        with torch.autocast(out.last_hidden_state.device.type, enabled=False):
            logits = self._scores(out.last_hidden_state, input_ids, attention_mask, cu_seq_lens_q)
            loss = None
            if labels is not None:
                problem, weights = self.config.problem_type, getattr(self.config, "class_weights", None)
                loss = score_loss(logits, labels, problem, weights, num_items_in_batch)
        return SequenceClassifierOutput(loss, logits, out.hidden_states, out.attentions)

    def _scores(self, hidden: Tensor, ids: Tensor | None, mask: Tensor | None, bounds: Tensor | None) -> Tensor:
        """Logits (S, L) from the hidden states (B, T, H) of a pack, which has bounds, or of a padded batch."""
        rows, length = hidden.shape[:2]
        assert bounds is None or rows == 1, "a pack is one row"
        if bounds is None:
            bounds = torch.arange(0, rows * length + 1, length, device=hidden.device)
        hidden, dtype = hidden.flatten(0, 1), next(self.score.parameters()).dtype
        tokens = getattr(self.config, "score_token_ids", None)
        if tokens is None:
            return self.score(hidden[_last(bounds, mask)].to(dtype))
        assert ids is not None and len(tokens) == self.config.num_labels, "a token for each label"
        # Row i of the head reads where token i is: of each position's scores, its own.
        return self.score(hidden[_where(ids.flatten(), tokens, bounds)].to(dtype)).diagonal(dim1=1, dim2=2)


def score_loss(
    logits: Tensor,
    labels: Tensor,
    problem: str | None,
    class_weights: Sequence[float] | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """The loss of scores (S, L) in their precision, at least float32: a sum over known targets, divided by `count`.

    Regression: squared error, labels (S, L), or (S,) where L is 1. multi_label_classification: binary cross entropy,
    the same; a class weight counts a label's positives so often. single_label_classification: cross entropy, labels
    (S,) int64; a class weight counts a class's samples so often. Unknown are NaN among floats and -100 among integers:
    they add nothing, and without a known one the loss is 0. `count` is the number of known targets, samples with a
    single label, else samples times labels: here, or in all the batches of a step. So with class weights too: the sum
    is not divided by the weights, as torch's mean would. Raises ValueError for another problem.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = None if class_weights is None else logits.new_tensor(class_weights)
    known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE
    if problem == "single_label_classification":
        losses = cross_entropy(logits, labels, weight, reduction="none", ignore_index=IGNORE)
    elif problem in ("regression", "multi_label_classification"):
        known = known[:, None] if known.ndim == 1 else known
        assert known.shape == logits.shape, f"labels {tuple(labels.shape)} for scores {tuple(logits.shape)}"
        # Not multiplied by 0: NaN would stay NaN, and its gradient with it.
        targets = labels.view_as(logits).to(logits.dtype).where(known, 0.0)
        if problem == "regression":
            losses = mse_loss(logits, targets, reduction="none").where(known, 0.0)
        else:
            losses = binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
            losses = losses.where(known, 0.0)
    else:
        raise ValueError(f"config.problem_type is {problem}: state regression, single_label_ or multi_label_")
    count = known.sum() if count is None else torch.as_tensor(count, device=losses.device)
    return losses.sum() / count.clamp(min=1)


def _last(bounds: Tensor, mask: Tensor | None) -> Tensor:
    """The last position (S,) of each sample, all rows laid end to end; the mask (S, T) tells it from padding."""
    if mask is None:
        return bounds[1:] - 1
    order = torch.arange(mask.shape[1], device=mask.device)
    return bounds[:-1] + (order * mask.bool()).amax(1)


def _where(ids: Tensor, tokens: Sequence[int], bounds: Tensor) -> Tensor:
    """The position (S, L) of each of L tokens in each sample: each occurs there once."""
    bounds = bounds.to(ids.dtype)
    samples = torch.arange(len(bounds) - 1, device=ids.device)
    found = [(ids == token).nonzero()[:, 0] for token in tokens]
    for token, at in zip(tokens, found, strict=True):
        once = torch.equal(torch.searchsorted(bounds, at, right=True) - 1, samples)
        assert once, f"token {token} is not once in each sample"
    return torch.stack(found, dim=1)


class LlavaForSequenceClassification(Classifier, LlavaPreTrainedModel):
    """LLaVA with a score head."""

    _backbone = LlavaModel


class Idefics2ForSequenceClassification(Classifier, Idefics2PreTrainedModel):
    """Idefics2 with a score head: VideoScore's class, key by key."""

    _backbone = Idefics2Model


class FuyuForSequenceClassification(Classifier, FuyuPreTrainedModel):
    """Fuyu with a score head."""

    _backbone = FuyuModel


class Idefics3ForSequenceClassification(Classifier, Idefics3PreTrainedModel):
    """Idefics3 with a score head."""

    _backbone = Idefics3Model


class SmolVLMForSequenceClassification(Classifier, SmolVLMPreTrainedModel):
    """SmolVLM with a score head."""

    _backbone = SmolVLMModel


class Qwen2VLForSequenceClassification(Classifier, Qwen2VLPreTrainedModel):
    """Qwen2-VL with a score head."""

    _backbone = Qwen2VLModel


class Qwen2_5_VLForSequenceClassification(Classifier, Qwen2_5_VLPreTrainedModel):
    """Qwen2.5-VL with a score head."""

    _backbone = Qwen2_5_VLModel


class Qwen3VLForSequenceClassification(Classifier, Qwen3VLPreTrainedModel):
    """Qwen3-VL with a score head."""

    _backbone = Qwen3VLModel


CLASSIFIERS = (
    LlavaForSequenceClassification,
    Idefics2ForSequenceClassification,
    FuyuForSequenceClassification,
    Idefics3ForSequenceClassification,
    SmolVLMForSequenceClassification,
    Qwen2VLForSequenceClassification,
    Qwen2_5_VLForSequenceClassification,
    Qwen3VLForSequenceClassification,
)


def with_head(
    config: PreTrainedConfig,
    labels: Labels,
    class_weights: Sequence[float] | None = None,
    score_token_ids: Sequence[int] = (),
) -> PreTrainedConfig:
    """A copy of a config that states a head: its labels in order, what they are, what it reads and learns by."""
    made = deepcopy(config)
    made.architectures = [classifier_of(config).__name__]
    made.id2label = dict(enumerate(labels.names))
    made.label2id = {name: at for at, name in enumerate(labels.names)}
    made.problem_type = PROBLEMS[labels.problem]
    made.class_weights = None if class_weights is None else list(class_weights)
    made.score_token_ids = list(score_token_ids) or None
    return made


def classifier_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class with a score head for a config. Raises KeyError where its model_type has none."""
    return {classifier.config_class.model_type: classifier for classifier in CLASSIFIERS}[config.model_type]


def _register() -> None:
    """Make the classes known to AutoModelForSequenceClassification, and their families' published names to them.

    transformers translates those for its own classes alone, by the class's name or else by the kind of model.
    """
    for classifier in CLASSIFIERS:
        kind = classifier.config_class.model_type
        AutoModelForSequenceClassification.register(classifier.config_class, classifier, exist_ok=True)
        generative = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
        names = get_checkpoint_conversion_mapping(generative) or get_checkpoint_conversion_mapping(kind)
        if names:
            register_checkpoint_conversion_mapping(classifier.__name__, names, overwrite=True)


_register()
