"""Small optimised programs as a TPU's compiler writes them, shortened to what is read."""


def computation(name: str, *lines: str, entry: bool = False) -> str:
    head = f"{'ENTRY ' if entry else ''}%{name} (p.0: f32[8]) -> f32[8] {{"
    return "\n".join([head, *(f"  {line}" for line in lines), "}"])


def program(*computations: str, head: str = "") -> str:
    return "\n\n".join(["HloModule jit_step, is_scheduled=true", *filter(None, [head]), *computations]) + "\n"


def fusion(name: str, cycles: int, more: str = "", shape: str = "f32[8]{0:T(128)}", calls: str = "fused") -> str:
    return (f"%{name} = {shape} fusion(%p.0), kind=kLoop, calls=%{calls}{more}, "
            f'backend_config={{"estimated_cycles":"{cycles}","iteration_bounds":["1"]}}')


def loop(name: str, body: str, condition: str = "", trips: int | None = None) -> str:
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    return (f"%{name} = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, /*index=2*/f32[8]{{0}}) while(%tuple.1), "
            f"condition=%{condition or 'none'}, body=%{body}{known}")


def kernel(name: str, *operands: str) -> str:
    layouts = ", ".join(f"{operand}{{2,1,0}}" for operand in operands)
    return (f"%{name} = (bf16[1,256,384]{{2,1,0:T(8,128)(2,1)}}, f32[1,3,1,256]{{3,2,1,0}}) custom-call(%p.0, %p.1), "
            f'custom_call_target="tpu_custom_call", operand_layout_constraints={{{layouts}}}, '
            'frontend_attributes={kernel_metadata={}}')
