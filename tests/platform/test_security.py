"""Who gets in, what is shown, and what is run: the promises of docs/security.md."""

import ast
import hashlib
import json
import logging
import os
import pickle
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import GuardedMlflow, page_status
from typer.testing import CliRunner

import segadapt as api
from segadapt.platform.cli.main import app
from segadapt.platform.cluster.connection import connect
from segadapt.platform.deployment.deployed import load_deployed
from segadapt.platform.doctor.ray_state import ray_trials
from segadapt.platform.errors import UsageError, redacted
from segadapt.platform.experiment.finishing import FinishRequest, plan_finish
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.tracking.sender import send_waiting
from segadapt.platform.tracking.tracker import RunInfo, Tracker
from segadapt.trainables.core.training.checkpoint import MANIFEST, STATE, CorruptCheckpointError, load_state, save_state

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_ray_that_is_started_here_listens_on_loopback_and_knows_its_own_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import grpc
    import ray

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 30)))  # longer than the path of a socket may be
    with connect(None):
        assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote()) == "token"
        token = os.environ["RAY_AUTH_TOKEN"]
        assert len(token) == 64
        me = psutil.Process()
        listening = {
            (connection.laddr.ip.removeprefix("::ffff:"), process.name())
            for process in (me, *me.children(recursive=True))
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {name for _, name in listening} >= {"gcs_server", "raylet"}
        assert {address for address, _ in listening} == {"127.0.0.1"}, listening
        address = ray._private.worker._global_node.gcs_address
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        written = [path for path in session.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
        assert written == [], "the token is in no file"
        assert session.resolve().is_relative_to(tmp_path), "on the disk that the user named"
        closed = [folder for folder in session.parents if folder.stat().st_mode & 0o777 == 0o700]
        assert tmp_path / ("long" * 30) / f"segadapt-{os.getuid()}" in [folder.resolve() for folder in closed], (
            "nobody else reaches its logs and sockets"
        )
    assert os.environ["RAY_AUTH_TOKEN"] == ""


class _Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    checkpoint, mark = tmp_path / "checkpoint", tmp_path / "attacked"
    checkpoint.mkdir()
    save_state(checkpoint, {"state": {}})
    for name in ("config.json", "evaluation.json"):
        (checkpoint / name).write_text("{}")
    (checkpoint / STATE).write_bytes(pickle.dumps(_Attack(mark)))
    with pytest.raises(CorruptCheckpointError, match="was changed or cut short"):
        load_state(checkpoint)
    digest = hashlib.sha256((checkpoint / STATE).read_bytes()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({"sha256": {STATE: digest}}))  # an attacker can do that, too
    with pytest.raises(CorruptCheckpointError, match="holds code, which was not run"):
        load_state(checkpoint)
    with pytest.raises(UsageError, match="holds code, which was not run"):
        load_deployed(checkpoint, {}, "cpu")  # type: ignore[arg-type]
    assert not mark.exists()
    pickle.loads((checkpoint / STATE).read_bytes())
    assert mark.exists(), "plain unpickling would have run it"


def test_nothing_unpickles_but_through_the_checks() -> None:
    """`torch.load` and `numpy.load` name what they allow; pickle itself is not used."""
    paths = [path for folder in ("platform", "trainables", "search_spaces") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    calls = [(ast.unparse(node.func), {word.arg: word.value for word in node.keywords}) for node in nodes]
    assert not [
        call for call in calls if call[0] in ("pickle.load", "pickle.loads", "cloudpickle.loads", "joblib.load")
    ]
    assert [name for name, _ in calls if name.endswith("export.load")] == ["torch.export.load"], "of our own file"
    torch_loads = [words for name, words in calls if name == "torch.load"]
    assert torch_loads
    assert all(ast.unparse(words["weights_only"]) == "True" for words in torch_loads)
    assert all(ast.unparse(words["allow_pickle"]) == "False" for name, words in calls if name == "np.load")


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/b", "..", ".hidden", "a\0b", "", "x" * 101])
def test_names_that_leave_the_storage_folder_are_refused(name: str, tmp_path: Path) -> None:
    storage = str(tmp_path / "runs")
    with pytest.raises(UsageError, match="A name must be 1 to 100"):
        api.plan(["sdca"], {}, name=name, place=Place(storage))
    for call in (
        lambda: api.search(resume=name, place=Place(storage)),
        lambda: api.search(extend=name, trials=1, place=Place(storage)),
        lambda: api.plan([], {}, fork=name, place=Place(storage)),
        lambda: api.plan(["sdca"], {}, warm_start=[name], place=Place(storage)),
    ):
        with pytest.raises(UsageError, match="A name must be 1 to 100"):
            call()
    assert [path.name for path in tmp_path.rglob("*") if path.name != "runs"] == []


@pytest.mark.parametrize("noted", ["../outside", "{}", "ray/../../outside"])
def test_a_checkpoint_that_mlflow_names_outside_the_storage_folder_is_never_opened(noted: str, tmp_path: Path) -> None:
    place, outside = Place(tmp_path / "runs"), tmp_path / "outside"
    outside.mkdir()
    save_state(outside, {"state": {}})
    noted = noted.format(outside)
    tracker = Tracker(place)
    tags = {"segadapt.kind": "trial", "segadapt.method": "sdca", "segadapt.checkpoint": noted}
    tracker.start(RunInfo("town/1", "town", "sdca-001", tags, {}))
    tracker.end("town/1", "FINISHED", {})
    tracker.close()
    (row,) = api.runs("town", place=place).rows
    assert row.checkpoint is None, "the leaderboard is shown all the same"
    for use in (
        lambda: api.evaluate("best", "town", place=place),
        lambda: api.export("sdca-001", "town", place=place),
        lambda: plan_finish(FinishRequest("best", "town", {}), place),
    ):
        with pytest.raises(UsageError, match=f"must lie in the storage folder .*, but is noted as '{noted}'"):
            use()


def test_logins_are_taken_out_of_what_is_shown() -> None:
    assert redacted("http://me:secret@host:5000/x failed; postgresql+psycopg://a:b@/db") == (
        "http://host:5000/x failed; postgresql+psycopg:///db"
    )
    assert redacted("mail me@host, 1://2") == "mail me@host, 1://2"


def test_a_password_in_the_servers_address_is_neither_shown_nor_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = "http://me:hunter2@127.0.0.1:1"
    with caplog.at_level(logging.DEBUG):
        tracker = Tracker(Place(tmp_path, uri))
        tracker.start(RunInfo("a", "a", "a", {}, {"lr": 1}))
        time.sleep(0.2)
        tracker.close(timeout_s=2)
        send_waiting(Place(tmp_path, uri), timeout_s=1)
    assert "did not take" in caplog.text
    assert "hunter2" not in caplog.text
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if b"hunter2" in path.read_bytes() or "hunter2" in path.name]
    done = CliRunner().invoke(app, ["search", "sdca", "--tracking-uri", uri, "--storage", str(tmp_path)])
    assert isinstance(done.exception, UsageError)
    assert "hunter2" not in done.output + str(done.exception)


def test_a_key_in_an_address_of_data_is_refused_before_it_is_kept(tmp_path: Path) -> None:
    root, place = "s3://KEY:hunter2@bucket/town", Place(tmp_path / "runs")
    settings = {"data.source": f"shards:{root}", "data.target": f"shards:{root}"}
    for use in (
        lambda: api.plan("sdca", settings, place=place),
        lambda: api.train("sdca", settings, place=place),
        lambda: api.evaluate("best", "town", settings, place=place),
        lambda: api.data_check("shards", root),
        lambda: api.data_pack("folder", root, str(tmp_path / "out")),
    ):
        with pytest.raises(UsageError, match=r"must hold no password or key.*s3://bucket/town\. Set AWS_") as refused:
            use()
        assert "hunter2" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_names_in_rays_state_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    for trial_id, error_file in (("../../outside", None), ("a", "/etc/passwd"), ("a", "../b")):
        trial = {"trial_id": trial_id, "status": "ERROR", "config": {}, "experiment_tag": "1"}
        more = {"last_result": {}, "last_result_time": 0, "error_filename": error_file}
        content = {"trial_data": [[json.dumps(trial), json.dumps(more)]]}
        (tmp_path / "experiment_state-1.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="names that lead elsewhere"):
            ray_trials(tmp_path)


@pytest.mark.slow
def test_a_shared_mlflow_asks_for_a_login_and_for_its_own_name(
    guarded_mlflow: GuardedMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = guarded_mlflow.address
    search = f"{guarded}/api/2.0/mlflow/experiments/search?max_results=1"
    assert page_status(search) == 401
    assert page_status(search, host="evil.example.com") == 403, (
        "as a page in a browser could ask, whose name was bent to here"
    )
    assert page_status(search, host="mlflow.example.com") == 401
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", guarded_mlflow.password)
    tracker = Tracker(Place(tmp_path, guarded))
    tracker.start(RunInfo("mine", "mine", "mine", {}, {"lr": 1}))
    tracker.end("mine", "FINISHED", {})
    tracker.close(timeout_s=120)
    client = mlflow_client(guarded)
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and guarded_mlflow.password.encode() in path.read_bytes()
    ]
