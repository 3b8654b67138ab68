"""A release gate: compress a trained model, measure it, log the run to MLflow, and fail the build if it got worse.

    python examples/pipeline.py model_cards/digits-resnet --keep 0.5 --prefer size --calibration builtin:digits \\
        --data builtin:digits --max-drop 0.01 --output release/digits-resnet

A model that passes is put at `--output`. Exit status: 0 passed; 1 the run could not be logged; 2 the request or an
input is bad; 3 the gate was not met. Only 0 releases anything. The run is logged whether it passed or not, to
`./mlruns` or to `--tracking-uri`: flat metrics, the report, the plan and the card. It needs the extras `report` and
`mlflow`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# A tracking server that does not answer is known in seconds; mlflow reads these when it is asked.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import mlflow
from mlflow.exceptions import MlflowException

import compressor

PASSED, NOT_LOGGED, GATE_NOT_MET = 0, 1, compressor.QualityGateNotMet.exit_status


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="weight file, model folder or org/name on the Hugging Face hub")
    parser.add_argument("--keep", type=float, required=True, help="share of the eligible parameters to keep")
    parser.add_argument("--data", required=True, help="what the gate is measured on")
    parser.add_argument("--max-drop", type=float, required=True, help="allowed loss of accuracy, or rise of perplexity")
    parser.add_argument("--output", type=Path, required=True, help="where a model that passes is released")
    parser.add_argument("--prefer", choices=["speed", "size"], help="by default speed of folders, and size of files")
    parser.add_argument("--calibration", help="data to choose and factorize by")
    parser.add_argument("--model-code", help="file.py:function that builds an architecture not in transformers")
    parser.add_argument("--tracking-uri", default=Path("mlruns").absolute().as_uri(), help="of MLflow; ./mlruns")
    parser.add_argument("--experiment", default="compression", help="name of the experiment in MLflow")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    asked = arguments(given)
    if asked.tracking_uri.startswith("file:"):
        # Newer versions of MLflow want to be told that plain files are meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        require_free(asked.output)
        # Before the work, so that a server that does not answer costs none.
        mlflow.set_tracking_uri(asked.tracking_uri)
        mlflow.set_experiment(asked.experiment)
        return gate(asked)
    except compressor.CompressorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except MlflowException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"error: MLflow at {asked.tracking_uri}: {reason}", file=sys.stderr)
        return NOT_LOGGED


def gate(asked: argparse.Namespace) -> int:
    """Compress, measure, log, and release what passes."""
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the release, so that putting it there is a single renaming.
    with tempfile.TemporaryDirectory(dir=asked.output.parent) as place:
        candidate = Path(place) / asked.output.name
        result = compressor.compress(
            asked.model,
            output=candidate,
            keep=asked.keep,
            prefer=asked.prefer,
            calibration=asked.calibration,
            data=asked.data,
            factory=asked.model_code,
        )
        assert result.evaluation is not None
        drop = result.evaluation.drop
        # The last digits of a difference of two fractions are rounding.
        passed = drop is not None and round(drop, 9) <= asked.max_drop
        log(result, candidate, asked, passed=passed)
        if passed:
            release(candidate, asked.output)
    outcome = f"released {asked.output}" if passed else "not released"
    print(f"drop {drop + 0.0:.4g}, allowed {asked.max_drop:g}: {outcome}")
    return PASSED if passed else GATE_NOT_MET


def require_free(output: Path) -> None:
    if os.path.lexists(output):
        raise compressor.BadInput("already exists", where=output, remedy="release under a new name")


def release(candidate: Path, output: Path) -> None:
    """Put a file or a folder where nothing is, also where another build has just been."""
    try:
        # Renaming replaces a file or an empty folder, so it has to be one that was made here.
        if candidate.is_dir():
            output.mkdir()
        else:
            output.touch(exist_ok=False)
    except FileExistsError:
        require_free(output)
        raise
    candidate.rename(output)


def log(result: compressor.Compression, candidate: Path, asked: argparse.Namespace, *, passed: bool) -> None:
    """One run of MLflow, marked as failed where the gate was not met."""
    with mlflow.start_run(run_name=asked.output.name) as run, tempfile.TemporaryDirectory() as place:
        mlflow.log_params({"command": result.command, "keep": asked.keep, "max_drop": asked.max_drop})
        mlflow.log_metrics(result.metrics())
        mlflow.set_tag("gate", "passed" if passed else "not met")
        report, plan = Path(place) / "report.html", Path(place) / "plan.json"
        compressor.write_report(result, report)
        plan.write_text(json.dumps(result.plan.portable().to_dict(), indent=2), encoding="utf-8")
        for artifact in (report, plan, candidate / "README.md"):
            if artifact.exists():  # a single weight file has no card
                mlflow.log_artifact(str(artifact), run_id=run.info.run_id)
        if not passed:
            mlflow.end_run("FAILED")


if __name__ == "__main__":
    sys.exit(main())
