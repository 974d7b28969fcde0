"""Runs that travel: what arrives is what was sent, whoever was killed on the way, and nothing else."""

import contextlib
import errno
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from commands import SMALL, one_line, qvk
from fsspec.implementations.local import LocalFileSystem
from runs import alike, kill_when, lora

from qwen_vl_kit.core import InputError, digest, read_json, read_jsonl, root
from qwen_vl_kit.store import inventory
from qwen_vl_kit.store.inventory import BLOCK
from qwen_vl_kit.store.manifest import verify
from qwen_vl_kit.store.traces import fingerprint
from qwen_vl_kit.store.travel import Remote, pull, push


def files(folder: Path) -> dict[str, bytes]:
    "The files of a run by relative name, without what is known of this machine alone."
    paths = [path for path in folder.rglob("*") if path.is_file() and inventory.PLACE not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def run(collected, tmp_path):
    "A run's folder to be changed."
    return Path(shutil.copytree(collected, tmp_path / "a run"))


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return f"file://{tmp_path}/place" if request.param == "file" else f"memory://{tmp_path.name}/place"


def test_what_arrives_is_what_was_sent_and_verifies(run, url, tmp_path):
    first = push(run, url)
    assert first.bytes == sum(map(len, set(files(run).values()))) and first.changed == first.files == len(files(run))
    assert push(run, url) == first._replace(changed=0, bytes=0)
    pull(url, tmp_path / "there")
    assert files(tmp_path / "there") == files(run) and verify(tmp_path / "there") == []
    assert pull(url, tmp_path / "there") == first._replace(changed=0, bytes=0)


def test_only_what_changed_is_moved_and_what_is_gone_goes(run, url, tmp_path):
    big = run / "sft" / "weights.bin"
    big.parent.mkdir()
    big.write_bytes(os.urandom(2 * BLOCK) + b"end")
    push(run, url)
    pull(url, tmp_path / "there")
    with open(big, "r+b") as file:
        file.seek(BLOCK + 5)
        file.write(b"other")
    (run / "collect" / "metrics.jsonl").unlink()
    done = push(run, url)
    assert (done.changed, done.bytes) == (2, BLOCK)
    assert pull(url, tmp_path / "there").changed == 2
    assert files(tmp_path / "there") == files(run)
    named = {block for entry in Remote(url).index().values() for block in entry.blocks}
    assert set(Remote(url).block_sizes()) == named  # nothing is kept that no file needs


def test_a_change_of_the_same_size_at_the_same_time_is_seen(run, url):
    path = run / "collect" / "note.txt"
    path.write_text("one")
    push(run, url)
    times = path.stat()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    push(run, url)
    assert Remote(url).index()["collect/note.txt"].sha256 == digest("two")


# A store and a journal that grow without a pause, a checkpoint that comes and goes, until the pipe is closed.
WRITER = """
import json, os, select, shutil, sqlite3, sys
from pathlib import Path

work = Path(sys.argv[1])
(work / "checkpoints").mkdir(parents=True)
store = sqlite3.connect(work / "rollouts.db", isolation_level=None)
store.execute("PRAGMA journal_mode = WAL")
store.execute("CREATE TABLE pairs (one INTEGER, other BLOB)")
journal, count = open(work / "calls.jsonl", "ab", buffering=0), 0
while not select.select([sys.stdin], [], [], 0)[0]:
    count += 1
    store.execute("BEGIN")
    store.execute("INSERT INTO pairs VALUES (?, randomblob(3000))", (count,))
    store.execute("INSERT INTO pairs VALUES (?, randomblob(3000))", (count,))
    line = json.dumps({"count": count, "text": "x" * 5000}).encode()
    journal.write(line[:2000])
    store.execute("COMMIT")
    journal.write(line[2000:] + b"\\n")
    if count % 10 == 0:
        new = work / "checkpoints" / f"checkpoint-{count}"
        new.mkdir()
        (new / "weights.bin").write_bytes(str(count).encode() * 100_000)
        (new / "trainer_state.json").write_text("{}")
        shutil.rmtree(work / "checkpoints" / f"checkpoint-{count - 20}", ignore_errors=True)
    if count == 10:
        print("ready", flush=True)
"""


@pytest.mark.process
def test_a_run_that_is_written_to_arrives_whole(tmp_path):
    run, url = tmp_path / "run", f"file://{tmp_path}/place"
    work, copy = run / "grpo" / ".work", tmp_path / "there" / "grpo" / ".work"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout.readline() == "ready\n"
        for _ in range(8):
            push(run, url)
            pull(url, tmp_path / "there", force=True)
            with contextlib.closing(sqlite3.connect(copy / "rollouts.db")) as store:
                assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                rows, pairs = store.execute("SELECT count(*), count(DISTINCT one) FROM pairs").fetchone()
            lines = (copy / "calls.jsonl").read_text().splitlines(keepends=True)
            counts = [json.loads(line)["count"] for line in lines]
            assert rows == 2 * pairs >= 20 and counts == list(range(1, len(counts) + 1)) and lines[-1].endswith("\n")
            assert len(counts) >= pairs - 1  # a call is written before its episode ends
            [*checkpoints] = (copy / "checkpoints").iterdir()
            assert checkpoints
            for checkpoint in checkpoints:
                count = checkpoint.name.removeprefix("checkpoint-")
                assert (checkpoint / "weights.bin").read_text() == count * 100_000
                assert (checkpoint / "trainer_state.json").is_file()
    finally:
        writer.communicate("stop")
    assert writer.returncode == 0


# Each life pushes or pulls, and ends by a real SIGKILL. Every other one kills itself at one of the events that Python
# reports to auditors (a file is opened, renamed, removed, a folder is listed ...); the rest are killed from outside.
# After each, what is there is either what was there before or what was on its way, whole.
LIVES = """
import json, os, random, shutil, signal, sys
from pathlib import Path
from qwen_vl_kit.store import travel
from qwen_vl_kit.store.manifest import verify

run, url, there = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
dice, parent = random.Random(5), os.getpid()

def live(act, events):
    pid = os.fork()
    if not pid:
        left = iter(range(dice.randrange(events)))
        if events:
            sys.addaudithook(lambda event, values: next(left, None) is None and signal.raise_signal(9))
        act()
        os._exit(0)
    return pid

def end(act, number, events):
    "How a life ended: 9, or 0 if it had done its work before."
    if number % 2:
        return os.waitpid(live(act, events), 0)[1]
    pid = live(act, sys.maxsize)
    for _ in range(dice.randrange(30_000)):
        os.stat(run)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

def change(number):
    (run / "collect" / "checkpoints" / f"{number % 5}.bin").write_bytes(dice.randbytes(100_000))

travel.push(run, url)
ends = []
for number in range(20):
    change(number)
    dice.random()
    ends.append(end(lambda: travel.push(run, url), number, 120))
    shutil.rmtree(there, ignore_errors=True)
    travel.pull(url, there)
    assert verify(there) == [], verify(there)
travel.push(run, url)
for number in range(20):
    dice.random()
    ends.append(end(lambda: travel.pull(url, there), number, 120))
    if (there / "collect" / "manifest.json").is_file():
        assert verify(there) == [], verify(there)
    if not ends[-1]:
        change(number)
        travel.push(run, url)
        if number % 3:
            shutil.rmtree(there)
travel.pull(url, there)
print(json.dumps(ends))
"""


@pytest.mark.process
def test_forty_kills_leave_nothing_that_is_taken_for_good(run, tmp_path):
    checkpoints = run / "collect" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "large.bin").write_bytes(os.urandom(2 * BLOCK + 1))
    url, there = f"file://{tmp_path}/place", tmp_path / "there"
    done = subprocess.run(
        [sys.executable, "-c", LIVES, str(run), url, str(there)],
        cwd=root(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    assert len(ends) == 40 and set(ends) <= {0, 9} and ends[:20].count(9) >= 10 and ends[20:].count(9) >= 10, ends
    assert files(there) == files(run) and verify(there) == []
    assert push(run, url).bytes == 0


def test_keys_and_what_lies_outside_stay(run, url, tmp_path):
    (tmp_path / "private.txt").write_text("outside")
    for name in (".env", "collect/openai.env", "collect/server.pem", ".aws/config", "client_secret.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("KEY=hidden")
    (run / "collect" / "out.txt").symlink_to(tmp_path / "private.txt")
    (run / "outside").symlink_to(tmp_path)
    (run / "collect" / "key.txt").symlink_to(run / ".env")
    (run / "collect" / "same.db").symlink_to("rollouts.db")
    push(run, url)
    pull(url, tmp_path / "there")
    names = {name for name in files(tmp_path / "there") if name != "collect/same.db"}
    assert names == {name for name in files(run) if name.startswith("collect/")} - {
        "collect/openai.env", "collect/server.pem", "collect/out.txt", "collect/key.txt", "collect/same.db"
    }
    assert not (tmp_path / "there" / "collect" / "same.db").is_symlink()
    shutil.copy(run / ".env", tmp_path / "there" / ".env")
    (run / "collect" / "run.html").unlink()
    push(run, url)
    pull(url, tmp_path / "there")
    assert (tmp_path / "there" / ".env").is_file()  # nor is one removed


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", ".travel/urls.json", ".env", "collect"])
def test_an_index_that_leads_elsewhere_is_refused(run, tmp_path, name):
    place = tmp_path / "place"
    push(run, f"file://{place}")
    index = read_json(place / "index.json")
    index["files"][name] = index["files"]["collect/run.html"]
    (place / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="its index names") as error:
        pull(f"file://{place}", tmp_path / "there")
    assert one_line(error) and not (tmp_path / "there").exists() and not (tmp_path / "outside").exists()


def test_links_in_the_way_are_not_followed(run, tmp_path):
    url, there = f"file://{tmp_path}/place", tmp_path / "there"
    push(run, url)
    (tmp_path / "elsewhere").mkdir()
    there.mkdir()
    (there / "collect").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a folder or a link is in the way"):
        pull(url, there)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("fault, reason", [
    (lambda place: (place / "index.json").write_bytes((place / "index.json").read_bytes()[:-100]), "is damaged"),
    (lambda place: shutil.rmtree(place / "objects"), "is missing"),
    (lambda place: [path.write_bytes(b"x" + path.read_bytes()[1:]) for path in (place / "objects").iterdir()],
     "is damaged"),
    (lambda place: (place / "index.json").unlink(), "no run was pushed there"),
])
def test_a_damaged_place_is_one_line_and_a_push_mends_it(run, tmp_path, fault, reason):
    place, there = tmp_path / "place", tmp_path / "there"
    push(run, f"file://{place}")
    fault(place)
    with pytest.raises(InputError, match=reason) as error:
        pull(f"file://{place}", there)
    assert one_line(error) and files(there) == {} if there.exists() else True
    for path in (place / "objects").glob("*"):
        if digest(path) != path.name:
            path.unlink()  # as the message says
    push(run, f"file://{place}", force=True)
    pull(f"file://{place}", there)
    assert files(there) == files(run)


class FullDisk(LocalFileSystem):
    "A file system with room for so many bytes more."

    protocol, room = "fulldisk", 0

    def pipe_file(self, path, value, **options):
        FullDisk.room -= len(value)
        if FullDisk.room < 0:
            super().pipe_file(path, value[:len(value) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().pipe_file(path, value)


def test_a_full_remote_disk_is_one_line_and_the_push_goes_on(run, tmp_path):
    fsspec.register_implementation("fulldisk", FullDisk, clobber=True)
    url = f"fulldisk://{tmp_path}/place"
    FullDisk.room = 10_000_000
    push(run, url)
    (run / "collect" / "checkpoints").mkdir()
    for number in range(2):
        (run / "collect" / "checkpoints" / f"{number}.bin").write_bytes(os.urandom(30_000))
    FullDisk.room = 50_000
    with pytest.raises(InputError, match="no space left on device") as error:
        push(run, url)
    one_line(error)
    assert pull(url, tmp_path / "there").files == len(files(run)) - 2
    FullDisk.room = 10_000_000
    assert push(run, url).bytes == 30_000  # the other one was there
    pull(url, tmp_path / "there")
    assert files(tmp_path / "there") == files(run)


def test_work_at_either_end_is_not_overwritten(run, url, tmp_path):
    other, journal = tmp_path / "other", "collect/metrics.jsonl"
    push(run, url)
    pull(url, other)
    (other / journal).write_text("theirs\n")
    push(other, url)
    (run / journal).write_text("ours\n")
    for act in (lambda: push(run, url), lambda: pull(url, run)):
        with pytest.raises(InputError, match=f"{journal}.*--force"):
            act()
    assert (run / journal).read_text() == "ours\n"
    pull(url, run, force=True)
    assert (run / journal).read_text() == "theirs\n"
    (tmp_path / "third" / "collect").mkdir(parents=True)
    (tmp_path / "third" / "collect" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="has work that is not at .*mine.txt"):
        pull(url, tmp_path / "third")
    pull(url, tmp_path / "third", force=True)
    assert files(tmp_path / "third") == files(other)


@pytest.mark.parametrize("argv, reason", [
    (("push", "no-such-run", "{place}"), "no such folder"),
    (("pull", "{place}", "{place}-run"), "no run was pushed there"),
    (("push", "{run}", "nowhere://x/y"), "Protocol not known: nowhere"),
    (("push", "{run}", "sftp://me:hunter2@host/x"), "a password in a URL"),
    (("push", "{run}", "{run}/place"), "lies in the run's folder"),
    (("push", "{run}", "file:///proc/x"), "no such bucket or folder"),
    (("push", "{run}", "file:///dev/null/x"), "not a directory"),
])
def test_what_cannot_be_is_one_line(run, tmp_path, argv, reason):
    done = qvk(*(word.format(run=run, place=tmp_path / "place") for word in argv))
    assert done.code == 2 and reason in one_line(done.err) and "hunter2" not in done.err + done.out
    assert not (tmp_path / "place-run").exists()


@pytest.mark.parametrize("scheme, package", [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_library_that_is_missing_is_named(run, scheme, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(InputError, match=f"not installed .*{package}") as error:
        push(run, f"{scheme}://bucket/run")
    one_line(error)


SHORT = {
    "collect.seeds": "0-59",
    "horizon": "s20",
    "sft.max_steps": 40,
    "sft.eval_steps": 5,
    "sft.batch_size": 8,
    "sft.eval_rows": 8,
}
MIRRORED = f"""
import sys
from qwen_vl_kit.runner.run import run_all
from qwen_vl_kit.store.mirror import mirroring
with mirroring(sys.argv[1], sys.argv[2], pause=0.0):
    run_all("configs/demo", sys.argv[1], last="sft", overrides={SHORT})
"""


@pytest.mark.process
@pytest.mark.slow
def test_machines_that_die_cost_what_was_not_pushed(tmp_path):
    run, url = tmp_path / "run", f"file://{tmp_path}/place"

    def is_there(pattern, size=0):
        with contextlib.suppress(InputError):
            entries = (Remote(url).index() or {}).items()
            return any(re.fullmatch(pattern, name) and entry.size > size for name, entry in entries)

    for pattern, size in [("collect/.work/rollouts.db", 200_000), ("sft/.work/checkpoints/.*/trainer_state.json", 0)]:
        kill_when(lambda: is_there(pattern, size), [sys.executable, "-c", MIRRORED, str(run), url])  # noqa: B023
        shutil.rmtree(run)
    words = ["run", "configs/demo", "--to", "sft"]
    for name, value in SHORT.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    done = qvk(*words, "--out", run, "--mirror", url)
    assert done.code == 0 and f"note: the run goes on from {url}" in done.err, done.err
    assert read_json(run / "collect" / "manifest.json")["numbers"]["earlier_episodes"] > 0
    resumed = [row["step"] for row in read_jsonl(run / "sft" / "metrics.jsonl")]
    assert "collect    already done" in done.err and resumed == sorted(resumed)
    assert qvk(*words, "--out", tmp_path / "whole").code == 0
    assert fingerprint(run / "collect" / "rollouts.db") == fingerprint(tmp_path / "whole" / "collect" / "rollouts.db")
    alike(lora(run / "sft"), lora(tmp_path / "whole" / "sft"))
    shutil.rmtree(run)
    assert qvk("pull", url, run).code == 0 and qvk("verify", run).code == 0
    assert qvk(*words, "--out", run, "--mirror", url).err.count("already done") == 3


def test_a_mirror_that_cannot_be_is_refused_before_anything_is_played(tmp_path):
    done = qvk("run", "configs/demo", "--to", "collect", "--out", tmp_path / "run", "--mirror", "file:///proc/x")
    assert done.code == 2 and "no such bucket or folder" in one_line(done.err) and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    "A real S3 server, its address and keys in the environment."
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    patched = pytest.MonkeyPatch()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "one",
        "AWS_SECRET_ACCESS_KEY": "two",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        patched.setenv(name, value)
    fsspec.filesystem("s3").mkdir("bucket")
    yield variables["AWS_ENDPOINT_URL"]
    server.stop()
    patched.undo()


@pytest.mark.extras
def test_a_run_goes_to_s3_and_comes_back(s3, run, tmp_path):
    (run / "collect" / "checkpoints").mkdir()
    (run / "collect" / "checkpoints" / "large.bin").write_bytes(os.urandom(2 * BLOCK + 1))
    sent = qvk("push", run, "s3://bucket/runs/one")
    assert sent.code == 0 and "files changed" in sent.out, sent.err
    objects = fsspec.filesystem("s3").find("bucket/runs/one", detail=True)
    assert "are there already" in qvk("push", run, "s3://bucket/runs/one").out
    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    assert filesystem.find("bucket/runs/one", detail=True) == objects  # nothing was written again
    before = files(run)
    shutil.rmtree(run)
    assert qvk("pull", "s3://bucket/runs/one", run).code == 0
    assert files(run) == before and qvk("verify", run).code == 0
    done = qvk("collect", *SMALL, "--out", run)
    assert done.code == 0 and "already done" in done.err


@pytest.mark.extras
def test_faults_of_s3_are_one_line(s3, run):
    def fails(url, **variables):
        done = qvk("push", run, url, **variables)
        assert done.code == 2, done.err
        return one_line(done.err)

    assert "s3://no-such-bucket/x: no such bucket or folder" in fails("s3://no-such-bucket/x")
    assert "cannot be used" in fails("s3://bucket/x", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    request = urllib.request.Request(f"{s3}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()  # from now on keys are checked
    assert "no rights to read or write there" in fails("s3://bucket/x", AWS_ACCESS_KEY_ID="wrong")
