"""How Ray is started here: in folders of this user alone, and with empty variables as if they were not set."""

import os
from pathlib import Path

import pytest

from segadapt.platform.cluster.connection import worker_environment
from segadapt.platform.errors import UsageError
from segadapt.platform.ray_internals.start import authenticated, private_session
from segadapt.platform.tracking.client import mlflow_settings


def test_rays_folder_is_this_users_alone_and_its_sockets_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("l" * 100) / ("m" * 100)
    for base in (Path("/tmp"), tmp_path, long):
        monkeypatch.setenv("RAY_TMPDIR", str(base))
        with private_session():
            folder = Path(os.environ["RAY_TMPDIR"])
            assert folder.samefile(base / f"segadapt-{os.getuid()}"), "on the disk that was named"
            assert folder.stat().st_mode & 0o777 == 0o700
            assert folder.parent == Path("/tmp") or folder.parent.stat().st_mode & 0o777 == 0o700 or base == tmp_path
            assert len(f"{folder}/ray/session_2026-11-30_12-54-39_904043_4194304/sockets/plasma_store") <= 107
        assert os.environ["RAY_TMPDIR"] == str(base)


def test_a_folder_that_others_could_have_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"segadapt-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"this user alone .* a link\. Correct TMPDIR"), private_session():
        pass
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"Correct RAY_TMPDIR"), private_session():
        pass


def test_empty_variables_are_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "")
    with authenticated(local=True):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    given = worker_environment()
    assert given["OMP_NUM_THREADS"] == "1"
    assert float(given["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]) > 0
    assert "RAY_gcs_server_request_timeout_seconds" not in given
    assert given["CUDA_VISIBLE_DEVICES"] == "", "here, nothing is a choice: no GPU"
    with mlflow_settings():
        assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == os.environ["RAY_AUTH_MODE"] == ""
