"""Export: every rule drops what it should and keeps the rest, and what is written can be read by others."""

import base64
import contextlib
import io
import json
import re
import sqlite3
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from stores import PROTOCOL, WALK, episode, noise_episode, noise_store, rows, run_export, write_store

from qwen_vl_kit.config import ExportConfig, Protocol, validate
from qwen_vl_kit.core import InputError, digest, read_json
from qwen_vl_kit.game.images import frame_hash
from qwen_vl_kit.model.patches import decode_url
from qwen_vl_kit.protocol.turns import parse, prompt_hash
from qwen_vl_kit.runner.configs import load_config
from qwen_vl_kit.stages import export
from qwen_vl_kit.store.merge import merge_stores
from qwen_vl_kit.store.rows import numbered_rows, read_rows
from qwen_vl_kit.store.traces import Store

# ---- rules about episodes

WOOD, SAPLING = ["collect_wood"], ["collect_sapling"]


@pytest.fixture
def four(tmp_path):
    """Seed 1: a tree after 3 turns; 2: a tree and a sapling, by model b; 900003 (of the split val): nothing, turns to
    and fro on the same two frames; 1000004 (test): does the same thing 8 times. Stored on the first four days of
    2026; judged 0.1 to 0.4, but 1000004."""
    db = write_store(
        tmp_path / "rollouts.db",
        episode(1, unlocks={3: WOOD}),
        episode(2, unlocks={1: SAPLING, 5: WOOD}, model="b"),
        episode(900_003, ["move_left", "move_right"] * 3, frames="ababab"),
        episode(1_000_004, ["do"] * 8, unlocks={0: SAPLING}),
        scores={1: {"rubric": 0.1}, 2: {"rubric": 0.2, "gpt": 1.0}, 900_003: {"rubric": 0.3}},
    )
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("UPDATE sessions SET created = unixepoch('2026-01-01T12:00') + 86400 * (id - 1)")
        connection.commit()
    return db


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(seeds="2,900003"), (2, 3)),
        (dict(splits=["train"]), (1, 2)),
        (dict(splits=["val", "test"]), (3, 4)),
        (dict(models=["b"]), (2,)),
        (dict(since="2026-01-03"), (3, 4)),
        (dict(until="2026-01-02T12:00:00+00:00"), (1,)),
        (dict(since="2026-01-02T13:00:00+01:00"), (2, 3, 4)),
        (dict(min_reward=1.0), (1, 2, 4)),
        (dict(max_reward=1.0), (1, 3, 4)),
        (dict(min_achievements=2), (2,)),
        (dict(max_achievements=1), (1, 3, 4)),
        (dict(required_achievements=WOOD), (1, 2)),
        (dict(required_achievements=WOOD + SAPLING), (2,)),
        (dict(excluded_achievements=SAPLING), (1, 3)),
        (dict(min_turns=7), (4,)),
        (dict(max_turns=6), (1, 2, 3)),
        (dict(min_steps=7), (4,)),
        (dict(max_steps=7), (1, 2, 3)),
        (dict(scored_by="rubric", min_judge_score=0.2), (2, 3)),
        (dict(scored_by="rubric", max_judge_score=0.2), (1, 2)),
        (dict(scored_by="gpt", min_judge_score=0.5), (2,)),
        (dict(max_repeated_actions=7), (1, 2, 3)),
        (dict(max_repeated_actions=8), (1, 2, 3, 4)),
        (dict(drop_loops=True), (1, 2, 4)),
        (dict(min_unique_frames=3), (1, 2, 4)),
        (dict(best_share=0.5), (1, 2)),
        (dict(best_share=0.25), (2,)),
        (dict(offset=1), (2, 3, 4)),
        (dict(limit=3), (1, 2, 3)),
        (dict(offset=1, limit=2), (2, 3)),
        (dict(splits=["train"], best_share=0.5), (2,)),  # the best of what is left
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "".join(map(str, value)),
)
def test_a_rule_drops_what_it_should_and_keeps_the_rest(four, settings, kept):
    result = run_export(four, val_fraction=0, **settings)
    listed, stats = read_json(result.out / "kept.json"), read_json(result.out / "stats.json")
    assert tuple(session["seed"] % 100 for session in listed) == kept
    assert {row["metadata"]["seed"] % 100 for row in rows(result)} == set(kept)
    assert (
        set(stats["dropped_by"]) <= set(settings)
        and sum(stats["dropped_by"].values()) == 4 - len(kept) == stats["dropped_episodes"]
    )
    assert stats["episodes"] == len(kept) and stats["train_rows"] == sum(session["turns"] for session in listed)


def test_a_rule_that_leaves_nothing_names_itself(four):
    with pytest.raises(
        InputError, match="no episode is left: min_reward dropped 3, required_achievements dropped 1; loosen"
    ):
        run_export(four, min_reward=1.5, required_achievements=["eat_cow"])
    assert not (four.parent / "export").exists()


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(since="yesterday"), "key 'since': write a date as 2026-11-23"),
        (dict(best_share=0), "key 'best_share'"),
        (dict(limit=0), "key 'limit'"),
        (dict(extra_formats=["csv"]), "key 'extra_formats.0'"),
        (dict(extra_formats=["parquet", "parquet"]), "names something twice"),
        (dict(form="json"), "key 'form'"),
        (dict(min_rewards=1.0), "did you mean 'min_reward'?"),
        (dict(drop_loop=True), "did you mean 'drop_loops'?"),
        (dict(seeds="5-2"), "run backwards"),
        (dict(traces=3), "key 'traces"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(InputError, match=re.escape(says)):
        validate("export", settings)


# ---- rules about turns


def turns_of(result):
    return sorted((row["metadata"]["seed"], row["metadata"]["turn"]) for row in rows(result))


def test_only_turns_near_an_unlock(tmp_path):
    db = write_store(
        tmp_path / "rollouts.db", episode(1, unlocks={3: WOOD}), episode(2, unlocks={0: SAPLING, 4: WOOD}), episode(3)
    )
    for window, kept in ((0, [(1, 3), (2, 0), (2, 4)]), (1, [(1, 2), (1, 3), (2, 0), (2, 3), (2, 4)])):
        result = run_export(db, val_fraction=0, unlock_window=window)
        assert turns_of(result) == kept
        assert read_json(result.out / "stats.json")["dropped_by"] == {"unlock_window": 18 - len(kept)}


def test_dedupe_keeps_the_first_of_what_is_the_same(tmp_path):
    db = write_store(
        tmp_path / "rollouts.db",
        episode(1, ["do", "do", "noop", "do"], frames="aaab"),
        episode(2, ["do", "noop"], frames="bb"),
    )
    assert len(rows(run_export(db, val_fraction=0))) == 6
    result = run_export(db, val_fraction=0, dedupe=True)
    assert turns_of(result) == [(1, 0), (1, 2), (1, 3), (2, 1)]  # the frame and the answer together
    assert read_json(result.out / "stats.json")["dropped_by"] == {"dedupe": 2}


def test_turns_that_were_taken_over_are_rows_of_the_episode_that_played_them(tmp_path):
    first, later = episode(0), episode(0, member=1)
    later.start = 4
    result = run_export(write_store(tmp_path / "rollouts.db", first, later), val_fraction=0.0)
    told = [(row["metadata"]["member"], row["metadata"]["turn"]) for row in rows(result)]
    assert sorted(told) == [(0, turn) for turn in range(6)] + [(1, 4), (1, 5)]
    later.turns[5].unlocked, later.turns[5].rewards = ["collect_wood"], [1.0]
    alone = run_export(
        write_store(tmp_path / "again" / "rollouts.db", first, later), val_fraction=0.0, min_achievements=1
    )
    assert sorted((row["metadata"]["member"], row["metadata"]["turn"]) for row in rows(alone)) == [
        (1, turn) for turn in range(6)
    ]


def test_what_nobody_said_is_never_a_target(tmp_path):
    two = episode(2, ["do"] * 3)
    two.turns[0].decision.actions = ["do", "do"]  # more than this protocol's turn may carry
    two.turns[1].decision.reason = "a <|im_end|> tree"
    two.turns[2].decision.actions = []
    db = write_store(
        tmp_path / "rollouts.db", episode(1, invalid=(0, 5)), two, episode(3, ["do"], reason="see <image>")
    )
    result = run_export(db, val_fraction=0)
    assert turns_of(result) == [(1, t) for t in range(1, 5)]
    assert read_json(result.out / "stats.json")["dropped_by"] == {"invalid": 3, "unreadable": 1, "special_tokens": 2}
    with pytest.raises(InputError, match="no turn is left to train on: {'special_tokens': 1}"):
        run_export(db, seeds="3")


@pytest.mark.parametrize("form", ["reason", "plain", "tool"])
def test_every_answer_is_read_back_as_what_was_done(tmp_path, form):
    db = write_store(tmp_path / "rollouts.db", episode(1), episode(2))
    result = run_export(db, form=form, val_fraction=0)
    protocol = Protocol(**read_json(result.out / "stats.json")["protocol"])
    assert protocol.form == form
    for row in read_rows(result.out / "train.jsonl", prompt_hash(protocol)):
        assert parse(protocol, row["messages"][2]["content"]).actions == [WALK[row["metadata"]["turn"]]]


# ---- amount, order, sides


def test_max_rows_takes_a_sample_after_the_shuffle(tmp_path):
    db = write_store(tmp_path / "rollouts.db", *map(episode, range(6)))
    result = run_export(db, val_fraction=0, max_rows=10)
    assert len(rows(result)) == 10 and len({row["metadata"]["seed"] for row in rows(result)}) > 2
    assert read_json(result.out / "stats.json")["dropped_by"] == {"max_rows": 26}
    drawn = turns_of(result)
    assert (
        turns_of(run_export(db, val_fraction=0, max_rows=10))
        == drawn
        != turns_of(run_export(db, val_fraction=0, max_rows=10, seed=1))
    )


def test_a_stratified_split_has_all_levels_and_no_seed_twice(tmp_path):
    db = tmp_path / "rollouts.db"
    write_store(
        db,
        *(episode(seed, unlocks={t: WOOD for t in range(seed % 5)}, member=m) for seed in range(20) for m in range(2)),
    )
    kept = read_json(run_export(db, val_fraction=0.25, stratify=True).out / "kept.json")
    held = {session["seed"]: session["achievements"] for session in kept if session["side"] == "val"}
    assert sorted(held.values()) == [0, 1, 2, 3, 4]
    assert not set(held) & {session["seed"] for session in kept if session["side"] == "train"}


def test_the_same_traces_give_the_same_bytes_whatever_the_order_of_storing(tmp_path):
    made = [episode(seed, unlocks={2: WOOD}) for seed in range(4)]
    one, two = (
        write_store(tmp_path / "1" / "rollouts.db", *made),
        write_store(tmp_path / "2" / "rollouts.db", *made[::-1]),
    )
    for settings in ({}, {"stratify": True, "best_share": 0.5}):
        outs = [run_export(db, **settings).out for db in (one, two)]
        for name in ("train.jsonl", "val.jsonl", "stats.json", "kept.json"):
            assert digest(outs[0] / name) == digest(outs[1] / name)


def test_several_stores_are_read_as_one(tmp_path):
    parts = [
        write_store(tmp_path / f"{name}.db", *map(episode, seeds)) for name, seeds in (("a", (1, 2)), ("b", (3, 4)))
    ]
    whole = tmp_path / "whole.db"
    merge_stores(whole, *parts)
    several = run_export(parts, tmp_path / "several", val_fraction=0)
    assert (several.out / "train.jsonl").read_bytes() == (
        run_export(whole, tmp_path / "one", val_fraction=0).out / "train.jsonl"
    ).read_bytes()
    assert {name: path.name for name, path in several.inputs.items()} == {"traces": "a.db", "traces_1": "b.db"}
    result = run_export([*parts, whole], tmp_path / "twice", val_fraction=0)  # what is in two of them counts once
    assert read_json(result.out / "stats.json")["dropped_by"] == {"known": 4}


def test_episodes_of_two_prompts_are_refused_unless_their_forms_are_made_one(tmp_path):
    a = write_store(tmp_path / "a.db", episode(1), protocol=Protocol(prompt="brief", render_size=64, form="tool"))
    b = write_store(tmp_path / "b.db", episode(2))
    c = write_store(tmp_path / "c.db", episode(3), protocol=Protocol(prompt="brief", render_size=64, history=0))
    with pytest.raises(InputError, match="episodes of 2 prompts"):
        run_export([a, b])
    assert run_export([a, b], form="reason").numbers["episodes"] == 2
    with pytest.raises(InputError, match="episodes of 2 prompts") as error:
        run_export([a, b, c], form="reason")
    told = json.loads(
        re.search(r"prompts = (\[.*?\])", str(error.value))[1]
    )  # what the message says does it: a and b are the most
    assert len(told) == 2 and run_export([a, b, c], form="reason", prompts=told).numbers["episodes"] == 2
    kept = run_export([a, b, c], prompts=[prompt_hash(Protocol(prompt="brief", render_size=64, history=0))[:8]])
    assert kept.numbers["episodes"] == 1 and read_json(kept.out / "stats.json")["dropped_by"]["prompts"] == 2


# ---- what others read


def test_parquet_is_loaded_by_datasets_with_images_decoded_lazily(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets
    from trl.data_utils import prepare_multimodal_messages

    result = run_export(
        write_store(tmp_path / "rollouts.db", *(episode(seed, unlocks={1: WOOD}) for seed in range(10))),
        extra_formats=["parquet"],
    )
    loaded = datasets.load_dataset(
        "parquet",
        data_files={side: str(result.out / f"{side}.parquet") for side in ("train", "val")},
        cache_dir=str(tmp_path / "cache"),
    )
    lines = {side: rows(result, side) for side in ("train", "val")}
    assert {side: len(part) for side, part in loaded.items()} == {side: len(found) for side, found in lines.items()}
    assert loaded["train"].features["images"] == datasets.List(datasets.Image())
    plain = loaded["train"].cast_column("images", datasets.List(datasets.Image(decode=False)))
    for raw, row, line in zip(plain, loaded["train"], lines["train"]):
        frame = decode_url(line["messages"][1]["content"][0]["image_url"]["url"])
        assert isinstance(raw["images"][0]["bytes"], bytes)  # not decoded until it is asked for
        assert (np.array(row["images"][0].convert("RGB")) == frame).all()
        assert row["metadata"] == line["metadata"]
        system, user, said = line["messages"]
        assert row["messages"] == [
            system,
            {"role": "user", "content": user["content"][-1]["text"]},
            said,
        ]  # ms-swift takes no list for a system
        shown = prepare_multimodal_messages(row["messages"], row["images"])[1]["content"]  # as TRL reads them
        assert shown == [{"type": "image", "image": row["images"][0]}, user["content"][-1]]
    assert (result.out / "train.parquet").stat().st_size < (result.out / "train.jsonl").stat().st_size * 0.8


def test_sharegpt_is_what_llama_factory_documents(tmp_path):
    # hiyouga/LLaMA-Factory, data/README.md: "Multimodal Image Dataset" (the number of images equals the <image>
    # tokens, images are paths
    # in the dataset's folder) and "OpenAI Format" (the tags); a .jsonl is one of its file types
    result = run_export(
        write_store(
            tmp_path / "rollouts.db",
            *map(episode, range(5)),
            protocol=Protocol(prompt="brief", render_size=64, frames=2),
        ),
        extra_formats=["sharegpt"],
    )
    folder = result.out / "sharegpt"
    told = read_json(folder / "dataset_info.json")
    assert sorted(told) == ["qwen_vl_kit_train", "qwen_vl_kit_val"]
    for entry in told.values():
        assert entry["formatting"] == "sharegpt" and entry["columns"] == {"messages": "messages", "images": "images"}
        side = entry["file_name"].removesuffix(".jsonl")
        lines = [json.loads(line) for line in open(folder / entry["file_name"])]
        assert len(lines) == result.numbers[f"{side}_rows"]
        for line, row in zip(lines, rows(result, side)):
            roles = [message[entry["tags"]["role_tag"]] for message in line["messages"]]
            assert roles == [entry["tags"][f"{role}_tag"] for role in ("system", "user", "assistant")]
            texts = [message[entry["tags"]["content_tag"]] for message in line["messages"]]
            assert all(isinstance(text, str) for text in texts) and sum(text.count("<image>") for text in texts) == len(
                line["images"]
            )
            urls = [part["image_url"]["url"] for part in row["messages"][1]["content"] if part["type"] == "image_url"]
            assert [(folder / path).read_bytes() for path in line["images"]] == [
                base64.b64decode(url.partition(",")[2]) for url in urls
            ]
    assert len(list((folder / "images").iterdir())) == 30  # each once
    export.run(ExportConfig(traces=str(tmp_path / "rollouts.db")), result.out)
    assert not folder.exists()  # what is no longer asked for is not left from before


def test_image_tokens_are_those_of_the_processor_and_every_row_survives_it(tmp_path):
    from qwen_vl_kit.model import encode
    from qwen_vl_kit.model.processor import make_processor
    from qwen_vl_kit.model.tiny import tiny_tokenizer
    processor = make_processor(tiny_tokenizer())
    for size in (64, 288):
        db = write_store(
            tmp_path / str(size) / "rollouts.db", episode(1, size=size), protocol=Protocol(render_size=size, frames=2)
        )
        result = run_export(db, val_fraction=0)
        tokens = read_json(result.out / "stats.json")["qwen3_vl_image_tokens"]
        for row in rows(result):
            sample = encode.encode(processor, row["messages"])
            assert sample.input_ids.count(processor.image_token_id) == tokens * len(sample.frames) > 0
            assert sum(label != -100 for label in sample.labels) > 2


# ---- the seed's TOMLs

VISION = """
[filter]
input_db = "{db}"
output_dir = "{out}"
min_steps_per_episode = 5
min_achievements_per_episode = 0
max_steps_per_episode = 50
detect_loops = true
max_repeated_actions = 5
min_unique_states = 3
filter_errors = true
filter_timeouts = true
export_format = "sft_jsonl"
include_images = true
include_metadata = true

[sft]
max_sequence_length = 2048
deduplicate = true
shuffle = true
require_valid_tool_calls = true
filter_empty_responses = true

[split]
enabled = true
val_fraction = 0.1
random_seed = 42
stratify_by = "achievements"
train_file = "train.jsonl"
val_file = "val.jsonl"

[output]
save_stats = true
stats_file = "filter_stats.json"
save_filtered_episode_ids = true
"""


def test_the_seeds_own_filter_for_vision_does_all_that_it_says(four, tmp_path):
    path = tmp_path / "filter_vision_sft.toml"
    path.write_text(VISION.format(db=four, out=tmp_path / "sft"))
    loaded = load_config(path, "export")
    assert (
        loaded.min_turns,
        loaded.max_turns,
        loaded.drop_loops,
        loaded.max_repeated_actions,
        loaded.min_unique_frames,
    ) == (5, 50, True, 5, 3)
    assert (loaded.dedupe, loaded.stratify, loaded.val_fraction, loaded.seed) == (True, True, 0.1, 42)
    assert any("max_sequence_length: a row is never cut" in line for line in loaded.notices)
    from qwen_vl_kit.runner.synth import synth_out
    assert synth_out("export", path, loaded) == tmp_path / "sft"
    result = export.run(loaded, tmp_path / "sft")
    assert [session["seed"] for session in read_json(result.out / "kept.json")] == [1, 2]
    assert read_json(result.out / "stats.json")["dropped_by"] == {"drop_loops": 1, "max_repeated_actions": 1}


@pytest.mark.parametrize(
    "line, field, value",
    [
        ("limit = 100", "max_rows", 100),
        ("offset = 3", "offset", 3),
        ("shuffle = false", "shuffle", False),
        ("shuffle_seed = 7", "seed", 7),
        ("min_official_score = 0.5", "min_reward", 0.5),
        ("max_official_score = 2.0", "max_reward", 2.0),
        ('splits = ["train"]', "splits", ["train"]),
        ('models = ["gpt-4o-mini"]', "models", ["gpt-4o-mini"]),
        ("min_judge_scores = {quality = 0.5}", "min_judge_score", 0.5),
        ("min_judge_scores = {quality = 0.5}", "scored_by", "quality"),
        ("max_judge_scores = {quality = 0.9}", "max_judge_score", 0.9),
        ('min_created_at = "2025-10-01"', "since", "2025-10-01"),
        ("max_created_at = 2025-10-01T06:00:00Z", "until", "2025-10-01T06:00:00+00:00"),
        ('input_dbs = "a.db, b.db"', "traces", ["a.db", "b.db"]),
        ('db = ["a.db", "b.db"]', "traces", ["a.db", "b.db"]),
        ('require_achievements = ["eat_cow"]', "required_achievements", ["eat_cow"]),
        ("unlock_window = 3", "unlock_window", 3),
        ("best_share = 0.5", "best_share", 0.5),
        ('extra_formats = ["parquet"]', "extra_formats", ["parquet"]),
        ("max_turns = 50", "max_turns", 50),
    ],
)
def test_a_key_of_the_seeds_filter_acts(tmp_path, line, field, value):
    (tmp_path / "filter.toml").write_text(f"[filter]\n{line}\n")
    assert getattr(load_config(tmp_path / "filter.toml", "export"), field) == value


@pytest.mark.parametrize("line, says", [
    ("min_rewrd = 1", "unknown key 'filter.min_rewrd' for export; did you mean 'filter.min_reward'?"),
    ('min_official_score = "abc"', "key 'filter.min_official_score': input should be a valid number"),
    ("min_official_score = nan", "key 'filter.min_official_score'"),
    ("filter_errors = false", "key 'filter.filter_errors': false is not supported"),
    ("min_judge_scores = {a = 0.5, b = 0.5}", "is not one judge and its score"),
    ('min_created_at = "soon"', "key 'filter.min_created_at': write a date")])
def test_a_bad_key_of_the_seeds_filter_is_told(tmp_path, line, says):
    (tmp_path / "filter.toml").write_text(f"[filter]\n{line}\n")
    with pytest.raises(InputError, match=re.escape(says)) as error:
        load_config(tmp_path / "filter.toml", "export")
    assert str(error.value).startswith(str(tmp_path / "filter.toml")) and "\n" not in str(error.value)


# ---- bad rows, full disks


def png(width, height, data=b""):
    def part(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + part(b"IDAT", data)
        + part(b"IEND", b"")
    )


def drawn(width=64, height=64, mode="RGB", **how):
    "A black picture as Pillow writes it."
    file = io.BytesIO()
    PIL.Image.new(mode, (width, height)).save(file, "PNG", **how)
    return file.getvalue()


def url_of(blob):
    return "data:image/png;base64," + base64.b64encode(blob).decode()


@pytest.mark.parametrize(
    "image, says",
    [
        ("", "the image is not a PNG data URL but empty"),
        (None, "the image is not a PNG data URL but null"),
        (7, "the image is not a PNG data URL but a number"),
        (["data:image/png;base64,"], "the image is not a PNG data URL but a list"),
        ("https://example.com/a.png", "the image is not a PNG data URL but a web address"),
        ("pictures/a.png", "the image is not a PNG data URL but the path of a file"),
        ("data:image/jpeg;base64,/9j/", "the image is not a PNG data URL but image/jpeg"),
        ("data:image/png;base64,", "not a PNG image"),
        ("data:image/png;base64,!!!!", "the image is not base64"),
        (url_of(b"\xff\xd8\xff\xe0 a JPEG" * 9), "not a PNG image but a JPEG"),
        (url_of(png(64, 64)[:40]), "not a PNG image"),
        (url_of(png(64, 64, b"no zlib")), "not a PNG image"),
        (url_of(png(30_000, 30_000, zlib.compress(bytes(1000)))), "an image of 30000x30000 pixels"),
        (url_of(png(0, 64)), "an image of 0x64 pixels"),
        (url_of(drawn(4000, 16)), "an image of 4000x16 pixels, more than 200 times"),
        (url_of(drawn(1, 1)), "an image of 1x1 pixels where the protocol shows 64x64"),
        (url_of(drawn(mode="I;16")), "an image of 16 bits a channel"),
        (url_of(drawn(mode="RGBA")), "an image with transparent pixels"),
        (url_of(drawn(mode="LA")), "an image with transparent pixels"),
        (url_of(drawn(mode="P", transparency=0)), "an image with transparent pixels"),
        (
            url_of(drawn(save_all=True, append_images=[PIL.Image.new("RGB", (64, 64), "red")])),
            "an animation of 2 frames",
        ),
    ],
    ids=str,
)
def test_a_bad_image_in_a_row_is_told_with_its_line(tmp_path, image, says):
    path = run_export(write_store(tmp_path / "rollouts.db", episode(1)), val_fraction=0).out / "train.jsonl"
    lines = [json.loads(line) for line in open(path)]
    lines[2]["messages"][1]["content"][0]["image_url"]["url"] = image
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError) as error:
        list(read_rows(path))
    assert (
        str(error.value).startswith(f"{path}:3: {says}")
        and "\n" not in str(error.value)
        and len(str(error.value)) < 400
    )


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    "A file of three rows in a folder of its own, as another tool leaves it, and a function that changes the third."
    path = (
        run_export(write_store(tmp_path_factory.mktemp("made") / "rollouts.db", episode(1)), val_fraction=0).out
        / "train.jsonl"
    )
    lines = path.read_text().splitlines()[:3]
    there = tmp_path_factory.mktemp("foreign") / "train.jsonl"

    def change(**changes):
        row = json.loads(lines[2])
        for name, value in changes.items():
            if name in ("system", "user", "assistant"):
                message = row["messages"][("system", "user", "assistant").index(name)]
                message.update(value if isinstance(value, dict) else {"content": value})
            elif name == "metadata":
                row["metadata"].update(value)
            else:
                row[name] = value
        there.write_text("\n".join([*lines[:2], json.dumps(row)]) + "\n")
        return there
    return change


def text(words):
    return [{"type": "text", "text": words}]


CALL = {
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "interact_many", "arguments": {"actions": ["do"]}}}],
}


@pytest.mark.parametrize("changes, says", [
    (dict(assistant=text("tree -> do")), "tree -> do"),
    (dict(assistant=[*text("tree "), {"type": "output_text", "text": "-> do"}]), "tree -> do"),
    (dict(assistant=CALL), '<tool_call>\n{"name": "interact_many", "arguments": {"actions": ["do"]}}\n</tool_call>'),
    (dict(assistant=CALL | {"content": "tree", "refusal": None, "annotations": []}), "tree\n<tool_call>\n"),
    (dict(assistant="<think> -> do"), "<think> -> do"),
    (dict(assistant="B\u00e4ume \U0001f332 -> do"), "B\u00e4ume \U0001f332 -> do")], ids=str)
def test_what_means_the_same_in_another_form_is_read(foreign, changes, says):
    rows = list(read_rows(foreign(**changes)))
    assert [message["role"] for message in rows[2]["messages"]] == ["system", "user", "assistant"]
    assert (
        rows[2]["messages"][2]["content"].startswith(says)
        and rows[2]["messages"][:2] == rows[1]["messages"][:1] + rows[2]["messages"][1:2]
    )
    assert isinstance(rows[2]["messages"][0]["content"], str)


ONE = dict(role="user", content="next")


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(assistant="look <|image_pad|> -> do"), "the assistant's text holds the special token <|image_pad|>"),
        (dict(assistant=text("<|im_end|>")), "the assistant's text holds the special token"),
        (dict(assistant=CALL | {"content": "<|endoftext|>"}), "the assistant's text holds the special token"),
        (
            dict(
                assistant={"content": None, "tool_calls": [{"function": {"name": "a", "arguments": "<|video_pad|>"}}]}
            ),
            "the assistant's text holds the special token <|video_pad|>",
        ),
        (dict(user=text("<|vision_start|>")), "the user's text holds the special token <|vision_start|>"),
        (dict(system="<|im_start|>system"), "the system's text holds the special token <|im_start|>"),
        (dict(assistant="tree \ud83d -> do"), "the assistant's text holds half a character"),
        (dict(assistant="a\0b"), "the assistant's text holds a NUL"),
        (dict(assistant=None), "the assistant's content is null"),
        (dict(assistant=""), "the assistant says nothing"),
        (dict(assistant=[]), "the assistant says nothing"),
        (dict(assistant=text(" \n")), "the assistant says nothing"),
        (dict(assistant=["do"]), "the assistant's content has text"),
        (dict(assistant=3), "the assistant's content is a number"),
        (
            dict(assistant=[{"type": "image_url", "image_url": {"url": "x"}}]),
            "the assistant's content has a part of type 'image_url'",
        ),
        (
            dict(assistant={"tool_calls": [{"function": {"arguments": "{}"}}], "content": ""}),
            "a tool call without a name",
        ),
        (dict(assistant={"tool_calls": {"function": {}}}), "tool_calls are an object"),
        (dict(assistant={"reasoning_content": "hm"}), "the assistant's message has 'reasoning_content'"),
        (dict(assistant={"weight": 0}), "the assistant's message has 'weight'"),
        (dict(assistant={"loss": False}), "the assistant's message has 'loss'"),
        (dict(user=[]), "the user's content is empty"),
        (dict(user=None), "the user's content is null"),
        (dict(user=[{"type": "video", "video": "a.mp4"}]), "the user's content has a part of type 'video'"),
        (dict(user=text(None)), "a text part of the user's content holds null"),
        (dict(user="next"), "0 images where 1 is promised"),
        (dict(system="play well"), "the system's text is not that of the protocol"),
        (dict(tools=[{"name": "act"}]), "the row has tools beside"),
        (dict(images=["a.png"]), "the row has images beside"),
        (dict(messages=[]), "messages are not system, user, assistant but none"),
        (
            dict(messages=[ONE, ["x"], {"role": "tool"}]),
            "messages are not system, user, assistant but user, a list, tool",
        ),
        (dict(messages=None, conversations=[]), "a row without messages (it has messages, metadata, conversations)"),
        (dict(metadata={"prompt_hash": ""}), "no prompt_hash in metadata"),
        (dict(metadata={"prompt_hash": "0" * 64}), "prompt 00000000 where"),
        (dict(metadata={"seed": "7"}), "seed in metadata is text: '7'"),
        (dict(metadata={"seed": 10**30}), "seed in metadata is a number"),
        (dict(metadata={"turn": True}), "turn in metadata is a boolean"),
        (dict(metadata={"run": ["x"]}), "run in metadata is a list"),
        (dict(metadata={"protocol": "{"}), "the protocol in metadata cannot be read"),
        (dict(metadata={"turn": float("nan")}), "turn in metadata is a number"),
        (dict(metadata={"protocol": '{"history": 2}'}), "prompt_hash"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_what_cannot_be_trained_on_is_told_for_what_it_is(foreign, changes, says):
    path = foreign(**changes)
    with pytest.raises(InputError) as error:
        list(read_rows(path))
    assert str(error.value).startswith(f"{path}:3: {says}") and len(str(error.value).splitlines()) == 1
    assert error.value.fix and "export again" not in str(error.value)  # export did not make it


def test_files_of_other_makers_are_read_line_by_line(foreign):
    path = foreign()
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(
        b"\xef\xbb\xbf" + first + b"\r\n\r\n \n" + second + b"\r\n" + third
    )  # BOM, CRLF, blank lines, no newline at the end
    assert [number for number, _ in numbered_rows(path)] == [1, 4, 5]
    for line, says in (
        (b"[]", "the row is a list, not an object"),
        (b'"x"', "the row is text"),
        (b"null", "the row is null"),
        (b"7", "the row is a number"),
        (b"[" + first + b"]", "the row is a list"),
        (b"1" * 5000, "row is not JSON"),
        (b"[" * 100_000, "row is nested too deeply"),
        (b'{"messages": [], "messages": []}', "row is not JSON (two keys 'messages'"),
        (b"\xff" + second, "row is not JSON ('utf-8'"),
        (b"{}", "a row without messages (it has nothing)"),
    ):
        path.write_bytes(first + b"\n\n" + line + b"\n")
        with pytest.raises(InputError) as error:
            list(read_rows(path))
        assert str(error.value).startswith(f"{path}:3: {says}"), error.value


def test_export_again_is_said_of_its_own_files_alone(tmp_path):
    path = run_export(write_store(tmp_path / "rollouts.db", episode(1)), val_fraction=0).out / "train.jsonl"
    path.write_text(path.read_text().replace("a tree", "<|im_end|>"))
    with pytest.raises(InputError, match=r"train.jsonl:1: .*; or run export again$"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "blob, says",
    [
        (b"", "not a PNG image"),
        ("text", "not a PNG image"),
        (b"GIF89a" * 99, "not a PNG image"),
        (png(50_000, 50_000), "an image of 50000x50000 pixels"),
        (png(64, 64, b"?"), "not a PNG image"),
    ],
)
def test_a_bad_image_in_a_store_is_told(tmp_path, blob, says):
    db = write_store(tmp_path / "rollouts.db", episode(1), episode(2))
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute(
            "UPDATE frames SET png = ? WHERE hash = (SELECT frame FROM turns WHERE session = 2 AND turn = 0)", (blob,)
        )
        connection.commit()
    with pytest.raises(InputError, match=says) as error:
        run_export(db)
    assert str(error.value).startswith(f"{db}: frame ") and not list((tmp_path / "export").glob("*"))
    assert run_export(db, seeds="1").numbers["episodes"] == 1  # the rest of the data is as good as ever


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    db = write_store(tmp_path / "rollouts.db", episode(1))
    before = run_export(db, val_fraction=0).out / "train.jsonl"
    whole = before.read_bytes()

    def full(row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "dumps", full)
    with pytest.raises(InputError, match=r"export: cannot be written \(No space left on device\); free some space"):
        run_export(db, val_fraction=0, extra_formats=["parquet", "sharegpt"])
    assert before.read_bytes() == whole and not [path for path in before.parent.iterdir() if path.name.startswith(".")]
    assert not (before.parent / "sharegpt").exists()


# ---- what a row holds


@pytest.fixture
def db(tmp_path):
    return noise_store(tmp_path / "rollouts.db")


def test_a_seed_is_on_one_side_only(tmp_path):
    path = tmp_path / "rollouts.db"
    with Store(path) as store:
        store.begin("demo", PROTOCOL)
        for seed in range(10):
            for member in range(3):
                store.add(noise_episode(seed, member=member, turns=2))
    out = run_export(path, val_fraction=0.3).out
    sides = [{row["metadata"]["seed"] for row in read_rows(out / f"{side}.jsonl")} for side in ("train", "val")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(10)) and len(sides[1]) == 3


def test_every_image_is_the_frame_that_was_seen(db):
    out = run_export(db).out
    for row in read_rows(out / "train.jsonl"):
        parts = [part for part in row["messages"][1]["content"] if part["type"] == "image_url"]
        assert len(parts) == 1
        assert frame_hash(decode_url(parts[0]["image_url"]["url"])) == row["metadata"]["frame"]
        assert row["metadata"]["prompt_hash"] == read_json(out / "stats.json")["prompt_hash"]


def test_rules_explain_an_empty_result(db):
    for settings, words in (
        ({"min_achievements": 5}, "min_achievements dropped 3"),
        ({"models": ["gpt"]}, "models dropped 3"),
        ({"seeds": "900-905"}, "seeds dropped 3"),
        ({"min_reward": 99.0}, "min_reward dropped 3"),
    ):
        with pytest.raises(InputError, match=words):
            run_export(db, **settings)
    assert not (db.parent / "export").exists()


def test_shuffle_limit_and_seed_act(db):
    def order(**settings):
        rows = read_rows(run_export(db, val_fraction=0, **settings).out / "train.jsonl")
        return [(row["metadata"]["seed"], row["metadata"]["turn"]) for row in rows]

    plain = order(shuffle=False)
    assert plain == sorted(plain) and len(plain) == 15
    assert order() == order() != plain and sorted(order()) == plain
    assert order(seed=1) != order()
    assert {seed for seed, _ in order(limit=1)} == {1}


def test_frames_of_another_size_are_refused(tmp_path):
    with pytest.raises(InputError, match="is 32x32, not 64 pixels square"):
        run_export(noise_store(tmp_path / "rollouts.db", size=32))


def test_a_torn_row_is_told_with_its_line(db):
    path = run_export(db).out / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:len(lines[3]) // 2]]))
    with pytest.raises(InputError, match="train.jsonl:4"):
        list(read_rows(path))
    row = json.loads(lines[0])
    row["messages"][1]["content"][0]["image_url"]["url"] = ""
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match="train.jsonl:1: the image is not a PNG data URL"):
        list(read_rows(path))
