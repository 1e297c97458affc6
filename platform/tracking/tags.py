"""The tags of MLflow runs."""

KEY_TAG = "segadapt.key"

KIND_TAG = "segadapt.kind"

STATE_TAG = "segadapt.state"

FAILURE_TAG = "segadapt.failure"

CHECKPOINT_TAG = "segadapt.checkpoint"

NOT_KEPT = "not kept"
"""What `CHECKPOINT_TAG` holds once the checkpoint was removed."""

METHOD_TAG = "segadapt.method"
