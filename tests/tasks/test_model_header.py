"""A model's size comes from its files, for any architecture; a guess says that it is one."""

import json
import math

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.gguf_header import read_gguf
from ebbline.tasks.headers.model_header import ModelHeader, read_header
from ebbline.tasks.models.model_work import model_shape, size_at
from ebbline.tasks.models.sizes import header_shape, size_in
from ebbline.tasks.stage import Source

TEMPLATE = "{{ messages[0].content }}"
WORDS = 3000  # more than the header keeps


def write_gguf(path, architecture="llama", layers=2, template=TEMPLATE, head=False):
    """A GGUF file by the library that writes them, with a long vocabulary."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{n}" for n in range(WORDS)])
    writer.add_token_types([1] * WORDS)
    if template is not None:
        writer.add_chat_template(template)
    shapes = {"token_embd.weight": (WORDS, 32), "output_norm.weight": (32,)}
    for layer in range(layers):
        shapes[f"blk.{layer}.attn_q.weight"] = (32, 32)
        shapes[f"blk.{layer}.ffn_up.weight"] = (64, 32)
    if head:
        shapes["output.weight"] = (WORDS, 32)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(map(math.prod, shapes.values()))


def folder_of(folder, config, shapes=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shapes:
        tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_gguf_file_without_a_number_in_its_name_has_the_size_in_its_header(tmp_path):
    """S2: `smollm2.gguf` was taken for a 7B model, and its budget stopped it."""
    path = tmp_path / "smollm2.gguf"
    parameters = write_gguf(path)
    size = size_at(str(path))
    assert (size.parameters, size.known_from, size.exact) == (parameters, "the GGUF header", True)
    assert size.shape.layers == 2 and size.shape.vocabulary == WORDS and size.shape.tied
    assert model_shape(Source("a", str(path))) == size.shape
    assert read_gguf(path).chat_template == TEMPLATE
    assert not size_at(str(path)).guessed and size_at(str(tmp_path / "absent.gguf")).guessed


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "phi3"])
def test_a_gguf_header_of_any_architecture_is_read(tmp_path, architecture):
    path = tmp_path / "model-70b.gguf"
    parameters = write_gguf(path, architecture, layers=1, head=True)
    size = size_at(str(path))
    assert (size.architecture, size.parameters) == (architecture, parameters)
    assert not size.shape.tied


def test_a_gguf_file_that_is_cut_or_foreign_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for length in (4, 30, 5000, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.gguf.*is the download complete"):
            read_gguf(path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ModelError, match="letters GGUF"):
        read_gguf(path)


@pytest.mark.parametrize(  # counted by transformers from the same configs
    ("kind", "billions"),
    [
        ("llama", 6.738),
        ("mistral", 7.242),
        ("qwen2", 12.050),
        ("qwen3", 12.049),
        ("gemma2", 2.614),
        ("gemma3_text", 2.629),
        ("phi", 1.418),
        ("phi3", 3.821),
        ("gpt2", 0.1244),
        ("gpt_neox", 20.555),
        ("mixtral", 46.703),
        ("falcon", 6.922),
        ("starcoder2", 3.030),
        ("cohere", 34.981),
        ("gpt_oss", 116.829),
    ],
)
def test_a_config_alone_gives_the_size_of_any_architecture_within_1_percent(
    tmp_path, kind, billions
):
    config = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    size = size_in(folder_of(tmp_path / "model", config))
    assert size.parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert (size.known_from, size.exact) == ("config.json", False)
    assert size.architecture == kind


def test_the_weights_headers_are_counted_without_masks_and_a_tied_head(tmp_path):
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 10}
    shapes = {"transformer.wte.weight": (10, 8), "transformer.h.0.attn.c_attn.weight": (8, 24)}
    extra = {"transformer.h.0.attn.bias": (1, 1, 16, 16), "lm_head.weight": (10, 8)}
    tied = {**config, "tie_word_embeddings": True}
    size = size_in(folder_of(tmp_path / "tied", tied, {**shapes, **extra}))
    assert (size.parameters, size.exact) == (80 + 192, True)
    own = size_in(
        folder_of(tmp_path / "own", {**config, "tie_word_embeddings": False}, {**shapes, **extra})
    )
    assert own.parameters == 80 + 192 + 80
    assert read_header(tmp_path / "tied").embeddings == 10


def test_packed_weights_are_not_counted_as_parameters(tmp_path):
    config = json.loads(CONFIG_MAPPING["llama"](num_hidden_layers=1).to_json_string())
    config = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
    size = size_in(folder_of(tmp_path / "m", config, {"model.embed_tokens.weight": (5, 4)}))
    assert size is None or not size.exact


@given(
    st.integers(1, 64), st.integers(8, 4096), st.integers(1, 16), st.floats(0.5, 3), st.booleans()
)
def test_the_shape_has_the_counted_parameters_whatever_the_architecture(
    layers, hidden, heads, more, tied
):
    numbers = {"layers": layers, "hidden": hidden, "heads": heads, "vocabulary": 1000}
    least = header_shape(ModelHeader("other", numbers, {}, "config.json", tied)).parameters
    counted = {"a.weight": (round(least * more),)}
    header = ModelHeader("other", numbers, counted, "the weights' headers", tied)
    shape = header_shape(header)
    assert (
        abs(shape.parameters - header.parameters) <= 3 * layers * hidden or shape.intermediate < 2
    )


def test_a_folder_whose_files_say_nothing_has_the_size_in_its_name_or_a_guess(tmp_path):
    folder = folder_of(tmp_path / "my-13b-model", {"model_type": "unheard-of"})
    assert size_at(str(folder)).known_from == "the name"
    assert size_at(str(folder_of(tmp_path / "mine", {}))).known_from == "a guess"
    hub = "hub:model:org/{}@" + "a" * 40
    assert size_at(hub.format("Llama-2-70b-hf")).shape.layers == 80
    assert size_at(hub.format("mine")).guessed
