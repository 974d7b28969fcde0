"""Traces of synth-ai, read into a store: whole, in part, with their own times; and what fails leaves nothing."""

import contextlib
import json
import sqlite3

import pytest
from commands import one_line
from stores import noise_store, run_export
from synth_traces import write_synth

from qwen_vl_kit.core import InputError
from qwen_vl_kit.foreign.synth import import_synth, timestamp
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.merge import merge_stores
from qwen_vl_kit.store.rows import read_rows
from qwen_vl_kit.store.traces import load_episodes, protocol_of, read_sessions


@pytest.fixture
def db(tmp_path):
    return noise_store(tmp_path / "rollouts.db")


@pytest.mark.parametrize("shape", [{}, {"states": False}, {"by_metadata": False}, {"text": True}])
def test_a_database_of_synth_ai_is_read_in(tmp_path, shape):
    count = import_synth(write_synth(tmp_path / "v3.db", **shape), tmp_path / "rollouts.db")
    assert count == {"episodes": 2, "turns": 6, "known": 0, "skipped": {}}
    (session, episode), _ = read_sessions(tmp_path / "rollouts.db")
    assert (episode.seed, episode.model, session["scores"]) == (40, "gpt-4o-mini", {"quality": 0.25, "official": 0.7})
    assert [turn.unlocked for turn in episode.turns] == [[], ["collect_wood"], ["wake_up"]]  # the end knew of one more
    assert [turn.reward for turn in episode.turns] == [0, 1, 0] and [turn.step for turn in episode.turns] == [0, 2, 4]
    assert [turn.altered for turn in episode.turns] == [
        False,
        False,
        True,
    ]  # what was done in turn 2 is not what was sampled
    assert (
        episode.usage("prompt_tokens") == 11_400
        and episode.usage("seconds") == pytest.approx(2.7)
        and not episode.usage("usd")
    )
    assert (protocol_of(tmp_path / "rollouts.db").observe, bool(episode.turns[0].text)) == \
        (("both", True) if shape.get("text") else ("image", False))
    with contextlib.closing(sqlite3.connect(tmp_path / "rollouts.db")) as connection:
        assert (
            json.loads(connection.execute("SELECT provenance FROM sources").fetchone()[0])["system_prompt"]
            == "You play Crafter."
        )


def test_what_was_read_in_keeps_its_own_time(tmp_path):
    def spoil(connection):
        connection.execute("UPDATE session_traces SET created_at = 'yesterday' WHERE session_id = 'run-2'")
        connection.execute(
            "UPDATE session_traces SET created_at = '2025-10-22 12:00:00.500+02:00' WHERE session_id = 'run-1'"
        )

    db = tmp_path / "rollouts.db"
    assert import_synth(write_synth(tmp_path / "v3.db", sessions=3, change=spoil), db)["skipped"] == {
        "its time cannot be read": 1
    }
    created = [timestamp(moment) for moment in ("2025-10-20T10:00Z", "2025-10-22T10:00:00.5Z")]
    assert [session["created"] for session, _ in read_sessions(db)] == created
    assert traces.episodes(db)["wall"].tolist() == pytest.approx([2.7, 2.7])  # not what reading them in took
    assert run_export(db, since="2025-10-21", val_fraction=0).numbers["episodes"] == 1


def test_what_was_read_in_can_be_exported_in_another_form(tmp_path):
    db = tmp_path / "rollouts.db"
    import_synth(write_synth(tmp_path / "v3.db"), db)
    rows = list(read_rows(run_export(db, form="plain", val_fraction=0).out / "train.jsonl"))
    assert {row["messages"][2]["content"] for row in rows} == {"move_right, do"} and len(rows) == 6
    assert run_export(db, scored_by="quality", min_judge_score=1.0, val_fraction=0).numbers["episodes"] == 1


def test_a_second_import_doubles_nothing(tmp_path):
    path, db = write_synth(tmp_path / "v3.db"), tmp_path / "rollouts.db"
    import_synth(path, db)
    before = traces.fingerprint(db)
    assert import_synth(path, db)["known"] == 2 and traces.fingerprint(db) == before


def test_a_session_that_cannot_be_read_does_not_take_the_others_along(tmp_path):
    def spoil(connection):
        connection.execute("UPDATE session_traces SET metadata = 'null' WHERE session_id = 'run-0'")
        connection.execute(
            "UPDATE messages SET content = replace(content, 'base64,', 'base64,!') WHERE session_id = 'run-1'"
        )
        connection.execute("DELETE FROM messages WHERE session_id = 'run-2'")
        connection.execute(
            "UPDATE messages SET content = substr(content, 1, 40) || '…' "
            "WHERE session_id = 'run-3' AND message_type = 'assistant'"
        )

    count = import_synth(write_synth(tmp_path / "v3.db", sessions=5, change=spoil), tmp_path / "rollouts.db")
    assert count["episodes"] == 2 and sum(count["skipped"].values()) == 3 and "it names no seed" in count["skipped"]
    cut = next(load_episodes(tmp_path / "rollouts.db"))
    assert cut.seed == 43 and cut.turns[0].decision.actions == ["move_right", "do"]  # the call's own record was whole


def test_other_files_are_no_database_of_synth_ai(tmp_path, db):
    whole = write_synth(tmp_path / "v3.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.db").write_text("no database " * 500)
    for path, words in (
        (tmp_path / "cut.db", "damaged"),
        (tmp_path / "text.db", "not a trace store"),
        (tmp_path / "none.db", "no such file"),
        (db, "not a trace database of synth-ai v3"),
    ):
        with pytest.raises(InputError, match=words) as error:
            import_synth(path, tmp_path / "rollouts.db")
        one_line(error)


@pytest.mark.parametrize("target", ["all.db", "new/all.db"])
def test_what_fails_leaves_no_target(tmp_path, db, target):
    "Neither an empty nor a partial store; one that was there stays as it was."
    def unreadable(connection):
        connection.execute("UPDATE session_traces SET metadata = 'null'")

    target, torn = tmp_path / target, tmp_path / "torn.db"
    torn.write_bytes(db.read_bytes()[:-5000])
    spoilt = tmp_path / "spoilt.db"  # whole for SQLite, so it is found out only when its last episode is copied
    spoilt.write_bytes(db.read_bytes())
    with sqlite3.connect(spoilt) as connection:
        connection.execute("UPDATE turns SET rewards = '[' WHERE session = (SELECT max(id) FROM sessions)")
    for fails in (lambda: merge_stores(target, db, tmp_path / "none.db"), lambda: merge_stores(target, db, torn),
                  lambda: merge_stores(target, spoilt), lambda: import_synth(db, target),
                  lambda: import_synth(tmp_path / "none.db", target),
                  lambda: import_synth(write_synth(tmp_path / "v3.db", change=unreadable), target)):
        with pytest.raises(InputError):
            fails()
        assert not target.exists() and not (tmp_path / "new").exists() and not list(tmp_path.glob("all.db*"))
        (tmp_path / "v3.db").unlink(missing_ok=True)
    merge_stores(target, db)
    before = traces.fingerprint(target)
    with pytest.raises(InputError):
        merge_stores(target, torn)
    assert traces.fingerprint(target) == before


def test_the_commands_merge_and_import(tmp_path, capsys):
    from qwen_vl_kit.runner.commands import main
    assert main(["import-synth", str(write_synth(tmp_path / "v3.db")), "--out", str(tmp_path / "a.db")]) == 0
    assert main(["merge", str(tmp_path / "all.db"), str(tmp_path / "a.db")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a.db: 2 episodes, 6 turns; 0 were there already, 0 left out",
        f"{tmp_path}/all.db: 2 episodes copied, 0 were there already",
    ]
    assert main(["merge", str(tmp_path / "all.db"), str(tmp_path / "none.db")]) == 2
    assert (
        capsys.readouterr().err
        == f"qvk: {tmp_path}/none.db: no such file; check the path, or run the stage that writes it\n"
    )


def test_paths_are_looked_for_where_the_user_stands(tmp_path, monkeypatch, capsys):
    from qwen_vl_kit.core import root
    from qwen_vl_kit.runner.commands import main
    home, here = root(), tmp_path / "here"
    here.mkdir()
    write_synth(here / "v3.db"), noise_store(here / "a.db", (1,)), noise_store(here / "b.db", (2,))
    (here / "collect.toml").write_text('seeds = "7"\n')
    (here / "run").mkdir()
    monkeypatch.setenv("QVK_ROOT", str(home))
    monkeypatch.chdir(here)
    assert main(["merge", "all.db", "a.db", "b.db"]) == 0
    assert main(["merge", "all.db", "a.db"]) == 0
    assert sorted(traces.episodes(here / "all.db").seed) == [1, 2]
    assert main(["import-synth", "v3.db", "--out", str(here / "new.db")]) == 0 and (here / "new.db").is_file()
    assert main(["check", "collect.toml"]) == 0
    capsys.readouterr()
    for command in ("verify", "show", "plan", "run"):
        assert main([command, "run"]) == 2
        assert str(here / "run") in capsys.readouterr().err, command  # found, and no run of ours
        assert main([command, "nowhere"]) == 2
        assert str(home / "nowhere") in capsys.readouterr().err
