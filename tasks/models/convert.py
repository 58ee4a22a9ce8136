"""Convert a GGUF file, once, into an ordinary Hugging Face folder: loading GGUF takes 20 s each
time, safetensors does not.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ebbline.tasks.errors import ModelError
from ebbline.tasks.models.loading import DTYPES
from ebbline.tasks.models.model_folder import without_loading_bar
from ebbline.tasks.specs import ConvertSpec
from ebbline.tasks.stage import Context


def run(spec: ConvertSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    source = inputs["source"]
    with source.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(
                f"{source} does not begin with the letters GGUF; it is not a GGUF model"
            )
    # A symbolic link, because transformers needs this suffix and the file may lack it.
    named = ctx.log / "model.gguf"
    named.unlink(missing_ok=True)
    named.symlink_to(source.resolve())
    with without_loading_bar():
        loaded, found = AutoModelForCausalLM.from_pretrained(
            ctx.log,
            gguf_file=named.name,
            dtype=DTYPES[spec.dtype],
            trust_remote_code=False,
            output_loading_info=True,
        )
    if lost := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise ModelError(
            f"{source}: {lost[0]} is missing, or has no place in {type(loaded).__name__} "
            f"({len(lost)} such weights); transformers does not read this file whole"
        )
    # transformers unpacks the weights but still marks the model as quantised, and then cannot save
    # it.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).to(DTYPES[spec.dtype])
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(
        ctx.log, gguf_file=named.name, trust_remote_code=False
    )
    model.save_pretrained(out / spec.MODEL, safe_serialization=True)
    tokenizer.save_pretrained(out / spec.MODEL)
    named.unlink()
