"""The lm-eval model whose log-likelihoods come from a server, as log-probabilities of prompts.

Requests and tokens are those of PrefixLM, so a task is the same at every backend. Prefixes are not
shared: the server computes each request whole.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.lm_tasks.prefix_model import PrefixLM
from ebbline.tasks.measuring.prefix_lm import Plan
from ebbline.tasks.measuring.served.server import server_for
from ebbline.tasks.measuring.served.stream import streamed
from ebbline.tasks.measuring.served.wanted import Wanted, longest
from ebbline.tasks.specs import TRANSFORMERS, EvaluateSpec
from ebbline.tasks.stage import Context


class ServedLM(PrefixLM):
    """lm-eval's HFLM without weights: its tokenizer and its config alone are read."""

    def __init__(
        self,
        spec: EvaluateSpec,
        model: Path,
        adapter: Path | None,
        tokenizer: Any,
        ctx: Context,
    ) -> None:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        super().__init__(
            pretrained=SimpleNamespace(config=config, device=torch.device("cpu")),
            tokenizer=tokenizer,
            batch_size=spec.batch_size,
            backend="causal",
        )
        self._spec, self._folder, self._adapter, self._ctx = spec, model, adapter, ctx

    @property
    def shares_prefixes(self) -> bool:
        return True  # every request is one of a plan

    def score(
        self, work: Plan, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives this continuation) of every request.

        Raises EndpointDown for a server that does not answer, ModelError for an adapter that it
        does not load.
        """
        requests = _requests(work)
        tokens = 1 + max(len(context) + len(more) for context, more in requests.values())
        most = longest(self._folder)
        if most is not None and tokens > most:
            raise EvaluationError(
                f"an item takes {tokens} tokens, and a server gives this model at most {most}; "
                f"lower `shots`, or use the backend {TRANSFORMERS}"
            )
        adapters = [] if self._adapter is None else [self._adapter]
        server = server_for(Wanted.by(self._spec, self._folder, tokens, adapters), self._ctx)
        name, ask = server.name_of(self._adapter), server.client.log_likelihood
        answers: dict[int, tuple[float, bool]] = {}
        for index, answer in streamed(
            requests,
            lambda index: partial(ask, name, *requests[index]),
            server.at_once,
            self._ctx.leaving,
        ):
            answers[index] = answer
            progress(len(answers), work.requests)
        return [answers[index] for index in range(work.requests)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise EvaluationError(
            "the lm-eval task generates text, which is measured with the backend "
            f"{TRANSFORMERS} only"
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise EvaluationError(
            f"the lm-eval task scores whole texts, which is measured with the backend "
            f"{TRANSFORMERS} only"
        )


def _requests(work: Plan) -> dict[int, tuple[list[int], list[int]]]:
    """Index -> (context, continuation) in tokens, of every request of a plan. A row of a plan ends
    before the last token of its continuation.
    """
    found: dict[int, tuple[list[int], list[int]]] = {}
    for group in work.groups:
        for row in group.rows:
            tokens = [*group.prefix.tolist(), *row.tokens.tolist()]
            for index, continuation in row.requests:
                context = tokens[: len(tokens) - len(continuation) + 1]
                found[index] = context, continuation
    return found
