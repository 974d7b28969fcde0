"""A small Qwen3-VL that lies in a hub cache exactly as Qwen3-VL-2B-Instruct lies there: what works with it by its hub
name works with the real one.

Two shards in bfloat16 with their index, tied embeddings, the official special tokens with their ids in a
vocabulary of 151,936, the official chat template, and the values of the official preprocessor and generation
settings. Only the layers are few and narrow, and the words that its tokenizer knows are those of the kit's own
prompts."""

import hashlib
import json
from pathlib import Path

NAME = "Qwen/Qwen3-VL-2B-Instruct"
COMMIT = "89644892e4d85e24eaac8bacfd4f463576704203"
WORDS = 151_643  # ids below are words, those from here on special tokens
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]  # from <tool_call> on they are words of their own, not special
IDS = {token: WORDS + place for place, token in enumerate(SPECIAL)}

CONFIG = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151_936,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": True,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
        "rope_theta": 5_000_000,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "initializer_range": 0.02,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "dtype": "bfloat16",
        "use_cache": True,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [1, 2, 3],
        "initializer_range": 0.02,
    },
}
GENERATION = {
    "bos_token_id": 151_643,
    "pad_token_id": 151_643,
    "do_sample": True,
    "eos_token_id": [151_645, 151_643],
    "top_p": 0.8,
    "top_k": 20,
    "temperature": 0.7,
    "repetition_penalty": 1.0,
    "transformers_version": "4.56.0",
}
IMAGES = {
    "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEOS = IMAGES | {
    "size": {"longest_edge": 25_165_824, "shortest_edge": 4096},
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def tokenizer():
    """A byte-level BPE of Qwen's form whose merges know the kit's prompts; the rest of the vocabulary are words that
    no text leads to."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from qwen_vl_kit.config import Protocol
    from qwen_vl_kit.protocol import turns

    made = Tokenizer(models.BPE())
    made.normalizer, made.decoder = normalizers.NFC(), decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [turns.messages(Protocol(prompt=prompt), [], [])[0]["content"] for prompt in ("brief", "rules")]
    made.train_from_iterator(
        texts * 8,
        trainers.BpeTrainer(
            vocab_size=4096,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    state = json.loads(made.to_str())
    known = state["model"]["vocab"]
    state["model"]["vocab"] = known | {f"Ġunused{place}": place for place in range(len(known), WORDS)}
    made = Tokenizer.from_str(json.dumps(state))
    special = SPECIAL.index("<tool_call>")
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[:special]])
    made.add_tokens([AddedToken(token, normalized=False, special=False) for token in SPECIAL[special:]])
    assert all(made.token_to_id(token) == place for token, place in IDS.items())
    return made


def template() -> str:
    "The official chat template."
    from qwen_vl_kit.model.processor import chat_template
    return chat_template()


def weights(config: dict, seed: int = 0) -> dict:
    """Random bfloat16 weights by their names on the hub, the tied head left out; the embedding is wide, or nothing
    would be learned from it."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3)
    return {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }


def files(
    config: dict = CONFIG, images: dict = IMAGES, generation: dict = GENERATION, chat: str | None = None, seed: int = 0
) -> dict[str, bytes]:
    "A model's files by name, as they are downloaded."
    from safetensors.torch import save

    chat, made, tensors = chat or template(), tokenizer(), weights(config, seed)
    state, names = json.loads(made.to_str()), sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1::2] for n in (1, 2)}
    added = {
        str(IDS[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": IDS[token] < IDS["<tool_call>"],
        }
        for token in SPECIAL
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:14],
        "bos_token": None,
        "chat_template": chat,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262_144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    plain = {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": images,
        "video_preprocessor_config.json": VIDEOS,
        "tokenizer_config.json": settings,
        "chat_template.json": {"chat_template": chat},
        "model.safetensors.index.json": index,
        "vocab.json": state["model"]["vocab"],
    }
    return {
        **{name: json.dumps(value, ensure_ascii=False).encode() for name, value in plain.items()},
        "tokenizer.json": made.to_str().encode(),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in state["model"]["merges"])]).encode(),
        **{shard: save({name: tensors[name] for name in held}, {"format": "pt"}) for shard, held in shards.items()},
    }


def lay(
    cache: Path, contents: dict[str, bytes] | None = None, name: str = NAME, commit: str = COMMIT, ref: str = "main"
) -> Path:
    """Put a model into a hub cache (what HF_HUB_CACHE names) as a download does: blobs, links to them, a ref. Returns
    the snapshot's folder."""
    repository = Path(cache) / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    for file, data in (files() if contents is None else contents).items():
        large = (
            file.endswith(".safetensors") or file == "tokenizer.json"
        )  # git-lfs names these by sha256, git the others by sha1
        blob = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (repository / "blobs" / blob).write_bytes(data)
        (snapshot / file).symlink_to(f"../../blobs/{blob}")
    return snapshot


def prompt(seed: int = 0, size: int = 288) -> list[dict]:
    "What configs/h200 shows: its rules, and a frame."
    import numpy as np

    from qwen_vl_kit.config import Protocol
    from qwen_vl_kit.protocol import turns

    frame = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return turns.messages(
        Protocol(prompt="rules", render_size=size, progress=True), [frame], ["do", "move_left"], urls=False
    )
