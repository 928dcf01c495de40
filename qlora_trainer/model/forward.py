"""The reference path: unmodified transformers, PEFT and bitsandbytes modules give a batch its loss.

In: a model and a `Batch`. Out: `TokenNll`, the cross-entropy of each supervised token, of which an objective
makes the loss. The LM head runs on supervised positions only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_trainer.data.batch import IGNORE, Batch
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.layers import causal_of
from qlora_trainer.model.residual import base_alone


@dataclass(frozen=True)
class TokenNll:
    """Negative log-likelihoods of a micro-batch, in nats; positions that are only padding have weight 0.

    nll: float32 [S], differentiable in the adapter's parameters. weights: float32 [S], of the data.
    positions: int64 [S], of the predicting token among the B·T of the batch.
    """

    nll: Tensor
    weights: Tensor
    positions: Tensor


class Forward(Protocol):
    """A path through the model: the reference's or the fast one's."""

    def __call__(self, batch: Batch, adapters: bool = True) -> TokenNll:
        """adapters=False: of the base alone, without gradients."""
        ...


class ReferenceForward:
    """A `Forward` by the model's own modules.

    Attention between packed documents is isolated in one of two ways, whichever the architecture
    honours: most of transformers sees restarting `position_ids` and masks (every attention kernel
    and sliding window included); the rest takes an explicit block-diagonal mask.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._explicit_mask: bool | None = None  # not known before the first packed batch

    def __call__(self, batch: Batch, adapters: bool = True) -> TokenNll:
        if adapters:
            return self._nll(batch)
        with torch.no_grad(), self.base_alone():
            return self._nll(batch)

    def base_alone(self) -> AbstractContextManager[None]:
        """Inside, the modules compute what the base did before anything was trained."""
        return base_alone(self.model)

    @property
    def begins_in_weights(self) -> bool:
        """Whether the adapters began as a part of the base's weights (PiSSA, OLoRA)."""
        return bool(getattr(self.model, "beginnings", None))

    def _nll(self, batch: Batch) -> TokenNll:
        targets = batch.labels[:, 1:]
        # Position t predicts t+1. Rows share one index, so that any architecture's own
        # `logits_to_keep` serves, soft-caps and scaled logits included.
        keep = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
        if keep.numel() == 0:
            nothing = torch.zeros(0, device=batch.input_ids.device)
            return TokenNll(nothing.clone().requires_grad_(), nothing, keep)
        logits = self.logits(batch, keep)
        nll = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets[:, keep].flatten(),
            reduction="none",
            ignore_index=IGNORE,
        )
        first = torch.arange(len(targets), device=keep.device)[:, None] * batch.labels.shape[1]
        return TokenNll(nll, batch.loss_weights[:, 1:][:, keep].flatten(), (first + keep).flatten())

    def logits(self, batch: Batch, keep: Tensor) -> Tensor:
        """Logits [B, len(keep), V] at the positions `keep` (int64 [n])."""
        inputs: dict[str, Tensor] = {"input_ids": batch.input_ids}
        if batch.packed:
            inputs |= self._isolation(batch)
        logits: Tensor = self.model(**inputs, logits_to_keep=keep, use_cache=False).logits
        # an architecture that has no `logits_to_keep` gives all of them
        return logits if logits.shape[1] == keep.numel() else logits[:, keep]

    def check(self) -> list[str]:
        """Takes a step of two short rows through transformers' own code, before any is taken in earnest.

        Nothing of it stays: neither gradients nor random numbers drawn. Returns the names of trainable
        parameters that no token of a text reaches.

        Raises:
            ConfigError: that code fails in training, or a token sees those that come after it.
        """
        causal = causal_of(self.model)
        kind = causal.config.model_type
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        device = next(iter(trained.values())).device
        batch = _two_rows(causal.get_input_embeddings().weight.shape[0]).to(device)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self(batch).nll.sum().backward()
            sees_ahead = self._sees_ahead(batch.input_ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture's own code raises is about the architecture
            raise ConfigError(
                f"model type {kind} cannot be trained here: its own code in transformers fails on two rows "
                f"of {batch.input_ids.shape[1]} tokens: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        finally:
            reached = [name for name, p in trained.items() if p.grad is not None]
            for parameter in trained.values():
                parameter.grad = None
        if sees_ahead:
            encoder = getattr(causal.config, "is_decoder", None) is False
            hint = "; is_decoder=true in its config.json makes a decoder of it" if encoder else ""
            raise ConfigError(
                f"model type {kind} cannot be trained here: a token sees those after it, so each answer is "
                f"known before it is learned{hint}"
            )
        return [name for name in trained if name not in reached]

    @torch.no_grad()
    def _sees_ahead(self, ids: Tensor) -> bool:
        """Whether another last token changes what comes before it."""
        other, training = ids.clone(), self.model.training
        other[:, -1] = (other[:, -1] + 1) % 3
        self.model.eval()
        try:
            before, after = (self.model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, other))
        finally:
            self.model.train(training)
        # a mixture of experts rounds otherwise when other tokens share an expert
        rounding = 1e-5 if before.dtype == torch.float32 else 3e-2
        return bool((before - after).abs().max() > rounding * before.abs().max())

    def _isolation(self, batch: Batch) -> dict[str, Tensor]:
        if self._explicit_mask is None:
            self._explicit_mask = self._find_isolation(batch)
        inputs = {"position_ids": batch.position_ids}
        if self._explicit_mask:
            inputs["attention_mask"] = document_mask(batch.document_ids)
        return inputs

    @torch.no_grad()
    def _find_isolation(self, batch: Batch) -> bool:
        """Tries both ways on two short documents: the second must not notice the first's tokens."""
        device, training = batch.input_ids.device, self.model.training
        documents = torch.tensor([[0] * 4 + [1] * 4], dtype=torch.int32, device=device)
        positions = torch.tensor([[*range(4), *range(4)]], device=device)
        second = batch.input_ids[:1, :4]
        self.model.eval()
        try:
            for explicit in (False, True):
                inputs = {"position_ids": positions}
                if explicit:
                    inputs["attention_mask"] = document_mask(documents)
                first, other = (
                    self.model(input_ids=torch.cat((head, second), dim=1), use_cache=False, **inputs).logits[
                        :, 4:
                    ]
                    for head in (second, (second + 1) % 3)
                )
                if torch.equal(first, other):
                    return explicit
        finally:
            self.model.train(training)
        raise ConfigError(
            f"train.packing=true: {type(self.model).__name__} lets packed documents see each other; "
            "set train.packing=false (train.group_by_length=true keeps padding low)"
        )


def _two_rows(vocabulary: int) -> Batch:
    """Rows of 7 and 5 tokens, padded, all labelled."""
    ids = torch.arange(14).view(2, 7) % vocabulary
    documents = torch.zeros_like(ids, dtype=torch.int32)
    documents[1, 5:] = -1
    labels = ids.masked_fill(documents < 0, IGNORE)
    positions = torch.arange(7).expand(2, 7).contiguous()
    return Batch(ids, labels, (labels != IGNORE).float(), positions, documents, (0, 1))


def document_mask(document_ids: Tensor) -> Tensor:
    """bool [B, 1, T, T], true where query i may see key j: j <= i, same document.

    Padding (-1) forms a document of its own, so no row of the mask is empty.
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
