"""Evaluation: adapters of one base, against PEFT; and an NF4 step against dequantised weights."""

import gc
import random
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ebbline.tasks.measuring import generate
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.prefix_lm import PrefixScorer, plan
from ebbline.tasks.models.adapters import with_adapter
from ebbline.tasks.models.loading import Residents
from ebbline.tasks.specs import GenerateSpec, Quantisation
from ebbline.tasks.stage import Report, Request
from ebbline.tasks.worker import run_stages
from tests.benchmarks.gpu.models import DTYPE, Peak, now, write_adapter
from tests.benchmarks.gpu.work import Row, Sizes, Work, memory, note
from tests.hardware import predict_measuring

Encoded = tuple[None, list[int], list[int]]
Answers = tuple[list[str], list[float]]  # completions, log-likelihoods


class Scorer(PrefixScorer):
    """ebbline's scorer on a loaded model, without lm-eval around it."""

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.batch_size, self.softmax_dtype = batch_size, torch.float32


def requests(sizes: Sizes, vocabulary: int) -> list[Encoded]:
    """Multiple choice as tokens: questions after the shots of their subject with four letters, and
    items with four endings.
    """
    chance = random.Random(0)

    def words(count: int) -> list[int]:
        return [chance.randrange(10, vocabulary) for _ in range(count)]

    found: list[Encoded] = []
    for _ in range(sizes.subjects):
        shots = words(sizes.shots)
        for _ in range(sizes.questions):
            question = shots + words(sizes.shots // 8)
            found += [(None, question, [10 + letter]) for letter in range(4)]
        for _ in range(sizes.questions):
            start = words(sizes.shots // 6)
            found += [(None, start, words(sizes.shots // 16)) for _ in range(4)]
    return found


def evaluate(work: Work) -> Iterator[Row]:
    """Adapters of one base measured by completions and by multiple choice: one batch of a worker's
    stages, against PEFT with one adapter after the other. PEFT's side keeps the base loaded, which
    a process for each adapter would not.
    """
    sizes = work.sizes
    chance = random.Random(0)
    texts = [
        " ".join(f"word{chance.randrange(40)}" for _ in range(sizes.prompt_words))
        for _ in range(sizes.prompts)
    ]
    folder, kept, shape = work.model("llama-2-7b")
    adapters = [
        write_adapter(work.folder / f"adapter{number}", shape, 8, number)
        for number in range(sizes.adapters)
    ]
    choices = requests(sizes, shape.vocabulary)
    spec = GenerateSpec(max_new_tokens=sizes.new_tokens, quantisation="nf4", dtype=DTYPE)
    tokens = len(adapters) * sizes.prompts * sizes.new_tokens

    base, tokenizer = kept.model(folder, "nf4", DTYPE, sizes.device)
    peak = Peak(sizes.device)
    seconds, ours, stages_gb = as_a_worker(work, spec, folder, kept, adapters, texts, choices)
    note(f"ebbline: {len(adapters)} adapters in {seconds:.1f} s")
    widest = spec.batch_size * (sizes.shots + sizes.shots // 8)
    row = {
        "what": f"{len(adapters)} adapters, ebbline",
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "base_loads": kept.loads,
        **memory(peak, predict_measuring(shape, "nf4", widest).allocated_gb),
    }
    if row["peak_memory_gb"] is not None:  # each stage begins a peak of its own
        row["peak_memory_gb"] = max(row["peak_memory_gb"], stages_gb)
    yield row

    with_peft(base, tokenizer, adapters[0], texts, choices, spec)  # not timed
    peak, started = Peak(sizes.device), now(sizes.device)
    theirs = [with_peft(base, tokenizer, adapter, texts, choices, spec) for adapter in adapters]
    peft_s = now(sizes.device) - started
    note(f"PEFT: {len(adapters)} adapters in {peft_s:.1f} s")
    yield {
        "what": f"{len(adapters)} adapters, PEFT",
        "seconds": peft_s,
        "tokens_per_s": tokens / peft_s,
        **memory(peak, None),
        **_apart(ours, theirs),
        "ratios": {"time_peft_over_ebbline_evaluation": peft_s / seconds},
    }


def as_a_worker(
    work: Work,
    spec: GenerateSpec,
    folder: Path,
    kept: Residents,
    adapters: Sequence[Path],
    texts: Sequence[str],
    choices: Sequence[Encoded],
) -> tuple[float, list[Answers], float]:
    """(seconds, answers, the stages' largest peak in GB) of one batch of a worker. lm-eval may not
    be installed, so its part of the multiple choice, the text of the requests, is left out.
    """
    from tests.tiny import request

    device = work.sizes.device
    prompts = work.folder / "prompts.csv"
    prompts.write_text("prompt\n" + "".join(f"{text}\n" for text in texts))
    shared = plan(choices, 4096)

    def stage(name: str, own: GenerateSpec, adapter: Path) -> Request:
        inputs = {"model": folder, "adapter": adapter, "prompts": prompts}
        return request(own, inputs, work.folder / "stages" / name, device=device)

    def scores(adapter: Path) -> list[float]:
        with with_adapter(kept.model(folder, "nf4", DTYPE, device)[0], adapter) as model:
            return [score for score, _ in Scorer(model, spec.batch_size).score(shared)]

    first = spec.model_copy(update={"max_new_tokens": 1})
    stages = [stage(adapter.name, spec, adapter) for adapter in adapters]
    # Not timed: kernels and buffers. In one batch with the others it would form a group with them
    warm = stage("first", first, adapters[0])
    inputs = {name: Path(path) for name, path in warm.inputs.items()}
    generate.run(first, inputs, Path(warm.out), warm.context(residents=kept))
    scores(adapters[0])
    reports = run_stages(stages, residents=kept)
    started, peaks = now(device), [0.0]
    for report in islice(reports, len(stages)):
        _require_done(report)
        peaks.append(report.environment.get("peak_gpu_memory_gb", 0.0))
    found = [scores(adapter) for adapter in adapters]
    seconds = now(device) - started
    for _ in reports:  # the batch releases its models
        pass
    completions = [[row.completion for row in read_completions(Path(each.out))] for each in stages]
    return seconds, list(zip(completions, found, strict=True)), max(peaks)


def _require_done(report: Report) -> None:
    if report.error is not None:
        raise RuntimeError(report.error)


def _apart(ours: Sequence[Answers], theirs: Sequence[Answers]) -> Row:
    """How far the two sides' answers differ: batches of another shape round otherwise."""
    texts, scores = [], []
    for one, two in zip(ours, theirs, strict=True):
        texts += [a == b for a, b in zip(one[0], two[0], strict=True)]
        scores += [abs(a - b) for a, b in zip(one[1], two[1], strict=True)]
    return {
        "equal_completions": sum(texts) / len(texts),
        "largest_log_likelihood_difference": max(scores),
    }


@torch.inference_mode()
def with_peft(
    base: Any,
    tokenizer: Any,
    adapter: Path,
    texts: Sequence[str],
    choices: Sequence[Encoded],
    spec: GenerateSpec,
) -> Answers:
    """Completions and log-likelihoods with transformers and PEFT: batches in the order of the file,
    and each distinct context of the multiple choice run whole, as lm-eval's own model does.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, adapter).eval()
    answers: list[str] = []
    for start in range(0, len(texts), spec.batch_size):
        chats = [
            [{"role": "user", "content": text}] for text in texts[start : start + spec.batch_size]
        ]
        batch = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(base.device)
        new = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=spec.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(
            new[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    scores = _log_likelihoods(model, choices, spec.batch_size)
    model.unload()
    return answers, scores


def _log_likelihoods(model: Any, choices: Sequence[Encoded], batch_size: int) -> list[float]:
    """One row for each distinct sequence of tokens, the longest first, padded on the right."""
    rows: dict[tuple[int, ...], list[tuple[int, list[int], int]]] = {}
    for index, (_, start, words) in enumerate(choices):
        tokens = tuple((start + words)[:-1])
        rows.setdefault(tokens, []).append((index, words, len(start) - 1))
    found = [0.0] * len(choices)
    ordered = sorted(rows, key=len, reverse=True)
    for _, group in groupby(enumerate(ordered), key=lambda item: item[0] // batch_size):
        batch = [tokens for _, tokens in group]
        ids = torch.tensor(
            [[*tokens, *[0] * (len(batch[0]) - len(tokens))] for tokens in batch],
            device=model.device,
        )
        logprobs = model(input_ids=ids).logits.log_softmax(-1, dtype=torch.float32)
        for place, tokens in enumerate(batch):
            for index, words, first in rows[tokens]:
                wanted = torch.tensor(words, device=ids.device)[:, None]
                picked = logprobs[place, first : first + len(words)].gather(1, wanted)
                found[index] = float(picked.sum())
    return found


def nf4_step(work: Work) -> Iterator[Row]:
    """The two passes of an evaluation (the prompts of a batch, and one new token of each row), in
    NF4 and with the same weights dequantised.
    """
    sizes = work.sizes
    folder, kept, shape = work.model("llama-2-7b")
    model, _ = kept.model(folder, "nf4", DTYPE, sizes.device)
    chance = torch.Generator().manual_seed(0)
    size = (sizes.prompts, sizes.prompt_words)
    ids = torch.randint(10, shape.vocabulary, size, generator=chance).to(sizes.device)
    before: dict[str, tuple[float, torch.Tensor]] = {}
    kinds: dict[str, Quantisation] = {"NF4": "nf4", "dequantised": "none"}
    for weights, quantisation in kinds.items():
        if weights == "dequantised":
            kept.clear()
            model = model.dequantize(dtype=torch.bfloat16)
            gc.collect()
        predicted_gb = predict_measuring(shape, quantisation, ids.numel()).allocated_gb
        passes(model, ids, sizes)  # not timed
        peak = Peak(sizes.device)
        for step, (seconds, logits) in passes(model, ids, sizes).items():
            note(f"{weights}, {step}: {1000 * seconds:.1f} ms")
            row = {
                "what": f"{step} of {sizes.prompts} rows, {weights}",
                "seconds": seconds,
                **memory(peak, predicted_gb),
            }
            if step in before:
                nf4_s, expected = before[step]
                row["equal_to_the_last_bit"] = bool(torch.equal(logits, expected))
                row["largest_logit_difference"] = float((logits - expected).abs().max())
                name = f"time_nf4_over_dequantised_{step.replace(' ', '_')}"
                row["ratios"] = {name: nf4_s / seconds}
            before[step] = seconds, logits
            yield row


@torch.inference_mode()
def passes(model: Any, ids: torch.Tensor, sizes: Sizes) -> dict[str, tuple[float, torch.Tensor]]:
    """(seconds, the last logits in float32) of the prompts' pass, and of one new token's."""
    cache = DynamicCache(config=model.config)

    def timed(times: int, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
        started = now(sizes.device)
        for _ in range(times):
            logits = model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        return (now(sizes.device) - started) / times, logits.float().cpu()

    return {"the prompts": timed(1, ids), "a new token": timed(sizes.decode_steps, ids[:, :1])}
