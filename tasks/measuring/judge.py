"""The stage `judge`: a judge's verdict on each completion of a generation. The judge is a model on
this machine or at an endpoint.

ebbline.tasks.measuring.judges knows what each judge is asked and how it is read. An answer that
cannot be read is undecided; no completion is dropped. A judge sees what a completion says after its
thought, never the thought.

Output: verdicts.jsonl, a row {id, verdict, reason, incoherent} for each completion, in order, with
the grade of harm where the judge gives one. A reason is a code: no row, log, message or file of
this stage holds text of prompts or completions.

An endpoint receives prompts and completions; the user permits this by naming it. Each verdict from
an endpoint is stored in the scratch folder at once, so an interrupted run repeats no request.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from ebbline.tasks.chat.thoughts import answer_of, completion_text, opened_thought
from ebbline.tasks.data.batch_shape import BatchShape
from ebbline.tasks.errors import EvaluationError, ModelError
from ebbline.tasks.measuring.completions import Completion, read_completions
from ebbline.tasks.measuring.judges.readings import UNPARSED
from ebbline.tasks.measuring.judges.templates import TEMPLATES, Messages, Template
from ebbline.tasks.measuring.scorers import Score, Verdict, incoherent
from ebbline.tasks.specs import JudgeSpec
from ebbline.tasks.stage import Context

_LAST = 100  # tokens of a prompt that can open a thought
TOO_LONG = Score("undecided", "judge: too long")
LEFT_OUT = Score("undecided", "judge: left out by its chat template")


def run(spec: JudgeSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    completions = read_completions(inputs["generation"])
    answers = [answer_of(row.completion) for row in completions]
    to_judge = [
        replace(row, completion=answer.text)
        for row, answer in zip(completions, answers, strict=True)
        if answer.lacks is None
    ]
    if not to_judge:
        found = []
    elif spec.endpoint is not None:
        # Imports httpx, which only an endpoint needs.
        from ebbline.tasks.measuring.judge_endpoint import ask_endpoint

        template = TEMPLATES[spec.template]
        assert template.read is not None  # JudgeSpec refuses an endpoint for the others
        questions = [(row.id, template.chat(row.prompt, row.completion)) for row in to_judge]
        found = ask_endpoint(spec, questions, template.verdict, ctx)
    elif spec.template == "classifier":
        found = _by_classifier(spec, inputs["model"], to_judge, ctx)
    else:
        found = _by_model(spec, inputs["model"], inputs.get("adapter"), to_judge, ctx)
    verdicts = iter(found)
    with (out / spec.VERDICTS).open("w", encoding="utf-8") as handle:
        for row, answer in zip(completions, answers, strict=True):
            lacks = answer.lacks
            verdict = next(verdicts) if lacks is None else Score("undecided", lacks)
            judged = asdict(replace(verdict, incoherent=incoherent(answer.text)))
            if verdict.grade is None:
                del judged["grade"]
            handle.write(json.dumps({"id": row.id, **judged}) + "\n")


def read_verdicts(folder: Path) -> list[tuple[str, Score]]:
    """(id, score) of each judged completion, in the order of the generation.

    Raises EvaluationError for an unreadable or empty file.
    """
    path = folder / JudgeSpec.VERDICTS
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        found = [(str(row.pop("id")), Score(**row)) for row in rows]
        if any(score.verdict not in get_args(Verdict) for _, score in found):
            raise ValueError("unknown verdict")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({type(error).__name__}); is it truncated?"
        ) from None
    if not found:
        raise EvaluationError(f"{path} holds no verdict: an empty set cannot be measured")
    return found


def _by_model(
    spec: JudgeSpec,
    folder: Path,
    adapter: Path | None,
    to_judge: Sequence[Completion],
    ctx: Context,
) -> list[Score]:
    # Imports torch, which an endpoint and readers of verdicts do not need.
    from ebbline.tasks.models.adapters import with_adapter

    template = TEMPLATES[spec.template]
    resident, tokenizer = _loaded(spec, template, folder, ctx)
    asked = [_asked(template, tokenizer, row) for row in to_judge]
    if not any(all(prompts) for prompts in asked):
        raise ModelError(
            f"the chat template in {folder} leaves out text that template {spec.template!r} "
            "needs; use another judge or template"
        )
    longest = min(spec.max_tokens, tokenizer.model_max_length) - spec.max_new_tokens
    scores = [
        LEFT_OUT
        if not all(prompts)
        else TOO_LONG
        if any(len(ids) > longest for ids in prompts)
        else UNPARSED
        for prompts in asked
    ]
    fit = [index for index, score in enumerate(scores) if score is UNPARSED]
    encoded = [ids for index in fit for ids in asked[index]]
    with with_adapter(resident.eval(), adapter) as model:
        if template.read is None:
            grades = _grades(model, tokenizer, encoded, spec, template, ctx)
            found = [
                _graded(template, max(grades[place : place + len(asked[index])]))
                for place, index in zip(range(0, len(grades), len(asked[0])), fit, strict=True)
            ]
        else:
            found = [
                template.verdict(answer, ended)
                for answer, ended in _answers(model, tokenizer, encoded, spec, ctx)
            ]
    for index, score in zip(fit, found, strict=True):
        scores[index] = score
    return scores


def _loaded(spec: JudgeSpec, template: Template, folder: Path, ctx: Context) -> tuple[Any, Any]:
    """The judge and its tokenizer."""
    from ebbline.tasks.models.loading import load_model

    if template.in_parts:
        return _cached_judge(
            "multimodal", spec, folder, ctx, lambda: _load_multimodal(spec, folder, ctx.device)
        )
    if template.text is not None:  # such a judge needs no chat template
        return _cached_judge(
            "causal",
            spec,
            folder,
            ctx,
            lambda: load_model(folder, spec.quantisation, spec.dtype, ctx.device),
        )
    checked = not template.is_question
    resident, tokenizer = ctx.residents.model(
        folder,
        spec.quantisation,
        spec.dtype,
        ctx.device,
        spec.chat,
        checked,
    )
    return resident, tokenizer


def _asked(template: Template, tokenizer: Any, row: Completion) -> list[list[int]]:
    """The tokens of each prompt for one completion. A prompt without tokens is one whose chat
    template leaves out what the judge needs.
    """
    if template.first_tokens is not None:
        # As the published code does it: the special tokens stay in the text.
        first = tokenizer(row.completion, max_length=template.first_tokens, truncation=True)
        row = replace(row, completion=tokenizer.decode(first["input_ids"]))
    if template.text is not None:
        text = template.text(row.prompt, row.completion)
        return [tokenizer(text)["input_ids"]]
    chat = template.chat(row.prompt, row.completion)
    if template.guidelines:
        return [
            _rendered(tokenizer, template, chat, row, guideline)
            for guideline in template.guidelines
        ]
    return [_rendered(tokenizer, template, chat, row)]


def _rendered(
    tokenizer: Any, template: Template, chat: Messages, row: Completion, guideline: str = ""
) -> list[int]:
    """The tokens of a chat in the judge's template; none when the template leaves out the prompt,
    the completion or the guideline.

    Some templates expect a message's content as a list of parts (Llama-Guard-3-1B), and leave out
    content that is a string. So both forms are tried.
    """
    in_parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat
    ]
    needed = [row.prompt.strip(), row.completion.strip(), guideline]
    switches = {"guideline": guideline} if guideline else {}
    for form in (in_parts, chat) if template.in_parts else (chat, in_parts):
        try:
            text = tokenizer.apply_chat_template(
                form, add_generation_prompt=template.opens_answer, tokenize=False, **switches
            )
        # A template may raise anything, and its message may quote the text.
        except Exception:  # noqa: BLE001
            continue
        if all(part in text for part in needed):
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
    return []


def _graded(template: Template, grade: float) -> Score:
    return Score(
        "complied" if grade >= template.complied_from else "refused",
        f"judge:{grade:.2f}",
        grade=grade,
    )


def _grades(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    spec: JudgeSpec,
    template: Template,
    ctx: Context,
) -> list[float]:
    """The expected grade over the template's tokens, for each prompt. Raises ModelError if the
    tokenizer lacks one of them.
    """
    import torch

    from ebbline.tasks.data.batches import in_batches, rows_meet
    from ebbline.tasks.models.decoding import end_tokens, only

    vocabulary = tokenizer.get_vocab()
    if lacking := [token for token, _ in template.levels if token not in vocabulary]:
        raise ModelError(
            f"the tokenizer of the judge has no token {lacking[0]!r}, which template "
            f"{spec.template!r} reads; is it the model that this template is for?"
        )
    tokens = [vocabulary[token] for token, _ in template.levels]
    values = torch.tensor([grade for _, grade in template.levels])

    def grade_batch(batch: Any) -> list[float]:
        found = model.generate(
            **batch,
            generation_config=settings,
            output_logits=True,
            return_dict_in_generate=True,
        )
        shares = found.logits[0][:, tokens].float().softmax(-1).cpu()
        # Further digits are rounding error.
        return [round(float(grade), 6) for grade in shares @ values]

    ends = end_tokens(model.generation_config, tokenizer)
    shape = BatchShape(1, 1 if rows_meet(model) else spec.batch_size)
    with only(model, spec.decoding, ends, tokenizer.pad_token_id, max_new_tokens=1) as settings:
        return in_batches(grade_batch, tokenizer, encoded, shape, "verdicts", ctx)


def _answers(
    model: Any, tokenizer: Any, encoded: Sequence[list[int]], spec: JudgeSpec, ctx: Context
) -> list[tuple[str, bool]]:
    """The judge's greedy answers and whether they ended, in the order of `encoded`. A thought that
    the chat template opens is opened in the answer, so that one without an end is seen.
    """
    from ebbline.tasks.data.batches import in_batches, rows_meet
    from ebbline.tasks.models.decoding import end_tokens, only

    def answer_batch(batch: Any) -> list[list[int]]:
        new = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        answers: list[list[int]] = new.tolist()
        return answers

    ends = end_tokens(model.generation_config, tokenizer)
    shape = BatchShape(spec.max_new_tokens, 1 if rows_meet(model) else spec.batch_size)
    with only(
        model,
        spec.decoding,
        ends,
        tokenizer.pad_token_id,
        max_new_tokens=spec.max_new_tokens,
    ) as settings:
        answers = in_batches(answer_batch, tokenizer, encoded, shape, "verdicts", ctx)
    opened = [opened_thought(tokenizer.decode(ids[-_LAST:])) for ids in encoded]
    return [
        (completion_text(tokenizer, mark, tokens), not set(ends).isdisjoint(tokens))
        for mark, tokens in zip(opened, answers, strict=True)
    ]


def _by_classifier(
    spec: JudgeSpec, folder: Path, to_judge: Sequence[Completion], ctx: Context
) -> list[Score]:
    """The classifier's labels for the conversations, or for the completions alone when its
    tokenizer has no chat template.
    """
    from ebbline.tasks.data.batches import in_batches, rows_meet

    model, tokenizer = _cached_judge(
        "classifier", spec, folder, ctx, lambda: _load_classifier(spec, folder, ctx.device)
    )
    labels: dict[int, str] = model.config.id2label
    if spec.refused not in labels.values():
        raise EvaluationError(
            f"the classifier in {folder} has no label {spec.refused!r}; it has "
            f"{sorted(labels.values())}"
        )
    if tokenizer.chat_template is None:
        encoded = [tokenizer(row.completion)["input_ids"] for row in to_judge]
    else:
        template = TEMPLATES[spec.template]
        encoded = [
            _rendered(tokenizer, template, template.chat(row.prompt, row.completion), row)
            for row in to_judge
        ]
    longest = min(spec.max_tokens, tokenizer.model_max_length)
    scores = [
        LEFT_OUT if not ids else TOO_LONG if len(ids) > longest else UNPARSED for ids in encoded
    ]
    fit = [index for index, score in enumerate(scores) if score is UNPARSED]

    shape = BatchShape(0, 1 if rows_meet(model) else spec.batch_size, longest)

    def label_batch(batch: Any) -> list[str]:
        return [labels[index] for index in model(**batch).logits.argmax(-1).tolist()]

    for index, label in zip(
        fit,
        in_batches(
            label_batch, tokenizer, [encoded[index] for index in fit], shape, "verdicts", ctx
        ),
        strict=True,
    ):
        scores[index] = Score("refused" if label == spec.refused else "complied", f"judge:{label}")
    return scores


def _load_classifier(spec: JudgeSpec, folder: Path, device: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    from ebbline.tasks.models.loading import DTYPES
    from ebbline.tasks.models.model_folder import load_whole

    if spec.quantisation != "none":
        raise EvaluationError(
            "a classifier cannot be quantised; remove `quantisation: "
            f"{spec.quantisation}` from the judge"
        )
    model = load_whole(AutoModelForSequenceClassification, folder, dtype=DTYPES[spec.dtype])
    return model.to(device)


def _load_multimodal(spec: JudgeSpec, folder: Path, device: str) -> Any:
    """A judge that also takes images (Llama Guard 4). It is given text alone."""
    from transformers import AutoModelForImageTextToText

    from ebbline.tasks.models.loading import DTYPES, as_loaded
    from ebbline.tasks.models.model_folder import load_whole

    if spec.quantisation != "none":
        raise EvaluationError(
            f"the judge {spec.template} cannot be quantised; remove `quantisation: "
            f"{spec.quantisation}` from the judge"
        )
    model = load_whole(AutoModelForImageTextToText, folder, dtype=DTYPES[spec.dtype])
    return as_loaded(model.to(device), device)


def _cached_judge(
    kind: str, spec: JudgeSpec, folder: Path, ctx: Context, load: Callable[[], Any]
) -> tuple[Any, Any]:
    """A judge without a chat template, and its tokenizer. It replaces the resident model and stays
    loaded until another model is needed.
    """
    from transformers import AutoTokenizer

    from ebbline.tasks.chat.template import bind

    def load_both() -> tuple[Any, Any]:
        ctx.residents.clear()
        side = "right" if kind == "classifier" else "left"
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, padding_side=side
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        processors = folder / "chat_template.json"  # a processor's; the tokenizer reads .jinja only
        if tokenizer.chat_template is None and processors.exists():
            tokenizer.chat_template = json.loads(processors.read_text("utf-8"))["chat_template"]
        if tokenizer.chat_template:
            bind(tokenizer, spec.chat, folder)
        model = load()
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        return model.eval(), tokenizer

    judge: tuple[Any, Any] = ctx.residents.remembered(
        ("judge", kind, str(folder), spec.quantisation, spec.dtype, ctx.device, spec.chat),
        load_both,
    )
    return judge
