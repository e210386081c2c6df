"""`acejax bench tpu`: what a figure is judged by, read off a program; the recorded figures."""

import gzip
import json
from pathlib import Path

import pytest

from acejax import UserError
from benchmarks import tpu, tpu_encoders, tpu_run, tpu_side
from tests.aot.programs import computation, fusion, kernel, loop, program

STREAM = "bf16[1,256,384]"
FIGURES = {figure.name: figure for figure in tpu.FIGURES}


def alone(name: str, steps: int, bundles: int, *operands: str) -> dict:
    """What the other process says of a kernel."""
    text = program(computation("main", kernel("run.1", *operands), entry=True))
    return {"name": name, "text": text, "steps": steps, "bundles": {"run.1": bundles, "TLP": 10**9}}


@pytest.fixture
def folder(tmp_path):
    def of(stack):
        return f', metadata={{op_name="jit(f)/while/body/{stack}/mlp_in/dot_general" stack_frame_id=1}}'
    singles = computation("singles", fusion("a.1", 100, of("single_blocks")), kernel("attention_forward.1", STREAM),
                          kernel("rotate_forward.2", STREAM), kernel("rotate_forward.3", "bf16[1,128,384]"))
    text = program(singles, computation("main", fusion("b.1", 7000), loop("while.1", "singles", trips=5), entry=True))
    (tmp_path / "program.hlo.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "memory.json").write_text(json.dumps({"peak_memory": 5, "compile_seconds": 1.0}))
    (tmp_path / "kernels.json").write_text(json.dumps([
        alone("attention_forward", 4, 250, STREAM), alone("rotate_forward", 2, 10, "bf16[1,128,384]"),
        alone("rotate_forward", 3, 10, STREAM)]))
    return tmp_path


def test_cost_of_a_program(folder):
    found = tpu_run.cost(folder, "v6e")
    assert found.cycles == 7000 + 5 * 100 and found.of_kernels() == 5 * (1000 + 30 + 20) and found.peak == 5
    assert found.of_kernels("attention", "splash") == 5000 and found.total == 7500 + 5250


def test_cores_share_kernels(folder):
    found = tpu_run.cost(folder, "v5p")
    assert found.cores == 2 and found.total == 7500 + 5250 / 2 and tpu.of_one_core(found) == 7500 + 5250


def test_a_layer_outside_attention(folder):
    found = tpu_run.cost(folder, "v6e", "single_blocks")
    assert tpu.outside_attention(found) == 100 + 30 + 20


def test_a_kernel_without_a_schedule(folder):
    (folder / "kernels.json").write_text(json.dumps([alone("rotate_forward", 4, 250, STREAM)]))
    with pytest.raises(UserError, match="no schedule of the kernel attention_forward"):
        tpu_run.cost(folder, "v6e")


@pytest.mark.parametrize("name, ours, against, told", [
    ("full v6e-8", 1.5, 6.0, {"ratio": 0.25, "must": 1.5, "holds": True, "goal": 1.0, "reached": False}),
    ("full v6e-8", 1.51, None, {"ratio": None, "must": 1.5, "holds": False, "goal": 1.0, "reached": False}),
    ("LoRA, int8 base v6e-1", 1.0, 4.0, {"ratio": 0.25, "must": 1.0, "holds": True, "goal": None, "reached": None}),
    ("LoRA, int8 base v6e-1", 1.1, 4.0, {"ratio": 0.275, "must": 1.0, "holds": False, "goal": None, "reached": None}),
    ("LoRA, int8 base v6e-1", 1.1, None, {"ratio": None, "must": None, "holds": None, "goal": None, "reached": None}),
    ("all-reduce that stands for a gather v5p-128", 0.0, 34.6,
     {"ratio": 0.0, "must": 0.0, "holds": True, "goal": None, "reached": None}),
])
def test_what_must_hold(name, ours, against, told):
    row = tpu.judge(FIGURES[name], ours, against)
    assert row == told
    words = tpu.line({"figure": name, "unit": "x", "ours": ours, "against": against} | row)
    assert ("DOES NOT HOLD" in words) == (told["holds"] is False)


def test_figures_by_name():
    assert [figure.name for figure in tpu.chosen(["LoRA", "attention v5p"])] == [
        "attention v5p", "LoRA, int8 base v6e-1", "LoRA, int8 base v6e-8"]
    with pytest.raises(UserError, match="no figure is named 'nosuch'; known: attention v6e; "):
        tpu.chosen(["LoRA", "nosuch"])


@pytest.mark.parametrize("side, more", [(tpu_side, tpu.ROTATE), (tpu_encoders, {})])
def test_all_programs_are_known_to_the_other_process(side, more):
    asked = {program for figure in tpu.FIGURES if figure.side.stem == side.__name__.rpartition(".")[2]
             for program in figure.programs}
    assert asked | set(more.values()) == set(side.FIGURES)


def test_sources_versions_and_figures_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_run, "versions", lambda: {"jax": "1"})
    for name in ("acejax/model/mmdit.py", "acejax/cli/plan.py", "configs/ace_plus.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1")
    first = tpu_run.key(tmp_path, "full v6e-8")
    assert len({first, tpu_run.key(tmp_path, "full v6e-8", tpu_run.ENCODERS)}) == 2
    assert first.startswith("full_v6e_8-") and first != tpu_run.key(tmp_path, "full v5e-256")
    (tmp_path / "acejax/cli/plan.py").write_text("a = 2")
    assert tpu_run.key(tmp_path, "full v6e-8") == first  # no program is made of it
    (tmp_path / "configs/ace_plus.py").write_text("a = 2")
    second = tpu_run.key(tmp_path, "full v6e-8")
    monkeypatch.setattr(tpu_run, "versions", lambda: {"jax": "2"})
    assert len({first, second, tpu_run.key(tmp_path, "full v6e-8")}) == 3


def test_a_commit_that_is_not_there():
    with pytest.raises(UserError, match="git worktree add"), tpu._checkout("0" * 40):
        pass


def test_rows_that_are_not_made_again_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu, "_git", lambda *arguments: "abc")
    monkeypatch.setattr(tpu_run, "versions", lambda: {"jax": "1"})
    path, rows = tmp_path / "tpu.json", [{"figure": name} for name in ("attention v6e", "full v6e-8")]
    made = [figure for figure in tpu.FIGURES if figure.name == "full v6e-8"]
    assert tpu._others(path, "abc", made) == []
    record = {"against": "abc", "versions": {"jax": "1"}, "rows": rows}
    path.write_text(json.dumps(record))
    assert tpu._others(path, "abc", made) == rows[:1]
    with pytest.raises(UserError, match="against of its rows is abc, here None"):
        tpu._others(path, None, made)
    path.write_text(json.dumps(record | {"versions": {"jax": "0"}}))
    with pytest.raises(UserError, match="versions of its rows is"):
        tpu._others(path, "abc", made)
    path.write_text(json.dumps(record | {"rows": [{"figure": "renamed"}]}))
    with pytest.raises(UserError, match="its row 'renamed' is no figure"):
        tpu._others(path, "abc", made)


RESULTS = Path(tpu.__file__).parent / "results" / "tpu.json"


def test_recorded_figures():
    report = json.loads(RESULTS.read_text())
    recorded = [row["figure"] for row in report["rows"]]  # docs/chips.md says which of the encoders' are missing
    assert set(recorded) >= {name for name, figure in FIGURES.items() if figure.side == tpu_run.SIDE}
    assert recorded == [name for name in FIGURES if name in recorded]
    assert report["against"] == "c143ae5"
    for row in report["rows"]:
        judged = tpu.judge(FIGURES[row["figure"]], row["ours"], row["against"])
        assert {name: row[name] for name in judged} == judged
