"""Who may import whom (design section 3), read from the source, and what a fresh process loads."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels"
PACKAGE = KERNELS / "surgery_kernels"
SKIPPED = {".git", ".ci", "build", "dist", "__pycache__"}


def python_files(*roots):
    return sorted(
        path for root in roots for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(ROOT).parts)
    )


def module_name(path):
    """Dotted name of a source file: surgery_kernels.backends.cpu for .../backends/cpu/__init__.py."""
    base = KERNELS if KERNELS in path.parents else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def resolve(path, node):
    """Dotted names that one import statement may load, `from . import x` as the package and as its x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        ups = node.level - (path.name == "__init__.py")
        package = package[: len(package) - ups] if ups else package
        base = ".".join([*package, base] if base else package)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports_of(path, source=None):
    """Yield (line, dotted name, whether it runs when the module is loaded) of every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    lazy = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in resolve(path, node):
                yield node.lineno, name, node not in lazy


def within(name, module):
    return name == module or name.startswith(module + ".")


def offences(files, forbidden):
    """Lines `file:line imports name` for which forbidden(path, name, at_load) holds."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name, at_load in imports_of(path)
        if forbidden(path, name, at_load)
    ]


def layer(path):
    """The first level below surgery_kernels: api, ops, types, stats, backends, ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def backend_of(path):
    """The backend a file belongs to, None for backends/__init__.py."""
    name = path.relative_to(PACKAGE / "backends").with_suffix("").parts[0]
    return None if name == "__init__" else name


def test_kernels_is_a_source_root():
    assert not (KERNELS / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_surgery_kernels_needs_torch_only():
    """Anything else than torch and the standard library is loaded lazily, and Hugging Face never."""
    never = ("surgery", "transformers", "datasets", "peft", "trl", "accelerate", "matplotlib")

    def forbidden(path, name, at_load):
        top = name.split(".")[0]
        if top in never:
            return True
        in_triton = PACKAGE / "backends" / "triton" in path.parents
        known = top in ("torch", "surgery_kernels") or top in sys.stdlib_module_names
        return at_load and not known and not (top == "triton" and in_triton)

    assert offences(python_files(PACKAGE), forbidden) == []


def test_inner_layers_do_not_import_outer_ones():
    """api -> ops -> backends -> stats -> types."""
    may_import = {
        "types": (),
        "stats": ("types", "stats"),
        "backends": ("types", "stats", "backends"),
        "ops": ("types", "backends"),
        "column_mass": ("types", "backends"),
        "api": ("types", "stats", "backends", "ops"),
        "testing": ("stats",),
        "__init__": ("types", "stats", "backends", "ops", "api", "column_mass"),
    }

    def forbidden(path, name, at_load):
        if not within(name, "surgery_kernels"):
            return False
        target = [*name.split("."), "__init__"][1]
        return target not in may_import[layer(path)]

    assert {layer(path) for path in python_files(PACKAGE)} == set(may_import)
    assert offences(python_files(PACKAGE), forbidden) == []


def test_backends_do_not_import_one_another():
    shared = ("per_sequence", "sink_epilogue")

    def forbidden(path, name, at_load):
        own = backend_of(path)
        if own is None or not within(name, "surgery_kernels.backends"):
            return False
        target = [*name.split("."), ""][2]
        return target not in (own, *shared) or (own in shared and target != own)

    assert offences(python_files(PACKAGE / "backends"), forbidden) == []


def test_reference_is_imported_by_its_table_only():
    """An oracle that shares code with its subject proves less."""

    def forbidden(path, name, at_load):
        return within(name, "surgery_kernels.backends.reference") and path != PACKAGE / "backends" / "__init__.py"

    assert offences(python_files(PACKAGE, ROOT / "surgery"), forbidden) == []


def test_surgery_uses_public_names_only():
    import surgery_kernels

    public = {"surgery_kernels", *(f"surgery_kernels.{name}" for name in surgery_kernels.__all__)}

    def forbidden(path, name, at_load):
        return within(name, "surgery_kernels") and name not in public

    files = python_files(ROOT / "surgery")
    assert files and offences(files, forbidden) == []
    # and through the module: `import surgery_kernels as sk; sk.name`
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        aliases = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "surgery_kernels"
        }
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
        }
        assert used <= set(surgery_kernels.__all__), path


def test_nothing_imports_bench_or_tests():
    def forbidden(path, name, at_load):
        return within(name, "bench") or within(name, "tests")

    assert offences(python_files(PACKAGE, ROOT / "surgery"), forbidden) == []


def test_testing_is_for_tests_and_bench():
    def forbidden(path, name, at_load):
        return within(name, "surgery_kernels.testing")

    assert offences(python_files(PACKAGE, ROOT / "surgery"), forbidden) == []


@pytest.mark.parametrize(
    ("source", "at_load"),
    [
        ("import triton", [("triton", True)]),
        ("def f():\n    import triton.language as tl", [("triton.language", False)]),
        ("if True:\n    from triton import jit", [("triton.jit", True)]),
        ("from . import reference", [("surgery_kernels.backends.reference", True)]),
        ("from .reference import forward", [("surgery_kernels.backends.reference.forward", True)]),
        ("from ..ops import run", [("surgery_kernels.ops.run", True)]),
    ],
)
def test_the_walk_sees_every_form_of_import(source, at_load):
    path = PACKAGE / "backends" / "new.py"
    assert [(name, load) for _, name, load in imports_of(path, source)] == at_load


def test_the_walk_resolves_packages_and_their_modules():
    inside, package = PACKAGE / "backends" / "cpu" / "aten.py", PACKAGE / "backends" / "cpu" / "__init__.py"
    assert [name for _, name, _ in imports_of(inside, "from .. import x")] == ["surgery_kernels.backends.x"]
    assert [name for _, name, _ in imports_of(package, "from . import x")] == ["surgery_kernels.backends.cpu.x"]
    assert [name for _, name, _ in imports_of(package, "from .. import x")] == ["surgery_kernels.backends.x"]


def fresh_python(code, cwd, *paths):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_loads_neither_triton_nor_transformers(tmp_path):
    """From a checkout without installation, as PYTHONPATH=kernels:. does it."""
    heavy = ("triton", "transformers", "datasets", "peft", "trl", "matplotlib", "surgery")
    code = f"""
import sys, torch
before = set(sys.modules)
import surgery_kernels
print(surgery_kernels.__file__)
print([name for name in {heavy} if name in sys.modules and name not in before])
"""
    where, loaded = fresh_python(code, tmp_path, KERNELS, ROOT).splitlines()
    assert Path(where) == PACKAGE / "__init__.py"
    assert loaded == "[]"


@pytest.mark.parametrize("checkout_first", [True, False], ids=["checkout-first", "distribution-first"])
def test_hugging_face_kernels_is_not_shadowed(tmp_path, checkout_first):
    """transformers imports the Hugging Face distribution `kernels`; our kernels/ folder must not hide it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MARKER = 'the Hugging Face one'\n")
    paths = [ROOT, tmp_path] if checkout_first else [tmp_path, ROOT]
    code = "import kernels; print(kernels.MARKER)"
    assert fresh_python(code, ROOT, *paths) == "the Hugging Face one"
