"""Small GGUF files, written from models that were made here."""

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

from nightschool.models.build import build_model
from tests.support.tokenizers_for_tests import TEMPLATE

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGED = "ab"
TOKENS = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), MERGED)
CONTROL, NORMAL = 3, 1
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def make_gguf(
    path, architecture="llama", *, quantisation="F32", pre="smollm", keys=None, extra=None, leave_out=(), seed=1
):
    """Write a file of `architecture` (llama or qwen2) with random weights and return the model that it holds.

    `keys` are further integers of the header, `extra` further tensors, `leave_out` tensors that are not written.
    """
    model = build_model({"model_type": architecture, **SHAPE}, len(TOKENS), seed, eos_token_id=2)
    kind = gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, model.config, pre)
    for key, value in (keys or {}).items():
        writer.add_uint32(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], SHAPE["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place in leave_out:
            continue
        # Norms and biases stay as they are, as llama.cpp writes them.
        stored = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(tensor.numpy(), stored)
        tensor.copy_(torch.from_numpy(gguf.dequantize(packed, stored)))
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            packed = _permuted(packed, SHAPE["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        writer.add_tensor(place, packed, raw_dtype=stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, np.asarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def _describe(writer, config, pre):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_pad_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)


def _permuted(array, heads):
    """The order of rows in which llama.cpp keeps queries and keys: the two halves of a head interleaved."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
