"""Generated files: deterministic, and compared with what the compiler writes today."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspace.errors import UserError
from dspace.runtime import check, generate
from dspace.runtime.generation import generate_all
from dspace.spec import builtin_names

ROOT = Path(__file__).parents[2]


def test_generated_file_stands_alone(affine_file: Path, tmp_path: Path):
    path = generate(affine_file, tmp_path / "out")
    assert path == tmp_path / "out" / "tiny_affine.py"
    program = (
        "import sys, torch, tiny_affine\n"
        "x = torch.randn(1, 3, 1, 4)\n"
        "o, s = tiny_affine.reference_tiny_affine(x, x, x, -torch.ones(1, 3, 1), output_final_state=True)\n"
        "assert o.shape == x.shape and s.shape == (1, 1, 4, 4)\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('dspace', 'sympy')]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(path.parent)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=600)


def test_check_finds_every_difference(tmp_path: Path):
    names = builtin_names()[:2]
    paths = generate_all(tmp_path, names)
    assert check(tmp_path, names) == []
    paths[0].write_text(paths[0].read_text(encoding="utf-8") + "# touched\n", encoding="utf-8")
    paths[1].unlink()
    changed, missing = check(tmp_path, names)
    assert changed.kind == "changed" and "-# touched" in str(changed)
    assert missing.kind == "missing" and missing.path == paths[1]


def test_unwritable_folder_is_a_user_error(affine_file: Path, tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        generate(affine_file, tmp_path / "file")


def test_text_does_not_depend_on_the_hash_seed(ratio_file: Path):
    program = (
        "import sys, hashlib\n"
        "from dspace.runtime.analysis import module_text\n"
        "texts = [module_text(s) for s in sys.argv[1:]]\n"
        "print(hashlib.sha256('\\0'.join(texts).encode()).hexdigest())\n"
    )
    found = set()
    for seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program, str(ratio_file), *builtin_names()[-3:]]
        found.add(subprocess.run(command, env=environment, check=True, timeout=1500, capture_output=True).stdout)
    assert len(found) == 1


def test_committed_kernels_are_what_the_compiler_writes():
    assert [str(d) for d in check(ROOT / "kernels")] == []
