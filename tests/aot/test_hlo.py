"""What is read off a program: cycles by trips and branches, kernels, bytes that move, lines of ours."""

import pytest

from acejax.aot import hlo
from tests.aot.programs import computation, fusion, kernel, loop, program

STREAM = "bf16[1,256,384]"


def test_loops_count_as_often_as_they_run():
    inner = computation("inner", fusion("a.1", 7))
    outer = computation("outer", fusion("b.1", 100), loop("while.2", "inner", "until"))
    until = computation("until", "%constant.3 = s32[]{:T(128)} constant(3)", "ROOT %c.1 = pred[] compare(%x, %y)")
    found = hlo.read(program(inner, outer, until, computation("main", fusion("c.1", 1000), loop(
        "while.1", "outer", trips=5), entry=True)))
    assert found.cycles == 1000 + 5 * (100 + 3 * 7)
    assert [(one.name, one.calls, one.cycles) for one in found.operations] == [
        ("c.1", 1, 1000), ("b.1", 5, 500), ("a.1", 15, 105)]


def test_a_loop_that_does_not_say_how_often_counts_once():
    until = computation("until", "%constant.3 = s32[] constant(3)", "%constant.4 = s32[] constant(4)")
    found = hlo.read(program(computation("body", fusion("a.1", 7)), until,
                             computation("main", loop("while.1", "body", "until"), entry=True)))
    assert found.cycles == 7


def test_of_branches_the_costlier_counts():
    cheap, dear = computation("cheap", fusion("a.1", 5)), computation("dear", fusion("b.1", 50))
    for choice in ("branch_computations={%dear, %cheap}", "branch_computations={%cheap, %dear}",
                   "true_computation=%cheap, false_computation=%dear"):
        main = computation("main", f"%conditional.1 = (f32[8]{{0}}, f32[8]{{0}}) conditional(%p, %q), {choice}",
                           entry=True)
        assert hlo.read(program(cheap, dear, main)).cycles == 50


def test_a_fusion_s_own_computation_is_not_counted_again():
    fused = computation("fused", "ROOT %add.1 = f32[8]{0} add(%p.0, %p.0)", fusion("inside", 1000))
    assert hlo.read(program(fused, computation("main", fusion("a.1", 5), entry=True))).cycles == 5


def test_kernels_by_name_and_shapes():
    body = computation("body", kernel("transpose_jvp_attention_forward_.3", STREAM, "s32[1]"))
    main = computation("main", loop("while.1", "body", trips=4), kernel("attention_forward.7", STREAM, "s32[1]"),
                       kernel("attention_forward.8", "bf16[1,512,384]", "s32[1]"), entry=True)
    text = program(body, main)
    signature = "attention_forward(bf16[1,256,384], s32[1])"
    assert hlo.read(text).kernels == {signature: 5, "attention_forward(bf16[1,512,384], s32[1])": 1}
    assert hlo.instruction_of(text, signature) == "transpose_jvp_attention_forward_.3"
    with pytest.raises(KeyError):
        hlo.instruction_of(text, "norm_forward(bf16[1,256,384])")


def test_a_collective_in_two_parts_counts_once():
    main = computation(
        "main", "%p.0 = bf16[8,16]{1,0} parameter(0)",
        "%all-gather-start.1 = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%p.0), channel_id=1",
        "%all-gather-done.1 = bf16[64,16]{1,0} all-gather-done(%all-gather-start.1)", entry=True)
    assert hlo.read(program(main)).collectives == {"all-gather": 64 * 16 * 2}


def test_a_collective_that_goes_on_through_several_fusions_counts_once():
    """As on v5e: each part of the way is in the fusion that runs beside it."""
    parts = [computation(
        f"part.{i}", "%p.0 = bf16[8,16]{1,0} parameter(0)",
        "%all-gather.1 = bf16[64,16]{1,0} all-gather(%p.0), channel_id=7") for i in range(3)]
    main = computation(
        "main", *(fusion(f"fusion.{i}", 10, calls=f"part.{i}") for i in range(3)), entry=True)
    assert hlo.read(program(*parts, main)).collectives == {"all-gather": 64 * 16 * 2}


def test_a_collective_of_another_core():
    """As v7x's SparseCores run them: started by a call, whose result is a mark."""
    other = computation(
        "called", "%p.0 = bf16[8,16]{1,0} parameter(0)",
        "ROOT %all-gather.1 = bf16[64,16]{1,0} all-gather(%p.0), channel_id=1") + ', execution_thread="sparsecore"'
    main = computation(
        "main", "%start = ((), (), (s32[1]{0})) call-start(), async_execution_thread=\"sparsecore\", to_apply=%called",
        "%done = () call-done(%start)", entry=True)
    assert hlo.read(program(other, main)).collectives == {"all-gather": 64 * 16 * 2}


def test_bytes_are_the_larger_of_what_is_taken_and_given():
    main = computation(
        "main", "%p.0 = f32[64,16]{1,0} parameter(0)", "%p.1 = f32[8]{0} parameter(1)",
        "%reduce-scatter.1 = f32[8,16]{1,0} reduce-scatter(%p.0), channel_id=1, dimensions={0}, to_apply=%add",
        "%all-reduce.1 = (f32[64,16]{1,0}, f32[8]{0}) all-reduce(%p.0, %p.1), channel_id=2, to_apply=%add", entry=True)
    assert hlo.read(program(main)).collectives == {"reduce-scatter": 64 * 16 * 4, "all-reduce": 64 * 16 * 4 + 32}


def test_an_all_reduce_that_is_cut_at_once_is_a_reduce_scatter():
    fused = computation(
        "all-reduce-scatter.2", "%p.0 = f32[64,16]{1,0} parameter(0)",
        "%all-reduce.5 = f32[64,16]{1,0} all-reduce(%p.0), channel_id=1, to_apply=%add",
        "ROOT %dynamic-slice.1 = f32[8,16]{1,0} dynamic-slice(%all-reduce.5, %i, %z)")
    main = computation("main", fusion("fusion.9", 12, calls="all-reduce-scatter.2"), entry=True)
    found = hlo.read(program(fused, main))
    assert found.collectives == {"reduce-scatter": 64 * 16 * 4} and found.cycles == 12 and not found.zeros


ZEROS = ("%zero.1 = bf16[64,16]{1,0} broadcast(%constant.0), dimensions={}",
         "ROOT %dynamic-update-slice.1 = bf16[64,16]{1,0} dynamic-update-slice(%zero.1, %p.0, %i, %z)")


@pytest.mark.parametrize("operand", ["plain", "fused", "copied", "in a tuple", "given"])
def test_a_gather_made_of_zeros(operand):
    fused = computation("fused_computation.1", "%p.0 = bf16[8,16]{1,0} parameter(0)", *ZEROS)
    several = computation("fused_computation.2", "%p.0 = bf16[8,16]{1,0} parameter(0)", *(
        line.removeprefix("ROOT ") for line in ZEROS),
        "ROOT %tuple.9 = (f32[8]{0}, bf16[64,16]{1,0}) tuple(%other, %dynamic-update-slice.1)")
    made = {
        "plain": ZEROS[0], "fused": fusion("made", 5, shape="bf16[64,16]{1,0}", calls="fused_computation.1"),
        "in a tuple": fusion("both", 5, shape="(f32[8]{0}, bf16[64,16]{1,0})", calls="fused_computation.2"),
        "given": "%p.5 = bf16[64,16]{1,0} parameter(5)"}
    made["copied"] = made["fused"]
    last = {"plain": ZEROS[1].replace("ROOT %dynamic-update-slice.1", "%dynamic-update-slice.1"),
            "in a tuple": "%gte.1 = bf16[64,16]{1,0} get-tuple-element(%both), index=1",
            "copied": "%copy.1 = bf16[64,16]{1,0:T(8)} copy(%made)"}
    name = {"plain": "dynamic-update-slice.1", "in a tuple": "gte.1", "copied": "copy.1", "fused": "made",
            "given": "p.5"}[operand]
    main = computation(
        "main", made[operand], *filter(None, [last.get(operand)]), "%g.0 = f32[128]{0} parameter(1)",
        f"%all-reduce.1 = (bf16[64,16]{{1,0}}, f32[128]{{0}}) all-reduce(%{name}, %g.0), channel_id=1, to_apply=%add",
        entry=True)
    found = hlo.read(program(fused, several, main))
    assert found.zeros == (0 if operand == "given" else 64 * 16 * 2)  # the other operand is a sum
    assert found.collectives == {"all-reduce": 64 * 16 * 2 + 128 * 4}


# Parents are counted from 1, where frames are counted from 0: each of the first four has the one before it.
FRAMES = """FileNames
1 "/home/someone/acejax/train/step.py"
2 "/usr/lib/python3.12/site-packages/jax/_src/numpy/lax.py"
3 "/home/someone/acejax/model/mmdit.py"
4 "/home/someone/acejax/model/dense.py"

FunctionNames
1 "step"
2 "add"

FileLocations
1 {file_name_id=1 function_name_id=1 line=20 end_line=20 column=1 end_column=1}
2 {file_name_id=2 function_name_id=2 line=99 end_line=99 column=1 end_column=1}
3 {file_name_id=3 function_name_id=2 line=130 end_line=130 column=1 end_column=1}
4 {file_name_id=4 function_name_id=2 line=48 end_line=48 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=3 parent_frame_id=2}
3 {file_location_id=4 parent_frame_id=3}
4 {file_location_id=2 parent_frame_id=4}
5 {file_location_id=2 parent_frame_id=1}
"""


@pytest.mark.parametrize("frame, line", [(1, "train/step.py:20"), (2, "model/mmdit.py:130"), (3, "model/mmdit.py:130"),
                                         (4, "model/mmdit.py:130"), (5, "")],
                         ids=["ours", "the innermost", "who calls a layer", "not jax's", "none of ours"])
def test_the_line_of_ours(frame, line):
    told = f', metadata={{op_name="jit(step)/mlp_in/dot_general" stack_frame_id={frame}}}'
    (found,) = hlo.read(program(computation("main", fusion("a.1", 5, told), entry=True), head=FRAMES)).operations
    assert found.source == line and found.path == "jit(step)/mlp_in/dot_general" and found.shape == "f32[8]"


def test_one_trip_of_a_stack():
    def of(stack):
        return f', metadata={{op_name="jit(f)/while/body/{stack}/mlp_in/dot_general" stack_frame_id=1}}'
    inner = computation("inner", fusion("c.1", 10, of("single_blocks")))
    singles = computation("singles", fusion("a.1", 100, of("single_blocks")), loop("while.3", "inner", trips=8),
                          kernel("attention_forward.1", STREAM))
    doubles = computation("doubles", fusion("b.1", 900, of("double_blocks")))
    text = program(inner, singles, doubles, computation("main", loop("while.1", "doubles", trips=5), loop(
        "while.2", "singles", trips=5), entry=True))
    found = hlo.trip(text, "single_blocks")
    assert found.cycles == 100 + 8 * 10 and found.kernels == {"attention_forward(bf16[1,256,384])": 1}
    assert hlo.trip(text, "double_blocks").cycles == 900
    with pytest.raises(KeyError):
        hlo.trip(text, "triple_blocks")
