"A trace database as synth-ai 0.2.17 writes it."

import base64
import contextlib
import json
import sqlite3

import numpy as np

from qwen_vl_kit.game.images import png

SYNTH = """
CREATE TABLE session_traces (session_id VARCHAR PRIMARY KEY, created_at DATETIME NOT NULL,
    num_timesteps INTEGER NOT NULL,
    num_events INTEGER NOT NULL, num_messages INTEGER NOT NULL, metadata TEXT, experiment_id VARCHAR, embedding VECTOR);
CREATE TABLE session_timesteps (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL,
    step_id VARCHAR NOT NULL,
    step_index INTEGER NOT NULL, turn_number INTEGER, started_at DATETIME, completed_at DATETIME, num_events INTEGER,
    num_messages INTEGER, step_metadata TEXT, UNIQUE(session_id, step_id));
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL, timestep_id INTEGER,
    event_type VARCHAR NOT NULL,
    system_instance_id VARCHAR, event_time FLOAT, message_time INTEGER, created_at DATETIME, model_name VARCHAR,
    provider VARCHAR,
    input_tokens INTEGER, output_tokens INTEGER, total_tokens INTEGER, cost_usd INTEGER, latency_ms INTEGER,
    span_id VARCHAR,
    trace_id VARCHAR, call_records TEXT, reward FLOAT, terminated BOOLEAN, truncated BOOLEAN, system_state_before TEXT,
    system_state_after TEXT, metadata TEXT, event_metadata TEXT, embedding VECTOR,
    CHECK (event_type IN ('cais', 'environment', 'runtime')));
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL, timestep_id INTEGER,
    message_type VARCHAR NOT NULL,
    content TEXT NOT NULL, timestamp DATETIME, event_time FLOAT, message_time INTEGER, metadata TEXT, embedding VECTOR,
    CHECK (message_type IN ('user', 'assistant', 'system', 'tool_use', 'tool_result')));
CREATE TABLE outcome_rewards (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL,
    total_reward INTEGER NOT NULL,
    achievements_count INTEGER NOT NULL, total_steps INTEGER NOT NULL, created_at DATETIME NOT NULL,
    reward_metadata TEXT);
CREATE TABLE event_rewards (id INTEGER PRIMARY KEY AUTOINCREMENT, event_id INTEGER NOT NULL,
    session_id VARCHAR NOT NULL, message_id INTEGER,
    turn_number INTEGER, reward_value FLOAT NOT NULL, reward_type VARCHAR, "key" VARCHAR, annotation TEXT,
    source VARCHAR,
    created_at DATETIME NOT NULL);
"""


def write_synth(
    path, sessions=2, turns=3, size=64, states=True, by_metadata=True, text=False, change=lambda connection: None
):
    """A database as synth-ai writes it: gpt-4o-mini plays; turn 1 reaches collect_wood, the session's end knows of
    wake_up too."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SYNTH)
        for s in range(sessions):
            session = f"run-{s}"
            told = {
                "run_id": session,
                "env_name": "crafter",
                "policy_name": "crafter-react",
                "seed": 40 + s,
                "task_split": None,
                "official_score": 0.7,
                "judge_scores": {"quality": 0.25 + s},
                "model": "gpt-4o-mini",
            }
            connection.execute("INSERT INTO session_traces VALUES (?, ?, ?, ?, ?, ?, NULL, NULL)",
                               (session, f"2025-10-2{s}T10:00:00", turns, 2 * turns, 3 * turns, json.dumps(told)))
            connection.execute("INSERT INTO outcome_rewards VALUES (NULL, ?, 2, 2, ?, '2025-10-20', ?)",
                               (session, 2 * turns, json.dumps({"final_achievements": ["collect_wood", "wake_up"]})))
            for turn in range(turns):
                _write_turn(connection, session, turn, size, states, by_metadata, text)
        change(connection)
        connection.commit()
    return path


def _write_turn(connection, session, turn, size, states, by_metadata, text):
    step = connection.execute(
        "INSERT INTO session_timesteps (session_id, step_id, step_index, turn_number) VALUES (?, ?, ?, ?)",
        (session, f"decision_{turn}", turn, turn),
    ).lastrowid
    where = json.dumps({"turn": turn, "step_id": f"decision_{turn}"} if by_metadata else {})
    frame = np.random.default_rng([turn, len(session)]).integers(0, 255, (size, size, 3), dtype=np.uint8)
    url = "data:image/png;base64," + base64.b64encode(png(frame)).decode()
    parts = [{"type": "text", "text": "=== CRAFTER GAME STATE ==="}] * text + [
        {"type": "image_url", "image_url": {"url": url}}
    ]
    done = [{"tool_name": "interact_many", "arguments": {"actions": ["move_right", "do"][: 1 + (turn != 2)]}}]
    record = [
        {
            "output_tool_calls": [
                {"name": "interact_many", "arguments_json": '{"actions": ["move_right", "do"]}', "index": 0}
            ],
            "output_text": None,
        }
    ]
    for kind, content in (
        ("system", json.dumps({"role": "system", "text": "You play", "content": "You play Crafter."})),
        ("user", json.dumps({"role": "user", "text": "", "content": parts})),
        ("assistant", json.dumps(done)),
    ):
        connection.execute(
            "INSERT INTO messages (session_id, timestep_id, message_type, content, metadata) VALUES (?, ?, ?, ?, ?)",
            (session, step, kind, content, where),
        )
    connection.execute(
        "INSERT INTO events (session_id, timestep_id, event_type, model_name, provider, input_tokens, output_tokens, "
        "cost_usd, latency_ms, call_records, metadata) "
        "VALUES (?, ?, 'cais', 'gpt-4o-mini', 'custom', 3800, 21, 0, 900, ?, ?)",
        (session, step, json.dumps(record), where),
    )

    def state(after):
        reached = "collect_wood" if turn + after > 1 else "none"
        return (
            json.dumps(
                {"text": f"=== CRAFTER GAME STATE ===\nStep: {2 * (turn + after)}/10000\nAchievements: {reached}\n"}
            )
            if states
            else None
        )

    event = connection.execute(
        "INSERT INTO events (session_id, timestep_id, event_type, reward, terminated, truncated, system_state_before, "
        "system_state_after, metadata) VALUES (?, ?, 'environment', ?, 0, 0, ?, ?, ?)",
        (session, step, float(turn == 1), state(0), state(1), where),
    ).lastrowid
    if turn == 1:
        connection.execute(
            "INSERT INTO event_rewards (event_id, session_id, turn_number, reward_value, reward_type, annotation, "
            "created_at) "
            "VALUES (?, ?, 1, 1, 'unique_achievement_delta', ?, '2025')",
            (event, session, json.dumps({"achievements": ["collect_wood"]})),
        )
