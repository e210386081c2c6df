"""The shape of the package: who may import whom, and that `import acejax` stays light."""

import ast
import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

import acejax

PACKAGE = pathlib.Path(acejax.__file__).parent

# A row imports from itself and from rows above it. `lcu`, `flow` and `model` are the centre: pure functions of arrays.
ROWS = (
    {"errors"},
    {"fields"},
    {"lcu", "flow", "model"},
    {"adapt"},
    {"parallel"},
    {"aot"},
    {"weights"},
    {"checkpoint", "workdir"},
    {"data"},
    {"edit"},
    {"train"},
    {"demo"},
    {"cli"},
)
RANK = {place: rank for rank, row in enumerate(ROWS) for place in row}
CENTRE = RANK["model"]
# `import acejax` alone loads nothing; its names lead to the places that define them.
FACE = {name: RANK[module.split(".")[1]] for name, module in acejax._LAZY.items()}
CENTRE_NAMES = [name for name in acejax.__all__ if FACE.get(name, CENTRE) <= CENTRE]

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place(path: pathlib.Path) -> str:
    """The row entry that a file belongs to: acejax/model/rope.py -> model, acejax/lcu.py -> lcu."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a source imports, wherever in the file, `from a import b` as a.b.

    An attribute of `acejax` counts too: `acejax.Editor` imports what it names.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "acejax":
            found.append((node.lineno, f"acejax.{node.attr}"))
    return found


def rank(name: str) -> int | None:
    """The row of an imported name; None outside acejax."""
    top, *rest = name.split(".")
    if top != "acejax":
        return None
    return RANK.get(rest[0], FACE.get(rest[0], CENTRE)) if rest else CENTRE


def violations(home: str, source: str) -> list[str]:
    """What a source in row entry `home` imports from below its row."""
    limit = RANK[home]
    return [f"line {line}: {name}" for line, name in imported(source)
            if rank(name) is not None and rank(name) > limit]


def test_every_file_has_a_place():
    assert {place(path) for path in SOURCES} <= set(RANK)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_row_imports_only_rows_above_it(path):
    assert not violations(place(path), path.read_text())


@pytest.mark.parametrize("home, source, found", [
    ("model", "from acejax.weights import load", ["line 1: acejax.weights.load"]),
    ("model", "def f():\n    import acejax.train.step", ["line 2: acejax.train.step"]),
    ("weights", "import acejax\nacejax.load_mmdit, acejax.apply, acejax.Editor", ["line 2: acejax.Editor"]),
    ("errors", "import acejax", ["line 1: acejax"]),
    ("data", "from acejax import flow, train", ["line 1: acejax.train"]),
    ("cli", "import acejax.train, acejax.demo\nfrom acejax import Editor, lcu, UserError", []),
])
def test_the_walk_sees_violations(home, source, found):
    assert violations(home, source) == found


@pytest.mark.parametrize("path", [path for path in SOURCES if RANK[place(path)] <= CENTRE],
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_centre_needs_jax_flax_and_numpy_alone(path):
    tops = {name.split(".")[0] for _, name in imported(path.read_text())}
    assert tops <= {"acejax", "jax", "flax", "numpy"} | set(sys.stdlib_module_names)


def test_import_is_light():
    """The public face of the centre loads nothing heavy, starts no backend, leaves jax's settings as it finds them."""
    report = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import json, sys
        import jax
        before = {name: repr(value) for name, value in jax.config.values.items()}
        import acejax
        from acejax import %s
        from jax._src import xla_bridge
        json.dump({
            "loaded": sorted({name.split(".")[0] for name in sys.modules}),
            "changed": [name for name, value in before.items() if repr(jax.config.values[name]) != value],
            "backends": list(xla_bridge._backends),
        }, sys.stdout)
    """) % ", ".join(CENTRE_NAMES)], check=True, capture_output=True, text=True, cwd=PACKAGE.parent).stdout
    report = json.loads(report)
    heavy = {"optax", "orbax", "tensorflow", "tensorflow_datasets", "tensorstore", "grain", "transformers", "diffusers",
             "torch", "safetensors", "PIL", "matplotlib", "skimage", "ml_collections", "tensorboardX"}
    assert {"jax", "flax", "numpy"} <= set(report["loaded"])
    assert heavy.isdisjoint(report["loaded"])
    assert report["changed"] == []
    assert report["backends"] == []


@pytest.mark.parametrize("modules", ["acejax", "acejax.cli.main, acejax.cli.convert, acejax.weights.convert"])
def test_copying_weights_waits_for_no_jax(modules):
    """jax takes a second and a half to import, in which two gigabytes are copied."""
    loaded = subprocess.run([sys.executable, "-c", f"import sys, {modules}; print(*sys.modules)"], check=True,
                            capture_output=True, text=True, cwd=PACKAGE.parent).stdout.split()
    assert {"jax", "flax"}.isdisjoint(loaded)


@pytest.mark.parametrize("name", CENTRE_NAMES)
def test_public_names_are_there(name):
    assert getattr(acejax, name) is not None


def test_an_unknown_name_says_so():
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = acejax.nosuch
