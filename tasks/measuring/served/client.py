"""Requests to an OpenAI-compatible server: greedy completions and log-likelihoods of tokens.

Every setting that could change a token is stated in the request, also those that are vLLM's own.
Prompts are sent as tokens, so the server's chat template and tokenizer are not used.

Invariant: no failure becomes a completion, and no message quotes a prompt.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ebbline.tasks.errors import EndpointDown, EvaluationError, ModelError
from ebbline.tasks.measuring.served.place import KEY
from ebbline.tasks.specs import Decoding

TIMEOUT_S = 600.0  # of one request; a server works on all of them at once
SHORT_S = 30.0
_TOKEN_ID = re.compile(r"token_id:(\d+)")


@dataclass(frozen=True)
class Completed:
    """One greedy completion: its tokens, or its text where the server gives no tokens. `count` is
    the number of tokens; `ended` says whether an end token was the last one.
    """

    tokens: tuple[int, ...] | None
    text: str
    count: int
    ended: bool


def greedy(decoding: Decoding, max_new_tokens: int, ends: Sequence[int]) -> dict[str, Any]:
    """The request's settings for the decoding that a Spec states."""
    return {
        "n": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "seed": 0,
        "repetition_penalty": decoding.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "min_tokens": decoding.min_length,
        "max_tokens": max_new_tokens,
        "stop": None,
        "stop_token_ids": list(ends),
        "ignore_eos": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "echo": False,
        "stream": False,
        "return_token_ids": True,
    }


class Client:
    """The requests to one server. `url` ends before /v1; `failed` is called with the reason when a
    request gets no answer, and returns the error to raise.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        failed: Callable[[str], EvaluationError] | None = None,
    ) -> None:
        key = os.environ.get(KEY, "").strip() if key is None else key
        if not (key.isascii() and key.isprintable()):
            raise EvaluationError(
                f"the environment variable {KEY} holds characters that no key has"
            )
        self.url = url.removesuffix("/v1")
        self._failed = failed or self._down
        # A proxy of the environment must not see the requests to a server on this machine
        own_machine = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            timeout=httpx.Timeout(TIMEOUT_S, connect=SHORT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=not own_machine,
        )

    def close(self) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        """Whether the server answers. It has loaded its model before."""
        try:
            return self._http.get(f"{self.url}/v1/models", timeout=SHORT_S).status_code == 200
        except httpx.RequestError:
            return False

    def version(self) -> str | None:
        """The version that the server states; None if it states none. vLLM does at /version, SGLang
        and TGI with their other facts.
        """
        for path in ("/version", "/get_server_info", "/info"):
            response = self._send("GET", path, timeout_s=SHORT_S)
            found = _object(response).get("version") if response.status_code == 200 else None
            if isinstance(found, str):
                return found
        return None

    def models(self) -> dict[str, str]:
        """Name -> where the server read it from, of each model that the server has."""
        response = self._answered(self._send("GET", "/v1/models", timeout_s=SHORT_S), "its models")
        rows = _object(response).get("data")
        if not isinstance(rows, list):
            raise EvaluationError(
                f"{self.url}/v1/models is no list of models; is it the right URL?"
            )
        return {
            str(row["id"]): str(row.get("root") or "")
            for row in rows
            if isinstance(row, dict) and "id" in row
        }

    def load_adapter(self, name: str, folder: Path) -> None:
        """Let the server read an adapter. Raises ModelError if it does not."""
        body = {"lora_name": name, "lora_path": str(folder)}
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):  # vLLM's and SGLang's
            response = self._send("POST", path, body)
            if response.status_code not in (404, 405) or _reason(response):
                break
        if response.status_code == 200:
            return
        if response.status_code in (404, 405) and not _reason(response):
            raise ModelError(
                f"the server at {self.url} loads no adapters at run time. Start it with them "
                "allowed (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora), or use the "
                "backend transformers"
            )
        raise ModelError(
            f"the server at {self.url} does not load the adapter {folder} (HTTP "
            f"{response.status_code}: {_reason(response)[:300]}). It must be able to read that "
            "folder"
        )

    def unload_adapter(self, name: str) -> None:
        """Let the server forget an adapter, if it can."""
        for path in ("/v1/unload_lora_adapter", "/unload_lora_adapter"):
            if self._send("POST", path, {"lora_name": name}).status_code == 200:
                return

    def complete(self, model: str, tokens: Sequence[int], settings: Mapping[str, Any]) -> Completed:
        """The greedy completion of one prompt."""
        body = {"model": model, "prompt": list(tokens), **settings}
        answer = self._completion(body)
        choice, usage = answer["choices"][0], _usage(answer)
        given, count = choice.get("token_ids"), usage.get("completion_tokens")
        if usage.get("prompt_tokens") is not None:
            self._require_prompt(usage["prompt_tokens"], len(tokens))
        if not isinstance(given, list) and not isinstance(count, int):
            raise EvaluationError(
                f"the server at {self.url} says neither the tokens of a completion nor their "
                "number (`usage.completion_tokens`)"
            )
        return Completed(
            tuple(given) if isinstance(given, list) else None,
            str(choice.get("text", "")),
            len(given) if isinstance(given, list) else int(str(count)),
            choice.get("finish_reason") == "stop",
        )

    def log_likelihood(
        self, model: str, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[float, bool]:
        """(sum of the continuation's log-probabilities, whether each token is the most likely).

        Raises EvaluationError unless the answer is of these very tokens: one that is shifted by a
        token is of another text.
        """
        tokens = [*context, *continuation]
        body = {
            "model": model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "seed": 0,
            "echo": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }
        answer = self._completion(body)
        choice = answer["choices"][0]
        found = choice.get("logprobs")
        found = found if isinstance(found, dict) else {}
        echoed = [found.get(name) for name in ("token_logprobs", "top_logprobs")]
        own, best = (_slice(each, len(tokens), len(context)) for each in echoed)
        lacking = not own or len(own) != len(best)
        if lacking or not all(map(_is_log_probability, own)) or not all(map(_is_likely, best)):
            raise EvaluationError(
                f"the server at {self.url} gives no log-probabilities of a prompt (`echo` with "
                "`logprobs`); measure multiple choice with the backend transformers"
            )
        self._require_prompt(_usage(answer).get("prompt_tokens"), len(tokens))
        for stated in (_token_ids(found.get("tokens")), choice.get("prompt_token_ids")):
            if isinstance(stated, list) and stated[: len(tokens)] != tokens:
                raise EvaluationError(
                    f"the server at {self.url} answers for other tokens than it was asked for; it "
                    "must take prompts as tokens, without changing any"
                )
        greedy = all(value >= max(likely.values()) for value, likely in zip(own, best, strict=True))
        return float(sum(own)), greedy

    def _require_prompt(self, read: object, sent: int) -> None:
        """Raise EvaluationError if the server read another number of tokens than it was sent."""
        if read != sent:
            raise EvaluationError(
                f"the server at {self.url} read a prompt of {sent} tokens as {read}"
                "; it must take prompts as tokens, without adding any, and state their number "
                "(`usage.prompt_tokens`)"
            )

    def _completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
        response = self._answered(self._send("POST", "/v1/completions", body), "a completion")
        answer = _object(response)
        choices = answer.get("choices")
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
            raise EvaluationError(f"the server at {self.url} answers without a choice")
        if answer.get("model") != body["model"]:
            raise EvaluationError(
                f"the server at {self.url} was asked for {body['model']} and answers as "
                f"{str(answer.get('model'))[:100]}. Name the model as the server "
                "does (`models` beside its address); an adapter must keep its name"
            )
        return answer

    def _answered(self, response: httpx.Response, what: str) -> httpx.Response:
        if response.status_code == 200:
            return response
        if response.status_code in (401, 403, 404, 429) or response.status_code >= 500:
            raise self._failed(f"HTTP {response.status_code} for {what}")
        # 400 and 422 say what is wrong with the request. They may quote a prompt: not repeated here
        raise EvaluationError(
            f"the server at {self.url} rejects a request for {what} (HTTP {response.status_code}); "
            "its own log says why. It must take prompts as tokens of the model's length"
        )

    def _send(
        self, method: str, path: str, body: Any = None, timeout_s: float | None = None
    ) -> httpx.Response:
        settings: dict[str, Any] = {} if timeout_s is None else {"timeout": timeout_s}
        if body is not None:
            settings["content"] = json.dumps(body).encode("ascii")
            settings["headers"] = {"Content-Type": "application/json"}
        try:
            return self._http.request(method, f"{self.url}{path}", **settings)
        except httpx.RequestError as error:
            raise self._failed(type(error).__name__) from None

    def _down(self, reason: str) -> EvaluationError:
        return EndpointDown(
            f"the server at {self.url} does not answer ({reason}). Check its address in the "
            f"profile and the key in {KEY}; the same command continues"
        )


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _usage(answer: Mapping[str, Any]) -> dict[str, Any]:
    found = answer.get("usage")
    return found if isinstance(found, dict) else {}


def _slice(echoed: object, tokens: int, start: int) -> list[Any]:
    """The places of the continuation in a list with a value for each token of the prompt, and
    perhaps of the one new token; empty for anything else.
    """
    if not isinstance(echoed, list) or len(echoed) not in (tokens, tokens + 1):
        return []
    return echoed[start:tokens]


def _is_log_probability(value: object) -> bool:
    return isinstance(value, float | int) and not math.isnan(value)


def _is_likely(value: object) -> bool:
    """Whether it says which tokens are the most likely at a place."""
    return isinstance(value, dict) and bool(value) and all(map(_is_log_probability, value.values()))


def _token_ids(tokens: object) -> list[int] | None:
    """The tokens of an echo, from vLLM's `token_id:N`; None where they are texts."""
    found = [_TOKEN_ID.fullmatch(str(each)) for each in tokens] if isinstance(tokens, list) else []
    ids = [int(each[1]) for each in found if each is not None]
    return ids if ids and len(ids) == len(found) else None


def _reason(response: httpx.Response) -> str:
    """What a server says of a failed request that holds no prompt."""
    found = _object(response)
    error = found.get("error") if isinstance(found.get("error"), dict) else found
    return str((error or {}).get("message") or (error or {}).get("error_message") or "")
