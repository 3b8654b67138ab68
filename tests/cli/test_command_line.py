"""The command line as a shell sees it: what is parsed, what is printed where, and the exit status."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

import compressor
from compressor.api.kinds import TRAINING_FLAGS
from compressor.cli.routes import BESIDE
from compressor.cli.run import run
from compressor.errors import BadInput, CompressorError, QualityGateNotMet
from compressor.io import open_checkpoint
from tests.warm import Warm

COMPRESS = [sys.executable, "-c", "from compressor.cli import main; main()"]

Captured = pytest.CaptureFixture[str]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full or /proc")


class StoppedError(Exception):
    """Ends a command once what was asked of the library is known."""


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The calls that reach the library, which does nothing but note them."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(name: str) -> Any:
        def note(*given: Any, **named: Any) -> NoReturn:
            calls.append((name, given, named))
            raise StoppedError

        return note

    for name in ("compress", "inspect", "plan", "evaluate"):
        monkeypatch.setattr(compressor, name, stand_in(name))
    monkeypatch.setattr(compressor, "restore", stand_in("restore"))
    return calls


# What the command line asks for


def test_every_subcommand_calls_its_function_and_everything_else_the_default(requested: Any) -> None:
    run(["inspect", "m.bin"])
    run(["plan", "m.bin"])
    run(["evaluate", "m.bin", "--data", "text.txt"])
    run(["restore", "m.bin"])
    run(["m.bin"])
    run(["./inspect"])
    run(["--keep", "0.5", "inspect"])
    assert [(name, given[0]) for name, given, _ in requested] == [
        ("inspect", "m.bin"),
        ("plan", "m.bin"),
        ("evaluate", "m.bin"),
        ("restore", "m.bin"),
        ("compress", "m.bin"),
        ("compress", "./inspect"),
        ("compress", "inspect"),
    ]


def test_options_may_come_before_or_after_the_model(requested: Any) -> None:
    options = ["--keep", "0.5", "--include", "a.*", "--include", "re:b", "--lr", "0.1", "--dry-run"]
    run([*options, "m.bin"])
    run(["m.bin", *options])
    before, after = requested
    assert before[1] == after[1]
    assert before[1][1].include == ("a.*", "re:b")


# Exit statuses


def test_an_error_becomes_its_exit_status_and_one_line_on_standard_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    ends: list[tuple[BaseException, int, str]] = [
        (CompressorError("the disk\nvanished"), 1, "error: the disk vanished"),
        (ZeroDivisionError("division\nby zero"), 1, "error: internal error: ZeroDivisionError: division by zero; "),
        (BadInput("is empty", where="m.bin", remedy="export it again"), 2, "error: m.bin: is empty; export it again"),
        (QualityGateNotMet("the best is 0.9"), 3, "error: the best is 0.9"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ]
    for error, status, said in ends:

        def fail(*_: Any, error: BaseException = error, **__: Any) -> NoReturn:
            raise error

        monkeypatch.setattr(compressor, "compress", fail)
        assert run([str(model)]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(said)
        assert err.count("\n") == 1


def test_the_traceback_of_an_unexpected_error_is_shown_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(compressor, "restore", fail)
    assert run(["restore", "m.bin", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option", "m.bin"],
        ["m.bin", "n.bin"],
        ["m.bin", "--keep", "much"],
        ["m.bin", "--form", "round"],
        ["m.bin", "--keep"],
        ["no-such-file.safetensors"],
        ["m\x1b[2J.bin"],
        ["inspect"],
        ["inspect", "no-such-file.bin"],
        ["evaluate", "m.bin"],
        ["restore", "no-such-file.bin"],
        ["explore", "--recipe", "no-such-file.bin"],
        ["explore", "-o", "page.txt"],
    ],
)
def test_a_bad_request_is_status_2_and_one_line(arguments: list[str], capsys: Captured) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "options",
    [
        ["--keep", "0.5", "--tolerance", "0.1"],
        ["--keep", "0"],
        ["--keep", "1.5"],
        ["--keep", "nan"],
        ["--lr", "-1"],
        ["--include", "no.such.layer"],
        ["--report", "report.txt"],
        ["--report", "no/such/folder/report.html"],
        ["--plan", "no-such-plan.json"],
    ],
)
def test_a_bad_request_about_a_good_model_leaves_nothing_behind(
    options: list[str], model: Path, capsys: Captured, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    assert run([str(model), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_nothing_that_is_safe_to_remove_is_a_gate_not_met(incompressible: Path, capsys: Captured) -> None:
    assert run([str(incompressible)]) == 3
    assert "--keep" in capsys.readouterr().err
    assert list(incompressible.parent.iterdir()) == [incompressible]


def test_an_interrupt_while_writing_leaves_nothing_behind(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    beside: list[list[Path]] = []

    def interrupted(file: int) -> None:
        beside.append([path for path in model.parent.iterdir() if path != model])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert run([str(model), "--keep", "0.5"]) == 130
    assert beside[0]
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.slow
def test_existing_outputs_are_replaced_only_on_request(model: Path, capsys: Captured) -> None:
    output, report, plan = (model.with_name(name) for name in ("out.safetensors", "r.html", "plan.json"))
    for path in (output, report, plan):
        path.write_text("mine")
    whole = [str(model), "--keep", "0.5", "-o"]
    assert run([*whole, str(output)]) == 2
    assert run([*whole, str(model.with_name("new.safetensors")), "--report", str(report)]) == 2
    assert run(["plan", str(model), "-o", str(plan)]) == 2
    assert [path.read_text() for path in (output, report, plan)] == ["mine"] * 3
    assert not model.with_name("new.safetensors").exists()
    assert run([*whole, str(output), "--report", str(report), "--overwrite"]) == 0
    assert run(["plan", str(model), "-o", str(plan), "--overwrite"]) == 0
    assert "mine" not in {path.read_bytes()[:4].decode(errors="replace") for path in (output, report, plan)}


@pytest.mark.parametrize("command", [["plan"], []])
def test_the_model_itself_is_never_the_output(command: list[str], model: Path, capsys: Captured) -> None:
    before = model.read_bytes()
    assert run([*command, str(model), "-o", str(model), "--overwrite"]) == 2
    assert model.read_bytes() == before


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_is_never_written_into_the_model(model: Path, capsys: Captured) -> None:
    before = tree(model.parent)
    assert run([str(model.parent), "--keep", "0.5", "--report", str(model.parent / "report.html")]) == 2
    assert "inside the input folder" in capsys.readouterr().err
    assert tree(model.parent) == before


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([""], "MODEL"),
        (["inspect", ""], "MODEL"),
        (["MODEL", "-o", ""], "--output"),
        (["MODEL", "--output="], "--output"),
        (["MODEL", "--report", ""], "--report"),
        (["MODEL", "--plan", ""], "--plan"),
        (["MODEL", "--recipe", ""], "--recipe"),
        (["plan", "MODEL", "-o", ""], "--output"),
        (["restore", "MODEL", "-o", ""], "--output"),
        (["evaluate", "MODEL", "--data", "builtin:digits", "--baseline", ""], "--baseline"),
    ],
)
def test_an_empty_name_is_refused_by_the_name_of_its_argument(
    arguments: list[str], what: str, model: Path, *, capsys: Captured
) -> None:
    assert run([str(model) if word == "MODEL" else word for word in arguments]) == 2
    assert capsys.readouterr() == ("", f"error: {what} is empty; name a file or folder\n")
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("json_asked", [False, True])
def test_a_report_that_fails_does_not_hide_the_model_that_was_written(
    json_asked: bool, model: Path, monkeypatch: pytest.MonkeyPatch, *, capsys: Captured
) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output, report = model.with_name("small.safetensors"), model.with_name("report.html")
    monkeypatch.setattr(os, "fsync", full_for("report.html", full))
    asked = [str(model), "--keep", "0.5", "-q", "-o", str(output), "--report", str(report)]
    assert run([*asked, *(["--json"] if json_asked else [])]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: the model was written to {output}; the report was not: ")
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert str(output) in out
    assert "report " not in out
    if json_asked:
        assert json.loads(out)["output"] == str(output)
    assert sorted(path.name for path in model.parent.iterdir()) == [model.name, output.name]
    open_checkpoint(output)


def full_for(prefix: str, fail: Callable[..., NoReturn]) -> Callable[[int], None]:
    """A stand-in for `os.fsync` that fails for the files of which the name begins so."""

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(prefix):
            fail()

    return fsync


# What is printed


def test_an_output_with_the_same_weights_is_called_so(incompressible: Path, capsys: Captured) -> None:
    said = "no layer was factorized; the output holds the same weights"
    assert run([str(incompressible), "--keep", "1"]) == 3
    assert "every layer would stay dense" in capsys.readouterr().err
    assert run([str(incompressible), "--max-size", "1GB"]) == 0
    assert f"\nwarning  {said}\n" in capsys.readouterr().out
    assert run(["plan", str(incompressible), "--keep", "1"]) == 0
    assert "\nno layer would be factorized; " in capsys.readouterr().out


def test_compressed_layers_are_not_called_unchanged(model: Path, capsys: Captured) -> None:
    assert run([str(model), "--keep", "0.5"]) == 0
    assert "was factorized" not in capsys.readouterr().out


@on_linux
def test_what_was_written_is_said_when_the_result_cannot_be(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    output = model.with_name("small.safetensors")
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", full)
        assert run([str(model), "--keep", "0.5", "-q", "-o", str(output)]) == 1
    assert capsys.readouterr().err == (
        f"error: {output} was written, but standard output cannot be written (No space left on device)\n"
    )
    open_checkpoint(output)


def test_json_is_one_document_alone_with_the_documented_keys(model: Path, capsys: Captured) -> None:
    assert run([str(model), "--keep", "0.5", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out, parse_constant=pytest.fail)
    assert err == ""
    assert document.keys() >= {
        *("schema_version", "source", "output", "parameters", "bytes", "eligible", "layers", "evaluation"),
        *("seconds", "peak_memory_bytes", "recipe", "budget", "advice"),
    }
    assert document["source"] == str(model)
    assert document["parameters"].keys() == document["bytes"].keys() == {"before", "after"}
    assert document["eligible"]["kept"] <= 0.5
    assert document["bytes"]["after"] == Path(document["output"]).stat().st_size
    for layer in document["layers"]:
        assert layer.keys() >= {"name", "shape", "kind", "rank", "form", "parameters", "error", "reason"}


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_other_json_documents_carry_a_schema_version_and_the_layers(
    command: str, model: Path, capsys: Captured
) -> None:
    assert run([command, str(model), "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["schema_version"] == 1
    assert len(document["layers"]) >= 7


def test_a_plan_is_applied_as_it_was_edited(model: Path, capsys: Captured) -> None:
    plan = model.with_name("plan.json")
    assert run(["plan", str(model), "--keep", "0.5", "-o", str(plan)]) == 0
    document = json.loads(plan.read_text())
    for layer in document["layers"]:
        layer["rank"], layer["form"] = 3, "plain"
    plan.write_text(json.dumps(document))
    capsys.readouterr()
    assert run([str(model), "--plan", str(plan), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [(layer["rank"], layer["form"]) for layer in layers] == [(3, "plain")] * len(document["layers"])


def test_a_restored_model_is_told_with_its_sizes(model: Path, capsys: Captured) -> None:
    small, dense = model.with_name("small.safetensors"), model.with_name("dense.safetensors")
    assert run([str(model), "--keep", "0.5", "-o", str(small)]) == 0
    capsys.readouterr()
    assert run(["restore", str(small), "-o", str(dense), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == {"before": small.stat().st_size, "after": dense.stat().st_size}


@pytest.mark.parametrize(
    "arguments", [["inspect", "--bits", "auto"], ["plan", "--keep", "0.5"], ["--keep", "0.5"]], ids=str
)
def test_tables_fit_a_terminal_of_80_columns_and_nothing_steers_it(
    arguments: list[str], model: Path, capsys: Captured, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    with monkeypatch.context() as patched:
        patched.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert run([*arguments, model.name]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert all(line.isprintable() for line in out.splitlines())
    # Shortened names still say which block and which matrix they are.
    for block in range(3):
        for end in ("first", "up"):
            assert any(re.match(f"…{block}[.…].*{end} ", line) for line in out.splitlines())


@pytest.mark.parametrize("arguments", [["inspect"], ["plan", "--keep", "0.5"], ["--keep", "0.5"]])
def test_a_pipe_gets_whole_names(arguments: list[str], model: Path, capsys: Captured) -> None:
    assert run([*arguments, str(model)]) == 0
    out = capsys.readouterr().out
    for block in range(3):
        for end in ("projector.first", "feed_forward.up"):
            assert f"\nencoder.layers.{block}.a_rather_long_block_name.{end} " in out
    assert "…" not in out


def test_a_path_is_never_broken_into_lines(model: Path, capsys: Captured) -> None:
    output = model.with_name("x" * 90 + ".safetensors")
    assert run([str(model), "--keep", "0.5", "-o", str(output)]) == 0
    assert f"output  {output}\n" in capsys.readouterr().out


def test_quiet_leaves_standard_error_empty(model: Path, capsys: Captured) -> None:
    assert run([str(model), "--keep", "0.5", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_help_lists_options_commands_and_exit_statuses(capsys: Captured) -> None:
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for command in BESIDE:
        assert f" {command} " in text
    options = (
        "-o --output --keep --max-size --max-drop --tolerance --plan --recipe --data --model --include --exclude "
        "--form --max-shard-size --device --dry-run --json --report --overwrite -q --quiet"
    )
    for option in [*options.split(), *(flag for _, flag, _ in TRAINING_FLAGS.values())]:
        assert re.search(f"{option}[ ,]", text)
    for status in ("0 done", "1 failed", "2 the request", "3 a quality gate", "130 interrupted"):
        assert status in text


@pytest.mark.parametrize("command", BESIDE)
def test_every_command_has_a_help_of_its_own(command: str, capsys: Captured) -> None:
    assert run([command, "--help"]) == 0
    assert f"compress {command}" in capsys.readouterr().out


def test_the_version_is_that_of_the_distribution(capsys: Captured) -> None:
    from compressor.version import VERSION

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"compress {VERSION}\n"


# What only a process of its own shows


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["--no-such-option"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from compressor.cli.run import run; run(sys.argv[1:]); "
        "print('HEAVY', {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY set()"


@pytest.mark.slow
def test_help_takes_less_than_half_a_second() -> None:
    # Processor time: what others do on the machine does not count.
    def seconds() -> float:
        before = os.times()
        subprocess.run([*COMPRESS, "--help"], capture_output=True, check=True)
        after = os.times()
        return (after.children_user + after.children_system) - (before.children_user + before.children_system)

    assert min(seconds() for _ in range(3)) < 0.5


# A process with its own standard output: as a shell starts it, and, where it computes, as a fork that has the imports.
NOBODY_READS = "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
NO_OUTPUT = "os.close(1); sys.stdout = None"
NO_ERRORS = "os.close(2); sys.stderr = None"
THEN = "\nfrom compressor.cli import main; main()"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["inspect", "-q", "MODEL"], ["plan", "--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str], model: Path, warm: Warm) -> None:
    words = [str(model) if word == "MODEL" else word for word in arguments]
    done = warm.run(f"import os; {NOBODY_READS}{THEN}", *words)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_a_reader_of_a_new_process_that_goes_away_is_no_error(argument: str) -> None:
    process = subprocess.Popen([*COMPRESS, argument], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
@pytest.mark.parametrize("place", [">&-", ">/dev/full"])
def test_a_standard_output_that_takes_nothing_is_a_failure_in_one_line(arguments: list[str], place: str) -> None:
    command = ["sh", "-c", f'exec "$@" {place}', "sh", *COMPRESS, *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output ")
    assert done.stderr.count("\n") == 1


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("place", [NO_OUTPUT, FULL])
def test_results_that_a_standard_output_does_not_take_are_a_failure_in_one_line(
    place: str, model: Path, warm: Warm
) -> None:
    done = warm.run(f"import os, sys; {place}{THEN}", "inspect", str(model), "-q")
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_closed_standard_error_is_no_failure(model: Path, warm: Warm) -> None:
    done = warm.run(f"import os, sys; {NO_ERRORS}{THEN}", "inspect", str(model))
    assert (done.returncode, "Effective ranks" in done.stdout) == (0, True)


STOP_WHILE_WRITING = """
import os, pathlib, sys, time
number = int(sys.argv.pop(1))

def stopped(file):
    os.kill(os.getpid(), number)
    time.sleep(10)

os.fsync = stopped  # which flushes what was written, before it takes its place
unlink = pathlib.Path.unlink

def unlink_at_another_signal(self, *given, **named):
    os.kill(os.getpid(), number)
    unlink(self, *given, **named)

pathlib.Path.unlink = unlink_at_another_signal
from compressor.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_writing_leaves_nothing_behind_even_when_it_is_sent_twice(
    number: int, model: Path, warm: Warm
) -> None:
    done = warm.run(STOP_WHILE_WRITING, str(int(number)), str(model), "--keep", "0.5", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "interrupted\n")
    assert list(model.parent.iterdir()) == [model]


def test_an_interrupt_during_the_imports_is_one_line() -> None:
    # The first module that the command line imports besides its own.
    script = (
        "import builtins, os, signal, sys\n"
        "import compressor.cli\n"
        "found = builtins.__import__\n"
        "def interrupted(name, *given):\n"
        "    if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return found(name, *given)\n"
        "assert 'typer' not in sys.modules\n"
        "builtins.__import__ = interrupted\n"
        "compressor.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_signal_that_the_parent_silenced_stays_silent() -> None:
    script = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "import compressor.cli.run as command_line\n"
        "command_line.run = lambda _: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "from compressor.cli.main import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_warnings_of_transformers_stay_off_standard_error() -> None:
    script = (
        "from compressor.cli.run import run; run(['--version']); "
        "from transformers.utils import logging; logging.get_logger('transformers.any').warning('a warning'); "
        "logging.get_logger('transformers.any').error('an error')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert "a warning" not in done.stderr
    assert "an error" in done.stderr


@pytest.mark.slow
def test_a_name_that_the_encoding_lacks_does_not_stop_the_output(model: Path) -> None:
    done = subprocess.run(
        [*COMPRESS, "inspect", str(model), "-q"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Effective ranks" in done.stdout


@pytest.mark.parametrize(
    ("word", "meant"),
    [("inspct", "inspect"), ("Inspect", "inspect"), ("evalute", "evaluate"), ("restor", "restore"), ("plann", "plan")],
)
def test_a_misspelled_command_is_answered_with_the_nearest(
    word: str, meant: str, capsys: pytest.CaptureFixture[str], *, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([word, "model.safetensors"], [word, "--series", "x"], [word]):
        assert run(arguments) == 2
        assert capsys.readouterr().err == (
            f"error: {word} is neither a command nor a file; did you mean 'compress {meant}'?\n"
        )


@pytest.mark.parametrize("word", ["model", "./inspct", "inspct.pt", "org/inspct"])
def test_what_may_be_a_model_is_not_taken_for_a_command(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run([word]) == 2
    assert "did you mean" not in capsys.readouterr().err
