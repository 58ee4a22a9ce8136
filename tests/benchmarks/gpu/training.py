"""Training in NF4: tokens a second beside published ones, and packs of adapters."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ebbline.tasks.models.memory import Layout, laid_out, predict
from ebbline.tasks.specs import TrainSpec
from tests.benchmarks import bench_pack
from tests.benchmarks.gpu.models import DTYPE, Peak, context, now
from tests.benchmarks.gpu.work import Row, Work, memory, note

Side = Callable[[Sequence[TrainSpec], Sequence[Any]], tuple[float, list[float]]]
# Published: Q-LoRA (Int4) on one A100 of 80 GB, 8 rows of 2,048 tokens a step, one row at a time
# (Qwen's README; seconds a step 7.0, 11.8 and 59.5).
ANCHORS = {"qwen-7b": 2340, "qwen-14b": 1390, "qwen-72b": 275}


def train(work: Work, name: str, rows: int) -> Iterator[Row]:
    """Tokens a second of ebbline's engine for one device, with one row at a time as the anchors
    have it, and with as many as ebbline's memory model allows.
    """
    sizes = work.sizes
    folder, kept, shape = work.model(name)
    batch = bench_pack.batches(rows, sizes.tokens, 1, 1, shape.vocabulary)[0][0]
    spec = TrainSpec(
        rank=sizes.rank,
        quantisation="nf4",
        dtype=DTYPE,
        global_batch=rows,
        max_tokens=sizes.tokens,
    )
    done: set[int] = set()
    for micro_batch in (1, None):
        ctx = context(folder, sizes.device, kept, micro_batch=micro_batch)
        ctx, predicted_gb = laid_out(spec, {"model": folder}, ctx, work.memory_gb)
        if ctx.micro_batch in done:
            continue
        done.add(ctx.micro_batch or rows)
        yield _trained(work, name, spec, batch, folder, ctx, predicted_gb)


def _trained(
    work: Work,
    name: str,
    spec: TrainSpec,
    batch: Sequence[Any],
    folder: Path,
    ctx: Any,
    predicted_gb: float | None,
) -> Row:
    from ebbline.tasks.training.engines import SingleDevice

    sizes = work.sizes
    engine = SingleDevice(spec, folder, ctx)
    peak, seconds = Peak(sizes.device), []
    for _ in range(sizes.steps + 1):
        started = now(sizes.device)
        engine.step(batch, spec.learning_rate)
        seconds.append(now(sizes.device) - started)
        note(f"{name}, micro-batch {engine.micro_batch}: a step in {seconds[-1]:.2f} s")
    tokens_per_s = len(batch) * sizes.tokens / median(seconds[1:])
    row = {
        "what": f"{name} NF4, {len(batch)} rows of {sizes.tokens}, {engine.micro_batch} at a time",
        "seconds": median(seconds[1:]),
        "runs_s": seconds,
        "tokens_per_s": tokens_per_s,
        "anchor_tokens_per_s": ANCHORS[name],
        "rank": spec.rank,
        "attention": engine.model.config._attn_implementation,
        **memory(peak, predicted_gb),
        "ratios": {
            f"tokens_per_s_over_anchor_{name}_{engine.micro_batch}_at_a_time": tokens_per_s
            / ANCHORS[name]
        },
    }
    engine.close()
    return row


def pack(work: Work) -> Iterator[Row]:
    """Packs of adapters over one base, against one adapter after another: ebbline's own engine, and
    PEFT. Ranks repeat after eight adapters, so one after another is measured on eight.
    """
    sizes = work.sizes
    folder, kept, shape = work.model("llama-2-7b")
    ctx = context(folder, sizes.device, kept)
    base, _ = kept.model(folder, "nf4", DTYPE, sizes.device)

    def sides(adapters: int) -> tuple[list[TrainSpec], list[Any]]:
        specs = bench_pack.settings(1, sizes.pack_tokens, adapters, "nf4", DTYPE)
        steps = sizes.pack_steps + 1
        return specs, bench_pack.batches(1, sizes.pack_tokens, adapters, steps, shape.vocabulary)

    def row(what: str, adapters: int, side: Side, predicted_gb: float | None) -> Row:
        peak, started = Peak(sizes.device), now(sizes.device)
        seconds, losses = side(*sides(adapters))
        tokens = adapters * sizes.pack_steps * sizes.pack_tokens
        note(f"{what}: {tokens / seconds:.0f} tokens/s")
        return {
            "what": what,
            "adapters": adapters,
            "seconds": seconds,
            "with_setup_s": now(sizes.device) - started,  # and with the step that is not timed
            "tokens_per_s": tokens / seconds,
            "losses": losses,
            **memory(peak, predicted_gb),
        }

    few = sizes.packs[0]
    layout = Layout(1, 0, 1)
    largest = predict(shape, max(sides(few)[0], key=lambda spec: spec.rank), layout).allocated_gb
    alone = row("one after another", few, partial(bench_pack.one_by_one, folder, ctx), largest)
    yield alone
    packs = {}
    for adapters in sizes.packs:
        specs, _ = sides(adapters)
        predicted = predict(shape, specs[0], layout, specs[1:])
        what = f"a pack of {adapters}"
        if reason := work.too_large(predicted):
            yield {"what": what, "skipped": reason}
            continue
        packed = partial(bench_pack.packed, folder, ctx)
        found = packs[adapters] = row(what, adapters, packed, predicted.allocated_gb)
        if adapters == few:  # a larger pack has other rows
            found["largest_loss_difference"] = max(
                abs(a - b) / b for a, b in zip(found["losses"], alone["losses"], strict=True)
            )
        yield found | {"ratios": _ratio(found, "one_after_another", alone)}
    loads = kept.loads
    theirs = row("PEFT, one after another", few, partial(peft_one_by_one, base, sizes.device), None)
    ratios = [_ratio(found, "peft", theirs) for found in packs.values()]
    yield theirs | {"ratios": {name: value for each in ratios for name, value in each.items()}}
    if loads != 1:
        raise RuntimeError(f"a side changed the base: it was made {loads} times")


def _ratio(pack: Row, name: str, other: Row) -> dict[str, float]:
    speed = pack["tokens_per_s"] / other["tokens_per_s"]
    return {f"tokens_per_s_pack_of_{pack['adapters']}_over_{name}": speed}


def peft_one_by_one(
    base: Any, device: str, specs: Sequence[TrainSpec], work: Sequence[Sequence[Any]]
) -> tuple[float, list[float]]:
    """As PEFT's and bitsandbytes' documentation train QLoRA, with a loop of the fewest lines. It
    changes the base: norms, embeddings and head become float32.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    total, losses = 0.0, []
    for number, spec in enumerate(specs):
        torch.manual_seed(spec.seed)
        lora = LoraConfig(
            r=spec.rank,
            lora_alpha=2 * spec.rank,
            target_modules=list(spec.target_modules),
            task_type="CAUSAL_LM",
        )
        tuned = get_peft_model(base, lora)
        tuned.train()
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=spec.learning_rate)
        for count, step in enumerate(work):
            if count == 1:
                started = now(device)
            ids = torch.tensor([row.ids for row in step[number]], device=device)
            # As the Trainer's `bf16`: peft makes norms, embeddings and the head float32
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = tuned(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
        total += now(device) - started
        losses.append(loss.item())
        base = tuned.unload()
    return total, losses
