"""Convert a GGUF file, once, into an ordinary Hugging Face folder: loading GGUF takes 20 s each
time, safetensors does not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    tokenizer = _tokenizer(named)
    model.save_pretrained(out / spec.MODEL, safe_serialization=True)
    tokenizer.save_pretrained(out / spec.MODEL)
    named.unlink()


def save_tokenizer_of(source: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder, as the stage does, without the weights."""
    named = folder / "model.gguf"
    named.symlink_to(source.resolve())
    try:
        _tokenizer(named).save_pretrained(folder)
    # transformers raises many kinds for a vocabulary that it cannot read.
    except Exception as error:  # noqa: BLE001
        raise ModelError(
            f"transformers cannot read the tokenizer of {source} ({type(error).__name__}); use "
            "the model's folder of safetensors"
        ) from None
    named.unlink()


def _tokenizer(file: Path) -> Any:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
