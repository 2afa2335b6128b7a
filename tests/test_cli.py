"""The command line: what it prints, its exit codes, and no traceback for a user's mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspace.cli import main

ROOT = Path(__file__).resolve().parents[1]


def dspace(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dspace", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = "import sys, dspace.cli; dspace.cli.main(['--help']); print(sorted(m for m in ('torch', 'sympy', 'numba', 'optuna', 'triton', 'matplotlib', 'pydantic', 'jinja2') if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip().endswith("[]")
    for command in ("list", "show", "generate", "verify", "bench", "map", "doctor", "study"):
        assert f"\n  {command} " in done.stdout


def test_help_takes_little_processor_time() -> None:
    times = []
    for _ in range(3):
        before = os.times()
        start = time.perf_counter()
        assert dspace("--help").returncode == 0
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        times.append(min(used, time.perf_counter() - start))
    assert min(times) < 0.5


def test_expected_time_on_a_named_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "palimpsa", "--gpu", "h100"]) == 0
    assert "expected on H100:" in capsys.readouterr().out
    assert main(["list", "--gpu", "H100", "--json"]) == 0
    rows = {r["name"]: r["expected"] for r in json.loads(capsys.readouterr().out)}
    assert rows["palimpsa"]["seconds"] > rows["simple_gla"]["seconds"] > 0 and rows["palimpsa"]["sizes"]["K"] == 64
    assert main(["show", "palimpsa", "--gpu", "H10"]) == 2
    assert "did you mean 'H100'" in capsys.readouterr().err


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)
    assert code == 0 and {"name", "class", "state_bytes"} <= rows[0].keys() and len(rows) >= 16
    assert "palimpsa" in run(capsys, "list")[1]
    assert "class c" in run(capsys, "show", "palimpsa", "--passes")[1]
    assert "align" in run(capsys, "show", "palimpsa", "--latex")[1]
    assert json.loads(run(capsys, "show", "palimpsa", "--json")[1])["name"] == "palimpsa"


def test_mistakes_are_told_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "show", "palimsa")
    assert code == 2 and err.startswith("error:") and "palimpsa" in err and not out
    spec = tmp_path / "x.toml"
    spec.write_text('name = "x"\nnonsense = 1\n')
    code, _, err = run(capsys, "show", str(spec))
    assert code == 2 and "x.toml" in err and "nonsense" in err
    code, out, _ = run(capsys, "show", "palimsa", "--json")
    assert code == 2 and json.loads(out)["exit_code"] == 2
    assert run(capsys, "nonsense")[0] == 2
    assert run(capsys, "generate")[0] == 2
    assert run(capsys, "bench", "palimpsa", "--keys", "0")[0] == 2


def test_tracebacks_only_on_request() -> None:
    assert "Traceback" not in dspace("show", "absent").stderr
    assert "Traceback" in dspace("--debug", "show", "absent").stderr


def test_generate_and_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "generate", "simple_gla", "--out", str(tmp_path))
    assert code == 0 and Path(out.strip()) == tmp_path / "simple_gla.py"
    assert run(capsys, "generate", "simple_gla", "--out", str(tmp_path), "--check")[0] == 0
    (tmp_path / "simple_gla.py").write_text("# changed\n")
    code, out, _ = run(capsys, "generate", "simple_gla", "--out", str(tmp_path), "--check")
    assert code == 1 and "changed" in out


def test_bench_times_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "1", "--steps", "8", "--heads", "1", "--repeats", "1", "--device", "cpu"]
    code, out, _ = run(capsys, "bench", "simple_gla", *sizes, "--json")
    timings = json.loads(out)["timings"]
    assert code == 0 and [t["form"] for t in timings] == ["reference", "recurrent", "chunk"]
    assert all(t["forward"] > 0 and t["tokens_per_second"] > 0 for t in timings)


def test_no_speed_for_a_kernel_whose_check_is_red(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dspace.runtime.compiler as compiler
    from dspace.errors import CertificationError

    def refused(*args, **kwargs):
        raise CertificationError("gradient of q is wrong")

    monkeypatch.setattr(compiler, "compile", refused)
    code, out, err = run(capsys, "bench", "simple_gla")
    assert code == 3 and "gradient of q is wrong" in err and not out


def test_study_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspace.study import engine
    from tests.study.conftest import TOY

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "study"))
    assert run(capsys, "study", "list")[1].startswith("nothing here yet")
    Path("toy.toml").write_text(TOY)
    engine.run("toy.toml", objective="toys:quick", quiet=True, trials=3)
    assert json.loads(run(capsys, "study", "list", "--json")[1])[0]["complete"] == 3
    assert "round" in run(capsys, "study", "list", "toy")[1]
    code, out, _ = run(capsys, "study", "report", "toy")
    assert code == 0 and Path(out.strip()).read_text().startswith("<!DOCTYPE html>")
    code, out, _ = run(capsys, "study", "export", "toy", "--best")
    assert code == 0 and run(capsys, "generate", out.strip(), "--out", str(tmp_path / "kernels"))[0] == 0
    assert "nothing to heal" in run(capsys, "study", "heal", "toy")[1]
    code, _, err = run(capsys, "study", "report", "toi")
    assert code == 2 and "did you mean 'toy'" in err
    code, _, err = run(capsys, "study", "run", "toy.toml", "--jobs", "2", "--storage", "sqlite:///x.db")
    assert code == 4 and "refused" in err
    Path("toy.toml").write_text(TOY.replace("trials", "trails"))
    code, _, err = run(capsys, "study", "run", "toy.toml")
    assert code == 2 and "did you mean 'trials'" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m dspace show palimpsa --json | head -c 10"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout and "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("show", "gla")])
def test_a_full_disk_behind_standard_output_is_told_in_words(arguments: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dspace", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert done.returncode == 4
    assert "No space left" in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_where_a_picture_cannot_be_written_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "missing" / "map.svg"
    code, _, err = run(capsys, "map", "retnet", "linear_attention", "--svg", str(picture))
    assert code == 4 and str(picture) in err


def test_a_folder_without_a_study_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "study", "report", "mine", "--dir", str(tmp_path))
    assert code == 2 and str(tmp_path / "study.toml") in err and "did you mean" not in err


def test_a_damaged_study_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspace.study import engine
    from tests.study.conftest import TOY

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "study"))
    Path("toy.toml").write_text(TOY)
    engine.run("toy.toml", objective="toys:quick", quiet=True, trials=2)
    for name in ("broken", "mistyped", "young"):
        shutil.copytree("runs/toy", f"runs/{name}")
    journal = Path("runs/broken/journal.log")
    journal.write_bytes(journal.read_bytes() + b'{"op_co')
    Path("runs/mistyped/study.toml").write_text(TOY.replace("trials = 8", "trails = 8"))
    Path("runs/young/journal.log").write_bytes(b"")
    code, out, err = run(capsys, "study", "list")
    assert code == 4
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["broken", "mistyped", "toy", "young"]
    assert "runs/broken/journal.log: damaged at line" in err and "cure: dspace study heal runs/broken --cut" in err
    assert "did you mean 'trials'" in err and err.count("error: ") == 2 and "young" not in err
    code, out, err = run(capsys, "study", "list", "--json")
    rows = {row["study"]: row for row in json.loads(out)}
    assert code == 4 and not err and rows["toy"]["complete"] == 2 and "error" not in rows["young"]
    assert (
        "damaged" in rows["broken"]["error"] and rows["broken"]["exit_code"] == 4 and rows["mistyped"]["exit_code"] == 2
    )


WHILE_LOADING = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize("at", ["dspace.errors", "dspace.__main__", "dspace.cli", "typer", "dspace.commands.common"])
def test_an_interrupt_while_the_command_loads_shows_no_traceback(at: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WHILE_LOADING)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "AT": at}
    command = [sys.executable, "-m", "dspace", "list"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    program = [sys.executable, "-c", "import dspace\ntry: import dspace.cli\nexcept KeyboardInterrupt: print('mine')"]
    if at in ("dspace.cli", "typer"):  # a program of somebody else's hears of its own interrupts
        assert subprocess.run(program, capture_output=True, text=True, env=environment).stdout == "mine\n"


def test_an_interrupt_within_code_from_text_leaves_the_exit_code_alone(tmp_path: Path) -> None:
    code = """
import os, signal
from dspace import cli
from dspace.__main__ import main

def run():
    try:
        exec("os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(10**8): pass", globals())
    except KeyboardInterrupt:
        return 130

cli.main = run
raise SystemExit(main())
"""
    (tmp_path / "probe.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert subprocess.run([sys.executable, "-m", "probe"], env=environment).returncode == 130


@pytest.mark.parametrize("ending", ["return", "raise typer.Exit(3)", "raise UserError('half loaded')"])
def test_an_interrupt_that_a_library_swallowed_still_ends_the_command(ending: str) -> None:
    code = f"""
import os, signal, sys, typer
from dspace.commands import common
from dspace.errors import UserError

@common.command
def probe():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**8): pass
    except BaseException:
        pass
    {ending}

try:
    probe()
except typer.Exit as end:
    sys.exit(end.exit_code)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 130 and done.stderr == "error: interrupted\n"
