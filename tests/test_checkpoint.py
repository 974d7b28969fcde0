"""Models' files as others leave them: played as transformers plays them, or refused in one line that says what is
wrong, before weights are read."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import QVK
from safetensors.torch import load_file, save_file

from qwen_vl_kit.core import InputError
from qwen_vl_kit.engine.base import Request, Sampling
from qwen_vl_kit.engine.factory import create_engine
from qwen_vl_kit.engine.hf import HFEngine
from qwen_vl_kit.model import encode, packing
from qwen_vl_kit.model import hub as model_hub
from qwen_vl_kit.model.checkpoint import tiny_folder
from qwen_vl_kit.model.hub import find_checkpoint
from qwen_vl_kit.model.loading import load_model, load_without_weights
from qwen_vl_kit.model.patches import image_tokens
from qwen_vl_kit.model.processor import assistant_labels, sampling_filters

TINY = tiny_folder()
EMBEDDING = "model.language_model.embed_tokens.weight"
END = 551  # <|im_end|> of tiny
LATER = "<|im_start|>assistant\\n"  # where its template asks for a reply
THINKING = "<think>\\n".join([LATER, ""]).join((TINY / "chat_template.jinja").read_text().rsplit(LATER, 1))
# drops the system's message
DROPS = "{%- set messages = messages[1:] if messages|length > 1 and messages[0].role == 'system' else messages %}"
MESSAGES = [
    {"role": "system", "content": "play crafter"},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": np.random.default_rng(0).integers(0, 256, (144, 144, 3), dtype=np.uint8)},
            {"type": "text", "text": "next"},
        ],
    },
]


class Folder:
    "A copy of `tiny` to be changed."

    def __init__(self, place: Path):
        self.path = Path(shutil.copytree(TINY, place / "model"))

    def json(self, name: str, without=(), part: str = "", **values) -> "Folder":
        "Other values in a JSON file, or in a `part` of it."
        whole = json.loads((self.path / name).read_text()) if (self.path / name).exists() else {}
        inner = whole[part] if part else whole
        inner.update(values)
        for key in without:
            inner.pop(key)
        (self.path / name).write_text(json.dumps(whole))
        return self

    def text(self, name: str, text: str | bytes) -> "Folder":
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def without(self, *names: str) -> "Folder":
        for name in names:
            (self.path / name).unlink()
        return self

    def tensors(self, change) -> "Folder":
        "Other weights: what `change` makes of them."
        save_file({name: tensor.clone() for name, tensor in change(load_file(TINY / "model.safetensors")).items()},
                  self.path / "model.safetensors", {"format": "pt"})
        return self

    def shards(self, change=lambda shards: shards, metadata=True) -> "Folder":
        "The weights in two files, with an index; `change` what is in which."
        tensors = load_file(TINY / "model.safetensors")
        names, held = sorted(tensors), {}
        shards = change(
            {f"model-0000{n}-of-00002.safetensors": {name: tensors[name] for name in names[n - 1 :: 2]} for n in (1, 2)}
        )
        for file, part in shards.items():
            save_file({name: tensor.clone() for name, tensor in part.items()}, self.path / file, {"format": "pt"})
            held |= dict.fromkeys(part, file)
        self.text(
            "model.safetensors.index.json", json.dumps({"weight_map": held} | ({"metadata": {}} if metadata else {}))
        )
        return self.without("model.safetensors")


def stock_prompt(folder: Path, template: str):
    "Ids and image inputs that transformers makes of the messages with a folder's files."
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    inputs = images([MESSAGES[1]["content"][0]["image"]], return_tensors="pt")
    text = tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True)
    pads = "<|image_pad|>" * (int(inputs["image_grid_thw"].prod()) // images.merge_size**2)
    return tokenizer(text.replace("<|image_pad|>", pads))["input_ids"], inputs


PLAYED = {  # what is changed in a copy, and the template that it then has
    "template in chat_template.json": lambda f: (
        f.without("chat_template.jinja").json("chat_template.json", chat_template=THINKING),
        THINKING,
    ),
    "template in tokenizer_config.json": lambda f: (
        f.without("chat_template.jinja").json("tokenizer_config.json", chat_template=THINKING),
        THINKING,
    ),
    "templates by name": lambda f: (
        f.without("chat_template.jinja").json(
            "tokenizer_config.json",
            chat_template=[{"name": "default", "template": THINKING}, {"name": "tool_use", "template": "none"}],
        ),
        THINKING,
    ),
    "template in processor_config.json": lambda f: (
        f.without("chat_template.jinja").json("processor_config.json", chat_template=THINKING),
        THINKING,
    ),
    "thinking": lambda f: (f.text("chat_template.jinja", THINKING), THINKING),
    "image settings in both files": lambda f: (
        f.json(
            "processor_config.json",
            image_processor=json.loads((TINY / "preprocessor_config.json").read_text())
            | {"image_mean": [0.4, 0.5, 0.6]},
        ),
        None,
    ),
    "no rescaling": lambda f: (f.json("preprocessor_config.json", do_rescale=False), None),
    "no normalising": lambda f: (f.json("preprocessor_config.json", do_normalize=False), None),
    "nearest pixels": lambda f: (
        f.json("preprocessor_config.json", resample=0, size={"shortest_edge": 256, "longest_edge": 4096}),
        None,
    ),
    "pixels in place of size": lambda f: (
        f.json("preprocessor_config.json", ["size"], min_pixels=256, max_pixels=4096),
        None,
    ),
    "16 bits of two kinds": lambda f: (
        f.tensors(lambda t: {n: x.half() if "q" in n else x.bfloat16() for n, x in t.items()}),
        None,
    ),
    "a head of its own": lambda f: (
        f.tensors(lambda t: t | {"lm_head.weight": t[EMBEDDING] * 2})
        .json("config.json", tie_word_embeddings=False)
        .json("config.json", part="text_config", tie_word_embeddings=False),
        None,
    ),
    "the embedding, again as head": lambda f: (f.tensors(lambda t: t | {"lm_head.weight": t[EMBEDDING]}), None),
    "more rows than words": lambda f: (
        f.tensors(lambda t: t | {EMBEDDING: torch.cat([t[EMBEDDING], torch.zeros(64, 128)])}).json(
            "config.json", part="text_config", vocab_size=640
        ),
        None,
    ),
    "older spelling of rope": lambda f: (
        f.json(
            "config.json",
            ["rope_parameters"],
            "text_config",
            rope_theta=5e5,
            rope_scaling={"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
        ),
        None,
    ),
    "two shards": lambda f: (f.shards(), None),
    "settings of others": lambda f: (
        f.json("config.json", unsloth_version="1", torch_dtype="bfloat16", auto_map={"AutoModel": "remote.Model"}).text(
            "remote.py", "raise SystemExit(9)"
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", PLAYED)
def test_what_transformers_plays_is_played_the_same(name, tmp_path):
    "Ids of the prompt, and logits in float32."
    from transformers import AutoModelForImageTextToText

    folder, template = PLAYED[name](Folder(tmp_path))
    loaded = load_model(folder.path)
    sample = encode.encode(loaded.processor, MESSAGES)
    ids, inputs = stock_prompt(folder.path, template or (TINY / "chat_template.jinja").read_text())
    assert sample.input_ids == ids
    batch = packing.pack([sample], loaded.processor, 4096, frames=True)
    with torch.no_grad():
        ours = loaded.model.eval()(
            **{name: values for name, values in batch.items() if name not in ("where", "labels")}
        ).logits
        row = torch.tensor([ids])
        stock = AutoModelForImageTextToText.from_pretrained(folder.path, dtype=torch.float32).eval()
        plain = stock(input_ids=row, mm_token_type_ids=(row == stock.config.image_token_id).int(), **inputs).logits
    assert (ours - plain).abs().max() < 1e-5 * max(1, plain.abs().max())


def twice(shards: dict) -> dict:
    "A tensor in both of two shards."
    one, other = shards.values()
    return dict(zip(shards, (one, other | {min(one): one[min(one)] * 2})))


REFUSED = {
    "a million layers": (
        lambda f: f.json("config.json", part="text_config", num_hidden_layers=10**6),
        "num_hidden_layers is 1000000",
    ),
    "a million blocks": (lambda f: f.json("config.json", part="vision_config", depth=10**6), "depth is 1000000"),
    "a billion pixels": (
        lambda f: f.json("preprocessor_config.json", size={"shortest_edge": 10**9, "longest_edge": 10**10}),
        "3,908,529 tokens",
    ),
    "not a number": (
        lambda f: f.json("config.json", part="text_config", rms_norm_eps=float("nan")),
        "config.json: not JSON (ValueError: NaN",
    ),
    "a mark at the beginning": (lambda f: f.text("config.json", b"\xef\xbb\xbf{}"), "config.json: not JSON"),
    "other letters": (
        lambda f: f.text("generation_config.json", '{"eos_token_id": "é"}'.encode("latin-1")),
        "generation_config.json: not JSON",
    ),
    "deep": (lambda f: f.text("config.json", '{"a":' * 100_000), "config.json: not JSON (RecursionError"),
    "a list as type": (lambda f: f.json("config.json", model_type=["qwen3_vl"]), "model_type ['qwen3_vl']"),
    "a text part in 4 bits": (
        lambda f: f.json("config.json", part="text_config", quantization_config={"quant_method": "gptq"}),
        "quantised (gptq)",
    ),
    "compressed": (
        lambda f: f.json("config.json", compression_config={"quant_method": "compressed-tensors"}),
        "quantised (compressed-tensors)",
    ),
    "heads that do not divide": (
        lambda f: f.json("config.json", part="vision_config", num_heads=3),
        "no multiple of num_heads 3",
    ),
    "no image token": (lambda f: f.json("config.json", ["image_token_id"]), "image_token_id in config.json 151655"),
    "an adapter beside it": (
        lambda f: f.text("adapter_config.json", "{}"),
        "an adapter_config.json lies beside the model",
    ),
    "a link to nothing": (
        lambda f: (f.without("generation_config.json").path / "generation_config.json").symlink_to("blob") or f,
        "generation_config.json is a link to a file that is not there",
    ),
    "a pointer for a template": (
        lambda f: f.text("chat_template.jinja", "version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of git-lfs",
    ),
    "a pointer for merges": (
        lambda f: f.text("merges.txt", "version https://git-lfs.github.com/spec/v1\n"),
        "merges.txt: a pointer of git-lfs",
    ),
    "two sets of weights": (
        lambda f: shutil.copy(TINY / "model.safetensors", f.shards().path) and f,
        "model.safetensors lies beside model-00001",
    ),
    "a tensor twice": (lambda f: f.shards(twice), "and again in model-00002"),
    "an index without metadata": (lambda f: f.shards(metadata=False), "model.safetensors.index.json: has no metadata"),
    "an index that leads away": (
        lambda f: f.text("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "../b.safetensors"}}'),
        "names no shards beside it",
    ),
    "a head that is not the embedding": (
        lambda f: f.tensors(lambda t: t | {"lm_head.weight": t[EMBEDDING] * 2}),
        "lm_head.weight is not the embed",
    ),
    "8 bits": (
        lambda f: f.tensors(lambda t: t | {EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}),
        "is stored as F8_E4M3",
    ),
    "an end that is a word": (
        lambda f: f.json("generation_config.json", eos_token_id="<|im_end|>"),
        "is not a token of the tokenizer",
    ),
    "an end among lists": (lambda f: f.json("generation_config.json", eos_token_id=[[END]]), "[551] is not a token"),
    "an end that is none": (lambda f: f.json("generation_config.json", eos_token_id=[END, -1]), "-1 is not a token"),
    "images of no colour": (
        lambda f: f.json("preprocessor_config.json", image_std=[0, 0, 0]),
        "image settings cannot be used",
    ),
    "colours in words": (
        lambda f: f.json("preprocessor_config.json", image_mean=["a", "b", "c"]),
        "image settings cannot be used",
    ),
    "half patches": (lambda f: f.json("preprocessor_config.json", patch_size=16.0), "not whole numbers"),
    "an unknown filter": (lambda f: f.json("preprocessor_config.json", resample=77), "Unknown resampling filter"),
    "a template without system": (
        lambda f: f.text(
            "chat_template.jinja",
            "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{%- endif %}" + THINKING,
        ),
        "chat template cannot be used",
    ),
    "a template that drops it": (
        lambda f: f.text("chat_template.jinja", DROPS + THINKING),
        "leaves out the system's message",
    ),
    "a template that asks for nothing": (
        lambda f: f.text("chat_template.jinja", THINKING.replace("if add_generation_prompt", "if false")),
        "leaves out the beginning of a reply",
    ),
    "a template in a list": (lambda f: f.text("chat_template.json", "[]"), "chat_template.json: not a JSON object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_played_is_refused_in_a_line(name, tmp_path):
    change, words = REFUSED[name]
    folder = change(Folder(tmp_path))
    with pytest.raises(InputError) as raised:
        load_without_weights(str(folder.path))
    assert words in str(raised.value) and str(raised.value).isprintable() and len(str(raised.value)) < 600


@pytest.mark.process
def test_the_command_refuses_before_memory_is_spent(tmp_path):
    "Exit status 2, one line, nothing left, in the memory of the libraries."
    folder = Folder(tmp_path).json("config.json", part="text_config", num_hidden_layers=10**7).path
    command = [*QVK, "benchmark", "--config", "configs/demo/benchmark.toml", "--out", tmp_path / "out",
               "--set", f"model={folder}", "--set", 'arms=["base"]', "--set", "seeds=1000000", "--set", "horizon=s2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300,
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30,) * 2))
    assert ended.returncode == 2 and "num_hidden_layers" in ended.stderr.splitlines()[-1], ended.stderr
    assert not list((tmp_path / "out").rglob("*"))


def test_weights_that_compute_no_numbers_are_reported_by_name(tmp_path):
    folder = Folder(tmp_path).tensors(lambda t: t | {EMBEDDING: t[EMBEDDING] * float("nan")}).path
    engine = HFEngine(load_model(folder))
    with pytest.raises(InputError, match="computes no numbers"):
        engine.generate([Request(MESSAGES, (0,))], Sampling(1.0, 4))


def test_frames_that_would_have_to_be_resized_are_refused_where_they_are_not(tmp_path):
    loaded, _ = load_without_weights(str(Folder(tmp_path).json("preprocessor_config.json", do_resize=False).path))
    with pytest.raises(InputError, match="150x150 pixels is no multiple of 16; set render_size to 144"):
        image_tokens(loaded.processor, np.zeros((150, 150, 3), np.uint8))


def test_what_a_template_opens_is_not_learned_even_where_it_grows_into_what_follows(tmp_path):
    """A prompt ends `<think>` and a line break; in rows of a thinking model two breaks, which are one token, and
    `</think>` follow."""
    processor = load_without_weights(str(Folder(tmp_path).text("chat_template.jinja", THINKING).path))[0].processor
    tokenizer = processor.tokenizer
    row = tokenizer("<|im_start|>assistant\n<think>\n\n</think>do<|im_end|>", add_special_tokens=False)["input_ids"]
    learned = tokenizer.decode([token for token in assistant_labels(row, processor) if token != -100])
    assert "<think>" not in learned and learned.endswith("</think>do<|im_end|>")


COMMITS = ["0123456789abcdef0123456789abcdef01234567", "0123456fedcba9876543210fedcba9876543210f"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub cache in which own/model lies at two commits, the first as branch main and refs/pr/1; its folder."
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--own--model"
    for commit in COMMITS:
        snapshot = repository / "snapshots" / commit
        for folder in (repository / "blobs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for file in TINY.iterdir():
            blob = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, repository / "blobs" / blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    for ref in ("main", "refs/pr/1"):
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(COMMITS[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize(
    "revision, place",
    [("", 0), ("main", 0), ("refs/pr/1", 0), (COMMITS[1], 1), (COMMITS[1].upper(), 1), ("0123456F", 1)],
)
def test_a_revision_is_found_however_it_is_written(hub, revision, place):
    assert load_without_weights("own/model", revision)[0].commit == COMMITS[place]


def test_a_revision_that_is_not_in_the_cache_is_refused_with_what_is(hub):
    with pytest.raises(InputError, match=" or ".join(COMMITS)):
        find_checkpoint("own/model", "0123456")
    with pytest.raises(InputError, match="0123456789ab or 0123456fedcb"):
        find_checkpoint("own/model", "v2")
    shutil.rmtree(hub / "refs")
    with pytest.raises(InputError, match="set revision to what the cache has of it: 0123456789ab"):
        find_checkpoint("own/model")


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "no model is named"),
        ("own/" + "x" * 5000, "File name too long"),
        ("own/mo\ndel", "is not a name"),
        ("https://huggingface.co/own/model", "is not a name"),
        (str(TINY / "config.json"), "a file, and a model"),
    ],
)
def test_names_that_name_nothing(hub, name, words):
    with pytest.raises(InputError) as raised:
        find_checkpoint(name)
    assert words in str(raised.value) and str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_a_folder_of_the_cache_itself_is_told_from_a_model(hub):
    with pytest.raises(InputError, match="name the model own/model, or one of the folders in snapshots"):
        load_without_weights(str(hub))


def test_settings_that_are_not_applied_are_all_told(tmp_path):
    folder = (
        Folder(tmp_path)
        .json(
            "generation_config.json", repetition_penalty=1.05, no_repeat_ngram_size=3, stop_strings=["."], num_beams=1
        )
        .path
    )
    assert sampling_filters(folder) == {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "stop_strings": ["."]}


def test_a_server_of_our_own_ends_replies_where_the_model_does(monkeypatch):
    monkeypatch.setitem(os.environ, "OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    request, sampling = Request([{"role": "user", "content": "a"}], (0,)), Sampling(1.0, 4)
    body = create_engine("server", "tiny", tokens=True).client.body(request, sampling)
    assert body["stop_token_ids"] == [END] and body["return_token_ids"]
    assert "stop_token_ids" not in create_engine("server", "tiny").client.body(request, sampling)


@pytest.fixture
def answering(hub, monkeypatch):
    "What a hub on this machine answers to everything: `answering.status`, `.headers` and `.body`."
    import http.server
    import threading

    from huggingface_hub import constants

    class Answer(http.server.BaseHTTPRequestHandler):
        status, headers_out, body = 200, {}, b"<html>sign in</html>"

        def do_GET(self):
            self.send_response(Answer.status)
            for name, value in {**Answer.headers_out, "Content-Length": str(len(Answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(Answer.body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield Answer
        server.shutdown()


@pytest.mark.parametrize(
    "status, headers, words",
    [
        (401, {}, "401"),
        (403, {"X-Error-Code": "GatedRepo"}, "asks for consent"),
        (404, {"X-Error-Code": "RepoNotFound"}, "has no model"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no revision 'main'"),
        (500, {}, "500"),
        (200, {}, "JSONDecodeError"),
        (302, {"Location": "/"}, "redirects"),
    ],
)
def test_whatever_the_hub_answers(answering, tmp_path, monkeypatch, status, headers, words):
    """A model that is in the cache loads, unless the hub says that there is no such revision; another is refused in
    its words."""
    from huggingface_hub import constants

    answering.status, answering.headers_out = status, headers
    if headers.get("X-Error-Code") != "RevisionNotFound":
        assert find_checkpoint("own/model").commit == COMMITS[0]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(InputError) as raised:
        find_checkpoint("own/model")
    assert words in str(raised.value) and str(raised.value).isprintable()


def test_a_hub_that_never_answers_is_not_waited_for(hub, tmp_path, monkeypatch):
    "It takes a connection, and that is all: a model in the cache loads all the same, and another is refused."
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr(model_hub, "HUB_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert find_checkpoint("own/model").commit == COMMITS[0]
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        with pytest.raises(InputError, match="cannot be had from the hub .ReadTimeout"):
            find_checkpoint("own/model")
