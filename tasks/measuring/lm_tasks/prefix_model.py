"""The lm-eval model whose log-likelihoods come from ebbline.tasks.measuring.prefix_lm, and whose
chat text and greedy completions are ebbline's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria

from ebbline.tasks.chat.probes import probe
from ebbline.tasks.data.batches import even_threads, whole_batches
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.prefix_lm import Encoded, PrefixScorer, plan
from ebbline.tasks.models.decoding import end_tokens, only
from ebbline.tasks.specs import Decoding

# Settings that only sampling reads; `do_sample` is looked at by itself.
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"}


class PrefixLM(PrefixScorer, HFLM):  # type: ignore[misc]
    """lm-eval's HFLM with shared prefixes."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """lm-eval's chat text. Raises EvaluationError for turns that the template does not support;
        lm-eval itself would leave out the system turn.
        """
        facts = probe(self.tokenizer)
        roles = [turn["role"] for turn in chat_history]
        if "system" in roles and not facts.system:
            raise EvaluationError(
                "the task's description is a system turn, which the model's chat template does "
                "not support; measure without `chat_template`"
            )
        if "assistant" in roles and not facts.turns:
            raise EvaluationError(
                "the shots are several turns, which the model's chat template does not support; "
                "set `shots` to 0, or measure without `chat_template`"
            )
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        return text

    def encode(self, context: str, continuation: str) -> Encoded:
        """The tokens that lm-eval scores for this pair."""
        if context:
            return ((context, continuation), *self._encode_pair(context, continuation))
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        split = (
            ([self.prefix_token_id], tokens)
            if tokens[:1] != [self.prefix_token_id]
            else (tokens[:1], tokens[1:])
        )
        return ((context, continuation), *split)

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self.shares_prefixes:
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return answers
        return self.score(plan(requests, self.max_length))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Any:
        """Greedy completions until one of the texts `stop`, for lm-eval's `generate_until`.

        Raises EvaluationError for a task that asks for another decoding.
        """
        mask = settings.pop("attention_mask")
        require_greedy(settings)
        until = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        ends = end_tokens(self.model.generation_config, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        with (
            only(self.model, Decoding(), ends, pad, max_length=max_length) as greedy,
            even_threads(),
            whole_batches(len(context)),
        ):
            return self.model.generate(
                input_ids=context,
                attention_mask=mask,
                stopping_criteria=until,
                generation_config=greedy,
            )


def require_greedy(settings: Mapping[str, Any]) -> None:
    """Raise EvaluationError if a task's generation settings are not those of greedy decoding.

    Settings of sampling (temperature, top_p) mean nothing where nothing is sampled.
    """
    stated = Decoding().model_dump()
    samples = settings.get("do_sample") or (
        settings.get("temperature") and settings.get("do_sample") is None
    )
    other = {
        name: value
        for name, value in settings.items()
        if name not in SAMPLING and (name not in stated or value not in (None, stated[name]))
    }
    if samples or other:
        named = sorted({*other, *(["do_sample"] if samples else [])})
        raise EvaluationError(
            f"the lm-eval task sets {', '.join(named)} in `generation_kwargs`; ebbline decodes "
            "greedily. Remove these settings from the task"
        )
